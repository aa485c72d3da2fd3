"""Lockstep routing: the slowest rank's work grows least, prefills are aligned, and ranks are served no worse by it."""

from __future__ import annotations

import random

import pytest

from paceline.core.load import REQUEST_TOKENS
from paceline.core.routing import LeastRequests, Lockstep
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Query
from paceline.sim.outcome import Outcome
from tests.sim.traces import LOCKSTEP, finished, mixed


def ranks(*loads: tuple[int, int]) -> Candidates:
    return Candidates(Candidate(rank, requests, tokens, 0, 0, 0, 0) for rank, (requests, tokens) in enumerate(loads))


def work(candidate: Candidate) -> int:
    return candidate.prefill_tokens + REQUEST_TOKENS * candidate.requests


def test_the_slowest_ranks_work_grows_least() -> None:
    chance = random.Random(1)
    for _ in range(300):
        candidates = ranks(*((chance.randrange(8), chance.randrange(6_000)) for _ in range(chance.randrange(1, 12))))
        prompt = chance.choice([10, 500, 5_000])
        works = [work(candidate) for candidate in candidates]

        def grown(place: int, works: list[int] = works, prompt: int = prompt) -> int:
            return max(max(works), works[place] + REQUEST_TOKENS + prompt)

        chosen = Lockstep().choose(candidates, Query(prompt))
        assert grown(chosen) == min(map(grown, range(len(candidates))))


def test_where_the_slowest_does_not_grow_the_fewest_requests_decide() -> None:
    # All but the first stay under its 6,256; the last has the least work, but more requests.
    candidates = ranks((1, 6_000), (2, 400), (1, 400), (2, 0))
    assert Lockstep().choose(candidates, Query(100)) == 2
    assert LeastRequests().choose(candidates, Query(100)) == 0


def test_prompt_ahead_counts_by_the_step() -> None:
    assert Lockstep().choose(ranks((1, 9_000), (1, 2_000), (2, 100)), Query(100)) == 2


def test_among_equals_a_rank_that_prefills_already_is_taken() -> None:
    assert Lockstep().choose(ranks((3, 4_000), (2, 0), (2, 300), (2, 0)), Query(100)) == 2
    assert Lockstep(1, 2).choose(ranks((3, 4_000), (2, 0), (2, 300), (2, 0)), Query(100)) == 2
    # With no prefill anywhere there is nothing to align with, and front-ends begin at ranks of their own.
    assert {Lockstep(index, 4).choose(ranks(*[(2, 0)] * 4), Query(100)) for index in range(4)} == {0, 1, 2, 3}


def test_a_prompt_that_fits_under_no_rank_goes_to_the_least_loaded() -> None:
    # 1,012, 1,156, 868 and 1,300 of work: the fewest requests and the fewest tokens are elsewhere.
    assert Lockstep().choose(ranks((2, 500), (1, 900), (3, 100), (0, 1_300)), Query(9_000)) == 2
    assert Lockstep().choose(ranks((2, 500), (1, 600), (3, 100), (4, 0)), Query(9_000)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a_second", "long_share", "sooner"),
    [(1e6, 0.5, 0.99), (1e6, 0.0, 1.01), (110.0, 0.1, 1.01)],
    ids=["backlog-long", "backlog-short", "busy"],
)
def test_it_serves_lockstep_ranks_no_worse_than_least_load(a_second: float, long_share: float, sooner: float) -> None:
    """The whole is done within `sooner` of least-load's time, and first tokens come within 3% of its median."""

    def outcomes(routing: str) -> list[Outcome]:
        traces = [mixed(seed, 1_000, a_second, long_share) for seed in range(3)]
        shared = {"ranks": 8, "lockstep": True, "quota": False, "bind": "arrival", "engine": LOCKSTEP}
        return [finished(trace, routing=routing, **shared).outcome for trace in traces]

    ours, plain = outcomes("lockstep"), outcomes("least-load")
    seconds = [sum(one.duration_s for one in each) / 3 for each in (ours, plain)]
    firsts = [sum(one.ttft_p50_ms for one in each) / 3 for each in (ours, plain)]
    print(
        f"all done {seconds[0]:.2f} s against {seconds[1]:.2f}; first token {firsts[0]:.0f} ms against {firsts[1]:.0f}"
    )
    assert seconds[0] <= sooner * seconds[1]
    assert firsts[0] <= 1.03 * firsts[1]
