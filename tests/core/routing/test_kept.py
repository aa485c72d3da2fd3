"""Kept orders choose what looking at every rank would choose, whatever changes between two choices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.routing import LeastLoad, LeastRequests
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Query
from tests.core import routing_reference as reference
from tests.pace import examples

PAIRS = [(LeastLoad, reference.LeastLoad), (LeastRequests, reference.LeastRequests)]


def drawn(chance: random.Random, rank: int, spread: int) -> Candidate:
    """A rank with a load drawn from a narrow or a wide range: with many equal ones, or with none."""
    return Candidate(
        rank, chance.randrange(spread), chance.randrange(spread * 300), chance.randrange(spread),
        chance.randrange(3), chance.randrange(2) * chance.randrange(spread * 20), chance.randrange(4),
    )  # fmt: skip


def copy_into(candidate: Candidate, other: Candidate) -> None:
    for name in candidate.__struct_fields__:
        setattr(candidate, name, getattr(other, name))


def change(chance: random.Random, candidates: Candidates, spread: int) -> None:
    """One thing that happens between two choices: some or all ranks say something else, one comes, one goes."""
    match chance.randrange(8):
        case 0:
            if len(candidates) > 1:
                candidates.remove(chance.choice(candidates.ranks))
        case 1:
            rank = chance.randrange(200)
            if candidates.place(rank) is None:
                candidates.add(drawn(chance, rank, spread))
        case 2:
            for candidate in list(candidates):
                copy_into(candidate, drawn(chance, candidate.rank, spread))
                candidates.changed(candidate.rank)
            candidates.settle()
        case _:
            for _ in range(chance.randrange(4)):
                candidate = candidates[chance.randrange(len(candidates))]
                copy_into(candidate, drawn(chance, candidate.rank, spread))
                candidates.changed(candidate.rank)


@pytest.mark.parametrize(("kept", "plain"), PAIRS, ids=["least-load", "least-requests"])
@settings(max_examples=examples(150))
@given(
    st.integers(0, 2**32), st.sampled_from([1, 2, 5, 40, 130]), st.sampled_from([1, 3, 30, 10_000]),
    st.sampled_from([(0, 1), (1, 2), (3, 4), (7, 8)]),
)  # fmt: skip
def test_choices_are_those_of_the_reference(
    kept: type, plain: type, seed: int, size: int, spread: int, frontend: tuple[int, int]
) -> None:
    chance = random.Random(seed)
    candidates = Candidates(drawn(chance, rank, spread) for rank in chance.sample(range(200), size))
    policy, other = kept(*frontend), plain(*frontend)
    for _ in range(25):
        tokens = chance.choice([1, 64, 5_000])
        assert policy.choose(candidates, Query(tokens)) == other.choose(list(candidates), tokens)
        change(chance, candidates, spread)


def test_an_ordering_follows_every_change() -> None:
    chance = random.Random(5)
    candidates = Candidates(drawn(chance, rank, 10) for rank in range(64))

    def key(candidate: Candidate) -> int:
        return candidate.requests

    for _ in range(300):
        change(chance, candidates, 10)
        ordering = candidates.ordering(key)
        assert ordering.keys == [candidate.requests for candidate in candidates]
        expected = sorted((candidate.requests, place) for place, candidate in enumerate(candidates))
        assert [(entry >> 16, entry & 0xFFFF) for entry in ordering.entries] == expected
        assert ordering.total == sum(ordering.keys)
        assert (ordering.least(), ordering.most()) == (min(ordering.keys), max(ordering.keys))
        assert candidates.ranks == sorted(candidate.rank for candidate in candidates)
        assert candidates.finished == sum(candidate.finished for candidate in candidates)


def test_where_no_candidate_is_within_the_limit_it_is_said() -> None:
    candidates = Candidates([Candidate(0, 1, 1, 1, 0, 0, 0)])
    ordering = candidates.ordering(lambda candidate: candidate.requests)
    with pytest.raises(ValueError, match="within the limit"):
        ordering.first(0, ordering.keys, 0)
