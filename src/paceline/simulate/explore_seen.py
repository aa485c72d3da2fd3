"""The states met, as arrays: found again by a fingerprint, and compared whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.simulate.explore_tables import Ints

Prints = NDArray[np.uint64]

FACTOR = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(29)


def fingerprints(states: Ints) -> Prints:
    """A number for each column."""
    mixed = np.zeros(states.shape[1], np.uint64)
    for component in states:
        mixed = (mixed ^ component.astype(np.uint64)) * FACTOR
        mixed ^= mixed >> SHIFT
    return mixed * FACTOR


class Rows:
    """Columns of states by number, in the order in which they were added."""

    def __init__(self, height: int) -> None:
        self._rows = np.zeros((1024, height), np.int32)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, numbers: Ints | slice) -> Ints:
        return np.ascontiguousarray(self._rows[: self._used][numbers].T, dtype=np.int64)

    def add(self, columns: Ints) -> None:
        """Append them."""
        end = self._used + columns.shape[1]
        if end > len(self._rows):
            rows = np.zeros((max(end, 2 * len(self._rows)), self._rows.shape[1]), np.int32)
            rows[: self._used] = self._rows[: self._used]
            self._rows = rows
        self._rows[self._used : end] = columns.T
        self._used = end


class Index:
    """From fingerprint to number, as sorted runs; a run is merged into the one before where that is not much longer."""

    def __init__(self) -> None:
        self._runs: list[tuple[Prints, NDArray[np.uint32]]] = []

    def find(self, prints: Prints) -> Ints:
        """The numbers, -1 where there is none. `prints`: ascending."""
        found = np.full(prints.size, -1, np.int64)
        for run, numbers in self._runs:
            places = np.minimum(np.searchsorted(run, prints), run.size - 1)
            hit = run[places] == prints
            found[hit] = numbers[places[hit]]
        return found

    def put(self, prints: Prints, numbers: Ints) -> None:
        """Add these, ascending and each once; a number of the same fingerprint from before is replaced."""
        new = np.ones(prints.size, bool)
        for run, known in self._runs:
            places = np.minimum(np.searchsorted(run, prints), run.size - 1)
            hit = run[places] == prints
            known[places[hit]] = numbers[hit]
            new &= ~hit
        if not new.any():
            return
        self._runs.append((prints[new], numbers[new].astype(np.uint32)))
        while len(self._runs) > 1 and self._runs[-2][0].size < 4 * self._runs[-1][0].size:
            (before, old), (after, young) = self._runs[-2:]
            merged = np.concatenate((before, after))
            # Two ascending runs, which a stable sort only merges.
            order = np.argsort(merged, kind="stable")
            self._runs[-2:] = [(merged[order], np.concatenate((old, young))[order])]
