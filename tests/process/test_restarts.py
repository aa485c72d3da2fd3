"""When a process that has ended is started again."""

from __future__ import annotations

from paceline.process.supervisor import LONGEST_WAIT_S, STEADY_S, Restarts


def test_the_first_restart_is_at_once_and_the_others_ever_later() -> None:
    restarts = Restarts(None)
    waits = [restarts.ended(1.0) for _ in range(12)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits[-1] == LONGEST_WAIT_S


def test_the_limit_counts_restarts_in_a_row() -> None:
    restarts = Restarts(2)
    assert [restarts.ended(0.0) for _ in range(3)] == [0.0, 0.5, None]
    assert restarts.ended(STEADY_S - 1) is None


def test_a_life_that_served_begins_the_count_anew() -> None:
    restarts = Restarts(2)
    for _ in range(10):
        assert restarts.ended(STEADY_S) == 0.0
    assert [restarts.ended(1.0) for _ in range(2)] == [0.5, None]


def test_no_restarts_at_all() -> None:
    assert Restarts(0).ended(STEADY_S) is None
