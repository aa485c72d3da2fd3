"""Functions of small numbers, computed once for each argument and looked up for whole arrays of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

UNKNOWN = -(2**31)


class Table:
    """A function of one or two numbers, none below 0, to a number.

    `compute(row, column)`: its value, above -2**31. What it raises comes out of the look-up.
    """

    def __init__(self, compute: Callable[[int, int], int]) -> None:
        self._compute = compute
        self._known = np.full((256, 1), UNKNOWN, np.int32)

    def __call__(self, rows: Ints, columns: Ints | int = 0) -> Ints:
        """The values for pairs of numbers; `columns` as long as `rows`, or one for all."""
        if not rows.size:
            return np.zeros(0, np.int64)
        self._make_room(int(rows.max()), int(np.max(columns)))
        width = self._known.shape[1]
        places = rows * width + columns
        found = self._known.reshape(-1).take(places)
        missing = places[found == UNKNOWN]
        if missing.size:
            for place in np.unique(missing).tolist():
                row, column = divmod(place, width)
                self._known[row, column] = self._compute(row, column)
            found = self._known.reshape(-1).take(places)
        return found.astype(np.int64)

    def _make_room(self, row: int, column: int) -> None:
        rows, columns = self._known.shape
        if row >= rows or column >= columns:
            size = (max(rows, _roomy(row)) if row >= rows else rows, _roomy(column) if column >= columns else columns)
            known = np.full(size, UNKNOWN, np.int32)
            known[:rows, :columns] = self._known
            self._known = known


class Fan:
    """A function of one number, none below 0, to any number of rows of `width` numbers. `compute`: these rows."""

    def __init__(self, width: int, compute: Callable[[int], Sequence[Sequence[int]]]) -> None:
        self._compute = compute
        self._rows: Ints = np.zeros((256, width), np.int64)
        self._used = 0
        self._first: Ints = np.zeros(256, np.int64)
        self._count: Ints = np.full(256, UNKNOWN, np.int64)

    def __call__(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Of all the numbers' rows: each row's place in `numbers`, and the rows."""
        if not numbers.size:
            return np.zeros(0, np.int64), self._rows[:0]
        highest = int(numbers.max())
        if highest >= self._count.size:
            more = _roomy(highest) - self._count.size
            self._first = np.concatenate((self._first, np.zeros(more, np.int64)))
            self._count = np.concatenate((self._count, np.full(more, UNKNOWN, np.int64)))
        for number in np.unique(numbers[self._count[numbers] == UNKNOWN]).tolist():
            self._learn(number)
        counts = self._count[numbers]
        places = np.repeat(np.arange(numbers.size), counts)
        before = np.cumsum(counts) - counts
        rows = np.repeat(self._first[numbers] - before, counts) + np.arange(places.size)
        return places, self._rows[rows]

    def _learn(self, number: int) -> None:
        rows = self._compute(number)
        end = self._used + len(rows)
        if end > len(self._rows):
            more = _roomy(end) - len(self._rows)
            self._rows = np.concatenate((self._rows, np.zeros((more, self._rows.shape[1]), np.int64)))
        if rows:
            self._rows[self._used : end] = rows
        self._first[number], self._count[number] = self._used, len(rows)
        self._used = end


def _roomy(index: int) -> int:
    """A power of two above the index."""
    return 1 << int(index).bit_length()
