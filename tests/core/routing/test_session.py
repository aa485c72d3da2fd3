"""Sessions keep their rank, whoever asks; as a rank comes or goes only its own share moves."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from paceline.core.routing import LeastLoad, Session
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import GUARD_TOKENS, Query
from paceline.core.routing.session import POINTS, points_of, probes_of
from tests.pace import examples

KEYS = [f"user-{number}" for number in range(examples(10_000))]


def idle(*ranks: int) -> Candidates:
    return Candidates(Candidate(rank, 0, 0, 0, 0, 0, 0) for rank in ranks)


def homes(policy: Session, candidates: Candidates) -> dict[str, int]:
    return {key: policy.choose(candidates, Query(10, session=key)) for key in KEYS}


def load(candidates: Candidates, rank: int, tokens: int) -> None:
    place = candidates.place(rank)
    assert place is not None
    candidates[place].prefill_tokens = tokens
    candidates.changed(rank)


UNEVEN = 0.05
"""By so much a rank's share of the circle may be larger than the mean one."""


def most(share: float) -> float:
    """What a share of KEYS stays below: five standard deviations of a draw above its mean."""
    share *= 1 + UNEVEN
    return len(KEYS) * share + 5 * math.sqrt(len(KEYS) * share * (1 - share))


@pytest.mark.parametrize("size", [4, 64])
def test_one_in_n_of_the_sessions_moves_with_a_rank(size: int) -> None:
    policy, candidates = Session(), idle(*range(size))
    before = homes(policy, candidates)
    shares = Counter(before.values())
    assert len(shares) == size
    assert max(shares.values()) <= most(1 / size)

    candidates.remove(1)
    without = homes(policy, candidates)
    moved = {key for key in KEYS if without[key] != before[key]}
    assert moved == {key for key in KEYS if before[key] == 1}
    assert len({without[key] for key in moved}) > min(size, 16) // 2
    assert max(Counter(without.values()).values()) <= most(1 / (size - 1))

    candidates.add(Candidate(1, 0, 0, 0, 0, 0, 0))
    assert homes(policy, candidates) == before


@pytest.mark.parametrize("joining", [64, 900])
def test_a_rank_that_joins_takes_its_share_and_nothing_else_moves(joining: int) -> None:
    policy, candidates = Session(), idle(*range(64))
    before = homes(policy, candidates)
    candidates.add(Candidate(joining, 0, 0, 0, 0, 0, 0))
    after = homes(policy, candidates)
    moved = {key for key in KEYS if after[key] != before[key]}
    assert {after[key] for key in moved} == {joining}
    assert len(moved) <= most(1 / 65)
    assert max(Counter(after.values()).values()) <= most(1 / 65)


def test_the_mean_share_that_moves_is_one_in_n() -> None:
    # Each rank's leaving moves its own sessions and nobody else's, so the shares of all make one whole.
    size, policy = 8, Session()
    candidates = idle(*range(size))
    before, moved = homes(policy, candidates), 0
    for rank in range(size):
        candidates.remove(rank)
        after = homes(policy, candidates)
        moved += sum(after[key] != before[key] for key in KEYS)
        candidates.add(Candidate(rank, 0, 0, 0, 0, 0, 0))
    assert moved == len(KEYS)


def test_frontends_agree_whatever_they_saw_before() -> None:
    late = Session(3, 4)
    candidates = idle(5, 7)
    late.choose(candidates, Query(1, session="a"))
    for rank in (1, 2, 3):
        candidates.add(Candidate(rank, 0, 0, 0, 0, 0, 0))
        late.choose(candidates, Query(1, session="a"))
    candidates.remove(7)
    assert homes(late, candidates) == homes(Session(0, 4), idle(1, 2, 3, 5))


def test_many_ranks_may_go_at_once() -> None:
    policy, candidates = Session(), idle(*range(40))
    homes(policy, candidates)
    for rank in range(30):
        candidates.remove(rank)
    assert homes(policy, candidates) == homes(Session(), idle(*range(30, 40)))


def test_a_session_has_two_ranks_that_are_there_however_many_have_gone() -> None:
    policy, candidates = Session(), idle(*range(8))
    homes(policy, candidates)
    for rank in (0, 2, 3, 5, 7):
        candidates.remove(rank)
    homes(policy, candidates)
    assert all(len(set(policy.homes(key)) & {1, 4, 6}) == 2 for key in KEYS[:500])


def test_an_overloaded_rank_is_passed_over_for_the_next_of_the_session() -> None:
    policy, candidates = Session(), idle(*range(8))
    first, second = policy.choose(candidates, Query(1, session="a")), list(policy.homes("a"))[1]
    assert policy.reason() == "the session's rank"
    load(candidates, first, GUARD_TOKENS)
    assert policy.choose(candidates, Query(1, session="a")) == first
    load(candidates, first, 2 * GUARD_TOKENS)
    assert policy.choose(candidates, Query(1, session="a")) == second
    assert policy.reason() == "the session's next rank"
    load(candidates, second, 2 * GUARD_TOKENS)
    assert policy.choose(candidates, Query(1, session="a")) not in {first, second}
    assert policy.reason() == "the session's ranks are overloaded"
    load(candidates, first, 0)
    assert policy.choose(candidates, Query(1, session="a")) == first


def test_in_a_busy_deployment_loads_may_differ_by_a_share_of_the_mean() -> None:
    policy, candidates = Session(), idle(*range(4))
    home = policy.choose(candidates, Query(1, session="a"))
    for rank in range(4):
        load(candidates, rank, 100_000)
    load(candidates, home, 145_000)
    assert policy.choose(candidates, Query(1, session="a")) == home
    load(candidates, home, 190_000)
    assert policy.choose(candidates, Query(1, session="a")) != home


def test_without_a_key_it_is_least_load() -> None:
    candidates = idle(*range(6))
    for rank, tokens in enumerate((900, 9_000, 0, 4_000, 9_000, 9_000)):
        load(candidates, rank, tokens)
    assert Session().choose(candidates, Query(64)) == LeastLoad().choose(candidates, Query(64)) == 2


@pytest.mark.parametrize("key", ["", "\x00", "\ud800", "x" * 100_000, "ü"])
def test_any_key_has_a_rank(key: str) -> None:
    assert Session().choose(idle(0), Query(1, session=key)) == 0
    assert Session().choose(idle(3, 65_535), Query(1, session=key)) in {3, 65_535}


def test_points_are_different_ones() -> None:
    points = [point for rank in range(64) for point in points_of(rank)]
    assert len(points) == 64 * POINTS == len(set(points))


def test_a_key_belongs_to_the_rank_whose_point_is_closest_after_one_of_its_probes() -> None:
    policy, candidates = Session(), idle(*range(5))
    owners = {point: rank for rank in range(5) for point in points_of(rank)}
    for key in KEYS[:200]:
        by_distance = sorted((point - probe) % 1.0 for probe in probes_of(key) for point in owners)
        closest = {
            owners[point] for probe in probes_of(key) for point in owners if (point - probe) % 1.0 == by_distance[0]
        }
        assert {policy.choose(candidates, Query(1, session=key))} == closest
