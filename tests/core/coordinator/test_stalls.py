"""Who holds the group up, out of whom each rank waits for."""

from __future__ import annotations

import pytest

from paceline.core.coordinator.epoch import Stalls, describe
from paceline.core.messages import StallReport


def waits(rank: int, *ranks: int, seconds: float = 2.0) -> StallReport:
    return StallReport(rank, 10 + rank, 18, list(ranks), 7, "all_reduce", seconds)


@pytest.mark.parametrize(
    ("reports", "culprits"),
    [
        ([], []),
        # Through the first member: it alone knows who is late, the others know only it.
        ([waits(1, 0), waits(3, 0), waits(0, 2)], [2]),
        ([waits(0, 1, 2), waits(3, 0)], [1, 2]),
        ([waits(1, 0), waits(2, 0)], [0]),
        # Not of one moment: everybody waits for somebody, and all who are named are shown.
        ([waits(0, 1), waits(1, 0)], [0, 1]),
    ],
)
def test_the_culprits_are_those_who_wait_for_nobody(reports: list[StallReport], culprits: list[int]) -> None:
    stalls = Stalls()
    for report in reports:
        stalls.report(report)
    assert [stall.rank for stall in stalls.found] == culprits


def test_only_other_names_are_news() -> None:
    stalls = Stalls()
    assert stalls.report(waits(0, 2))
    assert not stalls.report(waits(0, 2, seconds=4.0))
    assert not stalls.report(waits(1, 2))
    assert stalls.report(waits(0, 1, 2)) is False
    assert not stalls.report(waits(0))
    assert stalls.report(waits(1))
    assert stalls.found == []


def test_who_is_gone_waits_no_more() -> None:
    stalls = Stalls()
    stalls.report(waits(0, 2))
    assert stalls.forget(0)
    assert not stalls.forget(0)


def test_it_says_which_rank_step_and_collective_for_how_long_and_who_waits() -> None:
    stalls = Stalls()
    stalls.report(waits(0, 2, seconds=3.0))
    stalls.report(waits(1, 2, seconds=2.5))
    (stall,) = stalls.found
    assert describe(stall) == "rank 2 holds the group up: all_reduce 7 in step 18, for 3.0 s; waiting: rank 0, 1"
