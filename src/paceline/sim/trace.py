"""Traces of real requests: when each came, and how long its prompt and its answer were.

Two shapes are read, told apart by their first line: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens
(the Azure LLM inference traces), and JSON lines with timestamp (milliseconds), input_length, output_length and perhaps
hash_ids, the ids of the prompt's successive blocks of 512 tokens (the Mooncake traces).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from paceline.errors import ConfigError

MOST = 1 << 40
Tokens = Annotated[int, Meta(ge=0, lt=MOST)]


class Arrival(Struct, frozen=True, gc=False):
    """One request: seconds from the trace's first one; tokens of prompt and answer, at least 1 each; prompt blocks."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


class JsonRow(Struct):
    timestamp: Annotated[float, Meta(ge=0, lt=MOST)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...] = ()


class CsvRow(Struct):
    """A row of CSV, by the names of its columns."""

    TIMESTAMP: str
    ContextTokens: Tokens
    GeneratedTokens: Tokens


def read_trace(path: Path) -> list[Arrival]:
    """All requests of a trace, in order of time. Raises ConfigError naming the file and the line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
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
        for number, line in enumerate(chain([first], lines), 1):
            if line.strip():
                yield _read(path, number, _of_json, line)
        return
    header = next(csv.reader([first]), [])
    missing = [name for name in CsvRow.__struct_fields__ if name not in header]
    if first.strip() and missing:
        raise ConfigError(f"--trace: {path}, line 1: is no JSON object and has no column {missing[0]}")
    rows = csv.DictReader(lines, header)
    for row in rows:
        yield _read(path, 1 + rows.line_num, _of_csv, row)


def _read(path: Path, line: int, read: Callable[[Any], Arrival], row: object) -> Arrival:
    try:
        return read(row)
    except (ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--trace: {path}, line {line}: {error}") from None


# A prompt holds at least one token, and an answer ends with one.


def _of_json(line: str) -> Arrival:
    row = msgspec.json.decode(line, type=JsonRow)
    return Arrival(row.timestamp / 1000, max(1, row.input_length), max(1, row.output_length), row.hash_ids)


def _of_csv(fields: dict[str, str]) -> Arrival:
    row = msgspec.convert(fields, CsvRow, strict=False)
    # 100 ns digits, one more than datetime reads.
    whole, _, digits = row.TIMESTAMP.partition(".")
    seconds = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{digits or 0}")
    return Arrival(seconds, max(1, row.ContextTokens), max(1, row.GeneratedTokens))
