"""A target fed with so many inputs from a seed, which replay exactly."""

from __future__ import annotations

import faulthandler
import random
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from paceline.core.codec import encode
from tests.fuzz.corpus import frames_of
from tests.fuzz.grammar import Grammar
from tests.fuzz.mutate import Mutator
from tests.fuzz.size import size_of
from tests.fuzz.target import Target

ROUND = 20_000
"""Inputs for one life of a target."""
HANG_S = 30.0
"""For so few inputs that they take a fraction of a second."""
WATCHED = 500
"""That many inputs."""


@dataclass
class Row:
    """What came of one target. `things`: the most that it remembered at the end of a round."""

    name: str
    inputs: int = 0
    seconds: float = 0.0
    errors: int = 0
    things: int = 0
    rss_before_mb: float = 0.0
    rss_after_mb: float = 0.0
    first_error: str = ""


def rss_mb(pid: int | str = "self") -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def fuzz(
    kind: type[Target], inputs: int, seed: int, progress: Callable[[Row], None] = lambda row: None, stop_at: int = 1
) -> Row:
    """Feed it. `stop_at`: errors after which it is enough. A hang ends the process, with a traceback."""
    draw = random.Random(f"{kind.name} {seed}")
    target, mutator = kind(draw), mutator_of(kind, draw)
    row, begin = Row(kind.name), time.monotonic()
    while row.inputs < inputs and row.errors < stop_at:
        frame = b""
        try:
            target.begin()
            for _ in range(min(ROUND, inputs - row.inputs)):
                frame = mutator.next()
                row.inputs += 1
                if not row.inputs % WATCHED:
                    faulthandler.dump_traceback_later(HANG_S, exit=True)
                target.feed(frame)
            target.check()
            row.things = max(row.things, size_of(target.machines()))
            assert row.things <= kind.largest, f"it remembers {row.things} things"
        except Exception as error:
            row.errors += 1
            where = f"input {row.inputs} of seed {seed}: {frame[:200]!r}"
            row.first_error = row.first_error or f"{type(error).__name__}: {error} at {where}"
            traceback.print_exc(file=sys.stderr)
        row.rss_before_mb = row.rss_before_mb or rss_mb()
        row.seconds = time.monotonic() - begin
        progress(row)
    faulthandler.cancel_dump_traceback_later()
    row.rss_after_mb = rss_mb()
    return row


def mutator_of(kind: type[Target], draw: random.Random) -> Mutator:
    grammar = Grammar(draw, kind.known, kind.parties)
    return Mutator(draw, frames_of(kind.corpus), (lambda: encode(grammar.message(kind.kinds))) if kind.kinds else None)
