"""Traces of real requests: when each came, and how long its prompt and its answer were.

Three shapes are read, told apart by their first line: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens
(the Azure LLM inference traces), JSON lines with timestamp (milliseconds), input_length, output_length and perhaps
hash_ids, the ids of the prompt's successive blocks of 512 tokens (the Mooncake traces), and JSON lines with turns: a
session each, whose turns come one after the other, each some time after the answer before it has ended.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from paceline.errors import ConfigError

MOST = 1 << 40
Tokens = Annotated[int, Meta(ge=0, lt=MOST)]


class Arrival(Struct, frozen=True, gc=False):
    """One request: seconds from the trace's first one; tokens of prompt and answer, at least 1 each; prompt blocks.

    `turn`: which of its session, from 1; then `at` counts from the end of the one before. `session`: its number.
    """

    at: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()
    turn: int = 0
    session: int = 0


class JsonRow(Struct):
    timestamp: Annotated[float, Meta(ge=0, lt=MOST)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...] = ()


class Session(Struct):
    """A row of sessions. `turns`: seconds from the end of the answer before, tokens of the prompt and of the answer,
    and how many tokens the prompt begins with that the prompt before it began with. `shared_tokens`: that the first
    prompt begins with, the same in all sessions that name so many.
    """

    turns: Annotated[list[tuple[Annotated[float, Meta(ge=0, lt=MOST)], Tokens, Tokens, Tokens]], Meta(min_length=1)]
    shared_tokens: Tokens = 0
    session: str = ""


class CsvRow(Struct):
    """A row of CSV, by the names of its columns."""

    TIMESTAMP: str
    ContextTokens: Tokens
    GeneratedTokens: Tokens


def read_trace(path: Path) -> list[Arrival]:
    """All requests of a trace, in order of time. Raises ConfigError naming the file and the line."""
    found = _all_of(path)
    if any(isinstance(one, Session) for one in found):
        raise ConfigError(f"--trace: {path}: holds sessions: say how many at once (--sessions) or a second")
    found.sort(key=lambda arrival: arrival.at)
    begin = found[0].at
    return [Arrival(one.at - begin, one.prompt_tokens, one.answer_tokens, one.blocks) for one in found]


def faster(arrivals: Iterable[Arrival], scale: float) -> list[Arrival]:
    """The same requests, `scale` times as many a second."""
    return [Arrival(one.at / scale, one.prompt_tokens, one.answer_tokens, one.blocks) for one in arrivals]


SESSION_BLOCK_TOKENS = 128
"""Of a block of a session's prompts."""


def read_sessions(path: Path) -> list[Session]:
    """All sessions of a trace. Raises ConfigError naming the file and the line."""
    found = _all_of(path)
    if not all(isinstance(one, Session) for one in found):
        raise ConfigError(f"--trace: {path}: --sessions and --session-rate are for traces of sessions")
    return found


class Sessions:
    """Sessions that go on, each turn some time after the end of the answer before it.

    So many `at_once`, the next one in the place of each that has ended; or beginning at random moments, `rate` a
    second, where that is not None. They are taken in the file's order, and again from its beginning, as other sessions
    with the same shared prompts. One that grows beyond `most_tokens` ends there. `turns`: how many are served, all of
    them once where it is None. Nobody thinks for longer than `longest_think_s`. Raises ConfigError where nothing fits.
    """

    def __init__(
        self, sessions: list[Session], most_tokens: int, at_once: int, rate: float | None, seed: int,
        turns: int | None = None, longest_think_s: float = MOST,
    ) -> None:  # fmt: skip
        fitting = [_fitting(one, most_tokens, longest_think_s) for one in sessions]
        count = sum(len(one.turns) for one in fitting)
        if not fitting[0].turns or not count:
            raise ConfigError(f"--kv-tokens: the first session does not fit into {most_tokens}")
        self.turns = turns or count
        self.longest_answer = max(answer for one in fitting for _, _, answer, _ in one.turns)
        self._sessions = itertools.cycle([one for one in fitting if one.turns])
        self._at_once, self._rate, self._chance = at_once, rate, Random(seed)
        self._names, self._numbers = itertools.count(1), itertools.count(1)
        self._shared: dict[int, list[int]] = {}
        self._running: dict[int, Iterator[Arrival]] = {}

    def begin(self) -> Iterator[float]:
        """When places of sessions are first taken, in seconds."""
        if self._rate is None:
            yield from [0.0] * self._at_once
            return
        now = 0.0
        while True:
            now += self._chance.expovariate(self._rate)
            yield now

    def next(self, place: int) -> Arrival | None:
        """The next turn of the session at this place, or the first of the next one; None where it stays empty."""
        running = self._running.get(place)
        turn = next(running, None) if running is not None else None
        if turn is not None or (running is not None and self._rate is not None):
            return turn
        self._running[place] = running = self._turns(next(self._sessions))
        return next(running)

    def _turns(self, session: Session) -> Iterator[Arrival]:
        number, blocks = next(self._numbers), self._shared.setdefault(session.shared_tokens, [])
        if not blocks:
            blocks += itertools.islice(self._names, session.shared_tokens // SESSION_BLOCK_TOKENS)
        for turn, (think_s, prompt, answer, reused) in enumerate(session.turns, 1):
            kept = min(reused if turn > 1 else session.shared_tokens, prompt) // SESSION_BLOCK_TOKENS
            blocks = blocks[:kept]
            blocks += itertools.islice(self._names, prompt // SESSION_BLOCK_TOKENS - len(blocks))
            yield Arrival(think_s, prompt, answer, tuple(blocks), turn, number)


def _fitting(session: Session, most_tokens: int, longest_think_s: float) -> Session:
    # A prompt holds at least one token, and an answer ends with one.
    turns = [
        (min(think_s, longest_think_s), max(1, prompt), max(1, answer), reused)
        for think_s, prompt, answer, reused in session.turns
    ]
    fits = itertools.takewhile(lambda turn: turn[1] + turn[2] <= most_tokens, turns)
    return Session(list(fits), session.shared_tokens, session.session)


def _all_of(path: Path) -> list[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(_rows(path, file))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise ConfigError(f"--trace: {path}: {reason}") from None
    if not found:
        raise ConfigError(f"--trace: {path}: holds no request")
    return found


def _rows(path: Path, file: Iterable[str]) -> Iterator[Arrival | Session]:
    lines = iter(file)
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        for number, line in enumerate(itertools.chain([first], lines), 1):
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


def _read(path: Path, line: int, read: Callable[[Any], Arrival | Session], row: object) -> Arrival | Session:
    try:
        return read(row)
    except (ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--trace: {path}, line {line}: {error}") from None


# A prompt holds at least one token, and an answer ends with one.


def _of_json(line: str) -> Arrival | Session:
    if '"turns"' in line:
        return msgspec.json.decode(line, type=Session)
    row = msgspec.json.decode(line, type=JsonRow)
    return Arrival(row.timestamp / 1000, max(1, row.input_length), max(1, row.output_length), row.hash_ids)


def _of_csv(fields: dict[str, str]) -> Arrival:
    row = msgspec.convert(fields, CsvRow, strict=False)
    # 100 ns digits, one more than datetime reads.
    whole, _, digits = row.TIMESTAMP.partition(".")
    seconds = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{digits or 0}")
    return Arrival(seconds, max(1, row.ContextTokens), max(1, row.GeneratedTokens))
