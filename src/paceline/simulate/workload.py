"""What clients ask for: arrivals from a seed, or from a file of real ones."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from paceline.errors import ConfigError

MAX_PROMPT_TOKENS = 4096
MAX_ANSWER_TOKENS = 300


class Arrival(Struct, frozen=True):
    """One request: when it comes (seconds from the start), to which front-end, and its sizes in tokens.

    `rank`: the rank that it names, if any. `patience_s`: after how many seconds its client hangs up, None for never.
    """

    at: float
    front_end: int
    prompt_tokens: int
    answer_tokens: int
    rank: int | None = None
    patience_s: float | None = None


def drawn(stream: random.Random, requests: int, duration_s: float, ranks: int, front_ends: int) -> list[Arrival]:
    """`requests` arrivals within `duration_s`: singles, bursts and quiet times between, so that waves begin and end."""
    arrivals: list[Arrival] = []
    while len(arrivals) < requests:
        at = stream.random() * duration_s
        burst = stream.choice((1, 1, 1, 2, 4, 8, 16))
        width_s = stream.choice((0.0, 0.002, 0.05, 0.5))
        for _ in range(min(burst, requests - len(arrivals))):
            arrivals.append(_arrival(stream, at + stream.random() * width_s, ranks, front_ends))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrival(stream: random.Random, at: float, ranks: int, front_ends: int) -> Arrival:
    return Arrival(
        at,
        stream.randrange(front_ends),
        _size(stream, 120, 1.2, MAX_PROMPT_TOKENS),
        _size(stream, 12, 1.0, MAX_ANSWER_TOKENS),
        stream.randrange(ranks) if stream.random() < 0.2 else None,
        stream.random() * 0.5 if stream.random() < 0.05 else None,
    )


def _size(stream: random.Random, median: float, spread: float, largest: int) -> int:
    return min(largest, max(1, round(median * math.exp(spread * stream.gauss(0.0, 1.0)))))


def from_trace(path: Path, requests: int, front_ends: int, speed: float = 1.0) -> list[Arrival]:
    """The first `requests` of a trace, `speed` times as fast, over the front-ends in turn.

    Two shapes are read: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, and JSON lines with
    timestamp (milliseconds), input_length and output_length. Raises ConfigError naming the line that is neither.
    """
    try:
        rows = list(_rows(path, requests))
    except OSError as error:
        raise ConfigError(f"--trace: {path}: {error.strerror}") from None
    if not rows:
        raise ConfigError(f"--trace: {path} holds no request")
    begin = min(at for at, _, _ in rows)
    arrivals = [
        Arrival((at - begin) / speed, place % front_ends, max(1, prompt), max(1, answer))
        for place, (at, prompt, answer) in enumerate(rows)
    ]
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _rows(path: Path, limit: int) -> Iterator[tuple[float, int, int]]:
    """Seconds, prompt tokens and answer tokens of each line."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file) if path.suffix == ".csv" else file
        for number, line in zip(range(limit), lines, strict=False):
            try:
                yield _csv_row(line) if isinstance(line, dict) else _json_row(str(line))
            except (KeyError, TypeError, ValueError):
                raise ConfigError(f"--trace: {path}: request {number + 1} is of neither shape") from None


def _csv_row(row: dict[str, str]) -> tuple[float, int, int]:
    # 100 ns digits, one more than datetime reads.
    whole, _, digits = row["TIMESTAMP"].partition(".")
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{digits or 0}")
    return seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"])


def _json_row(line: str) -> tuple[float, int, int]:
    row = json.loads(line)
    return float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])
