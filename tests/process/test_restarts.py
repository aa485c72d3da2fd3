"""When a process that has ended is started again."""

from __future__ import annotations

from paceline.process.restarts import LONGEST_WAIT_S, STEADY_S, Restarts

NOW = 100.0


def wait_s(restarts: Restarts, served_s: float) -> float | None:
    """It has ended: after how long it is started again."""
    due = restarts.ended(served_s, NOW)
    return None if due is None else due - NOW


def test_the_first_restart_is_at_once_and_the_others_ever_later() -> None:
    restarts = Restarts()
    waits = [wait_s(restarts, 1.0) for _ in range(2000)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits[-1] == LONGEST_WAIT_S


def test_the_limit_counts_restarts_in_a_row() -> None:
    restarts = Restarts(2)
    assert [wait_s(restarts, 0.0) for _ in range(3)] == [0.0, 0.5, None]
    assert wait_s(restarts, STEADY_S - 1) is None


def test_a_life_that_served_begins_the_count_anew() -> None:
    restarts = Restarts(2)
    for _ in range(10):
        assert wait_s(restarts, STEADY_S) == 0.0
    assert [wait_s(restarts, 1.0) for _ in range(2)] == [0.5, None]


def test_no_restarts_at_all() -> None:
    assert wait_s(Restarts(0), STEADY_S) is None


def test_the_waits_are_what_is_asked_for() -> None:
    restarts = Restarts(first_s=0.25, longest_s=1.0, steady_s=5.0)
    assert [wait_s(restarts, 4.0) for _ in range(5)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert wait_s(restarts, 5.0) == 0.0
