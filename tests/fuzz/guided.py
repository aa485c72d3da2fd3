"""A target fed by atheris, which keeps what reaches new code and goes on from there.

    python -m tests.fuzz.guided TARGET --inputs 1000000 [--seed 1]

Its mutator is ours, since bytes changed at random are hardly ever a message. What it has found ends the process, with
the input in a file `crash-…`; a target remembers its inputs, so that one alone need not show it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time

import atheris

with atheris.instrument_imports(include=["paceline"]):
    from tests.fuzz.blind import HANG_S, ROUND, Row, mutator_of, rss_mb
    from tests.fuzz.corpus import FOLDER
    from tests.fuzz.size import size_of
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutate import LARGEST


class Guided:
    """One target under atheris, for so many inputs."""

    def __init__(self, name: str, inputs: int, seed: int) -> None:
        self._kind = TARGETS[name]
        self._draw = random.Random(f"{name} {seed}")
        self._target = self._kind(self._draw)
        self._mutator = mutator_of(self._kind, self._draw)
        self._inputs = inputs
        self._begun = time.monotonic()
        self.row = Row(f"{name}, guided")

    def feed(self, frame: bytes) -> None:
        row = self.row
        if not row.inputs % ROUND:
            self._end_round()
            self._target.begin()
        row.inputs += 1
        self._target.feed(frame)
        if row.inputs == self._inputs:
            self._end_round()
            row.seconds, row.rss_after_mb = time.monotonic() - self._begun, rss_mb()
            print(row, flush=True)

    def mutate(self, frame: bytes, largest: int, seed: int) -> bytes:
        return (self._mutator.mutated(frame) if seed % 4 else self._mutator.next())[:largest]

    def _end_round(self) -> None:
        row = self.row
        if row.inputs:
            self._target.check()
            row.things = max(row.things, size_of(self._target.machines()))
            assert row.things <= self._kind.largest, f"it remembers {row.things} things"
            row.rss_before_mb = row.rss_before_mb or rss_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    guided = Guided(given.target, given.inputs, given.seed)
    with tempfile.TemporaryDirectory() as found:
        options = [f"-runs={given.inputs}", f"-seed={given.seed}", f"-max_len={LARGEST}", f"-timeout={HANG_S:.0f}"]
        corpus = [found, str(FOLDER / TARGETS[given.target].corpus)]
        atheris.Setup([sys.argv[0], *options, *corpus], guided.feed, custom_mutator=guided.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
