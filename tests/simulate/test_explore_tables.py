"""Look-ups of arrays, and states found again."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.simulate.explore_seen import Index, Rows, fingerprints
from paceline.simulate.explore_tables import Fan, Table


def test_a_value_is_computed_once_for_each_argument() -> None:
    asked: list[tuple[int, int]] = []

    def compute(row: int, column: int) -> int:
        asked.append((row, column))
        return 10 * row - column

    table = Table(compute)
    rows, columns = np.array([3, 700, 3, 0]), np.array([1, 40, 1, 0])
    for _ in range(2):
        assert table(rows, columns).tolist() == [29, 6960, 29, 0]
    assert table(rows, 1).tolist() == [29, 6999, 29, -1]
    assert sorted(asked) == [(0, 0), (0, 1), (3, 1), (700, 1), (700, 40)]
    assert table(rows[:0]).size == 0


def test_what_a_computation_raises_comes_out_and_is_no_value() -> None:
    def compute(row: int, _: int) -> int:
        if row == 2:
            raise ValueError("two")
        return row

    table = Table(compute)
    for _ in range(2):
        with pytest.raises(ValueError, match="two"):
            table(np.array([1, 2]))
    assert table(np.array([1])).tolist() == [1]


def test_a_fan_has_any_number_of_rows() -> None:
    fan = Fan(2, lambda number: [(number, place) for place in range(number % 3)])
    numbers = np.array([2, 0, 401, 400, 2])
    places, rows = fan(numbers)
    assert places.tolist() == [0, 0, 2, 2, 3, 4, 4]
    assert rows.tolist() == [[2, 0], [2, 1], [401, 0], [401, 1], [400, 0], [2, 0], [2, 1]]
    assert fan(numbers[:0])[0].size == 0


def test_rows_come_back_as_columns() -> None:
    rows = Rows(3)
    for begin in range(0, 3000, 500):
        rows.add(np.arange(begin * 3, (begin + 500) * 3).reshape(500, 3).T)
    assert len(rows) == 3000
    assert rows[np.array([0, 2999])].T.tolist() == [[0, 1, 2], [8997, 8998, 8999]]
    assert rows[1:3].T.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_an_index_finds_what_was_put_last() -> None:
    index, known = Index(), dict[int, int]()
    random = np.random.default_rng(5)
    for number in range(60):
        prints = np.unique(random.integers(0, 5000, 1 + number * 3).astype(np.uint64))
        numbers = np.arange(prints.size) + number * 1000
        index.put(prints, numbers)
        known.update(zip(prints.tolist(), numbers.tolist(), strict=True))
    assert index.find(np.arange(5001, dtype=np.uint64)).tolist() == [known.get(one, -1) for one in range(5001)]


def test_states_that_differ_have_other_fingerprints() -> None:
    states = np.stack(np.meshgrid(*[np.arange(12)] * 4)).reshape(4, -1)
    assert np.unique(fingerprints(states)).size == states.shape[1]
