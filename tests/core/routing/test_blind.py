"""Power of two: the less loaded of two drawn ranks, the same draws in every run."""

from __future__ import annotations

from collections import Counter

import pytest

from paceline.core.routing import PowerOfTwo, RoundRobin
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Query


def idle(size: int) -> Candidates:
    return Candidates(Candidate(rank, 0, 0, 0, 0, 0, 0) for rank in range(size))


def test_draws_are_repeated_by_the_same_frontend_and_not_by_another() -> None:
    first, again, other = ([policy.choose(idle(16), Query(1)) for _ in range(50)]
                           for policy in (PowerOfTwo(1, 4), PowerOfTwo(1, 4), PowerOfTwo(2, 4)))  # fmt: skip
    assert first == again
    assert first != other
    assert len(set(first)) > 10


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_different_ranks_are_drawn(size: int) -> None:
    # The most loaded one is never the better of two, and with two ranks the other one always is.
    candidates = idle(size)
    candidates[0].requests = 5
    policy = PowerOfTwo()
    chosen = {policy.choose(candidates, Query(1)) for _ in range(200)}
    assert chosen == ({0} if size == 1 else set(range(1, size)))


def test_it_is_more_level_than_one_draw_would_be() -> None:
    candidates, policy, loads = idle(32), PowerOfTwo(), Counter[int]()
    for _ in range(3200):
        rank = policy.choose(candidates, Query(1))
        candidates[rank].requests += 1
        loads[rank] += 1
    # One draw a request leaves a rank 20 to 30 above the mean of 100.
    assert max(loads.values()) <= 105


def test_what_the_other_frontends_have_most_likely_sent_counts() -> None:
    candidates = idle(2)
    candidates[0].requests, candidates[1].requests, candidates[1].since_view_requests = 3, 2, 2
    assert {PowerOfTwo(0, 1).choose(candidates, Query(1)) for _ in range(20)} == {1}
    assert {PowerOfTwo(0, 4).choose(candidates, Query(1)) for _ in range(20)} == {0}


def test_round_robin_goes_on_as_ranks_come_and_go() -> None:
    candidates, policy = idle(3), RoundRobin()
    assert [policy.choose(candidates, Query(1)) for _ in range(4)] == [0, 1, 2, 0]
    candidates.remove(1)
    assert {policy.choose(candidates, Query(1)) for _ in range(2)} == {0, 2}
