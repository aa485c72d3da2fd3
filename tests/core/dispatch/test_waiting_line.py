"""A line in order: joined anywhere, left from anywhere."""

from __future__ import annotations

from hypothesis import given, strategies as st

from paceline.core.dispatch.queue import COMPACT, SortedQueue


class One:
    def __init__(self, order: tuple[int, int]) -> None:
        self.order = order
        self.waiting = True


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_it_is_a_sorted_list_of_those_that_wait(steps: list[tuple[bool, int]]) -> None:
    line: SortedQueue[One] = SortedQueue(lambda one: one.order)
    there: list[One] = []
    for number, (joins, key) in enumerate(steps):
        if joins or not there:
            there.append(One((key, number)))
            line.join(there[-1])
        else:
            there.pop(key % len(there)).waiting = False
        there.sort(key=lambda one: one.order)
        assert line.first() is (there[0] if there else None)
        assert list(line) == there


def test_those_that_have_left_do_not_gather() -> None:
    line: SortedQueue[One] = SortedQueue(lambda one: one.order)
    for number in range(100 * COMPACT):
        one = One((0, number))
        line.join(one)
        assert line.first() is one
        one.waiting = False
    line.first()
    assert len(line._line) <= 2 * COMPACT
