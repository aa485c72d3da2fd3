"""Traces of real requests: when each came, and how long its prompt and its answer were.

Two shapes are read, told apart by their first line: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens
(the Azure LLM inference traces), and JSON lines with timestamp (milliseconds), input_length, output_length and perhaps
hash_ids, the ids of the prompt's successive blocks of 512 tokens (the Mooncake traces).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct

from paceline.errors import ConfigError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOST_TOKENS = 1 << 40


class Arrival(Struct, frozen=True, gc=False):
    """One request: seconds from the trace's first one; tokens of prompt and answer, at least 1 each; prompt blocks."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """All requests of a trace, in order of time. Raises ConfigError naming the file and the line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = list(_rows(path, file))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise ConfigError(f"--trace: {path}: {reason}") from None
    if not found:
        raise ConfigError(f"--trace: {path}: holds no request")
    found.sort(key=lambda arrival: arrival.at)
    begin = found[0].at
    return [Arrival(one.at - begin, one.prompt_tokens, one.answer_tokens, one.blocks) for one in found]


def faster(arrivals: Iterable[Arrival], scale: float) -> list[Arrival]:
    """The same requests, `scale` times as many a second."""
    return [Arrival(one.at / scale, one.prompt_tokens, one.answer_tokens, one.blocks) for one in arrivals]


def _rows(path: Path, file: Iterable[str]) -> Iterator[Arrival]:
    lines = iter(file)
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        yield _json_row(path, 1, first)
        for number, line in enumerate(lines, 2):
            if line.strip():
                yield _json_row(path, number, line)
        return
    header = next(csv.reader([first.lstrip("\ufeff")]), [])
    missing = [name for name in COLUMNS if name not in header]
    if first.strip() and missing:
        raise _wrong(path, 1, f"is no JSON object and has no column {missing[0]}")
    places = [header.index(name) for name in COLUMNS] if first.strip() else []
    rows = csv.reader(lines)
    for row in rows:
        if row:
            yield _csv_row(path, 1 + rows.line_num, row, places)


def _csv_row(path: Path, line: int, row: list[str], places: list[int]) -> Arrival:
    if max(places) >= len(row):
        raise _wrong(path, line, f"has {len(row)} columns")
    texts = [row[place] for place in places]
    try:
        at = _timestamp(texts[0])
    except ValueError:
        raise _wrong(path, line, f"TIMESTAMP: {texts[0]!r} is no time") from None
    return Arrival(at, _tokens(path, line, COLUMNS[1], texts[1]), _tokens(path, line, COLUMNS[2], texts[2]))


def _timestamp(text: str) -> float:
    # 100 ns digits, one more than datetime reads.
    whole, _, digits = text.partition(".")
    seconds = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
    return seconds + float(f"0.{int(digits or 0):0{len(digits)}d}")


def _json_row(path: Path, line: int, text: str) -> Arrival:
    try:
        row = json.loads(text)
    except ValueError:
        raise _wrong(path, line, "is no JSON") from None
    if not isinstance(row, dict):
        raise _wrong(path, line, "is no JSON object")
    values = []
    for name in ("timestamp", "input_length", "output_length"):
        if name not in row:
            raise _wrong(path, line, f"has no {name}")
        values.append(row[name])
    at = values[0]
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < MOST_TOKENS:
        raise _wrong(path, line, f"timestamp: {at!r} is no time in milliseconds")
    prompt, answer = (
        _tokens(path, line, name, value)
        for name, value in zip(("input_length", "output_length"), values[1:], strict=True)
    )
    blocks = row.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
        raise _wrong(path, line, "hash_ids: is no list of numbers")
    return Arrival(at / 1000, prompt, answer, tuple(blocks))


def _tokens(path: Path, line: int, name: str, value: Any) -> int:
    try:
        tokens = int(value)
    except (TypeError, ValueError):
        raise _wrong(path, line, f"{name}: {value!r} is no number") from None
    if not 0 <= tokens < MOST_TOKENS:
        raise _wrong(path, line, f"{name}: {value!r} is not within bounds")
    # A prompt holds at least one token, and an answer ends with one.
    return max(1, tokens)


def _wrong(path: Path, line: int, what: str) -> ConfigError:
    return ConfigError(f"--trace: {path}, line {line}: {what}")
