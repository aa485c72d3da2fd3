"""The quota in the simulator is the production one: the same integers, the same moments."""

from __future__ import annotations

import pytest

from paceline.core.rank import prefill_quota as quota
from paceline.simulate.traffic.prefill_quota import CommonQuota, PrefillQuota
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.trace import Arrival
from tests.simulate.traffic.deployments import drawn, finished
from tests.simulate.traffic.test_engine import sequence


def ranks(*prompts: list[int]) -> list[SimulatedRank]:
    """Ranks with these prompts to compute, and a request each that writes its answer."""
    made = []
    for number, tokens in enumerate(prompts):
        rank = SimulatedRank(number, finished([Arrival(0.0, 1, 1)]).deployment.engine)
        rank.engine.add(sequence(100, 10, 50))
        rank.engine.begin()
        rank.engine.end()
        for place, prompt in enumerate(tokens):
            rank.engine.add(sequence(place, prompt, 5))
        made.append(rank)
    return made


@pytest.mark.parametrize("prompts", [([], [], []), ([3000], [], []), ([100, 400], [700], [5000, 9])])
def test_the_integers_are_those_that_ranks_put_in(prompts: tuple[list[int], ...]) -> None:
    there = ranks(*prompts)
    shape = there[0].engine.shape
    parts = [
        quota.Part(
            shape.budget, sum(prompts[rank.number]), rank.engine.decoding,
            quota.places(shape.slots, rank.engine.decoding, rank.engine.kv_used, shape.kv_tokens),
            round(6e6 + 20e3), round(90e3),
        ).packed()
        for rank in there
    ]  # fmt: skip
    expected = quota.reduced(parts)
    found = CommonQuota()._reduced(there, [rank.number for rank in there])
    # What is beyond the budget is not told apart, and never asked for.
    known = [place for place, x in enumerate(quota.CANDIDATES[1:]) if x <= shape.budget]
    begin = len(expected) - len(quota.CANDIDATES) + 1
    assert found[:begin] == expected[:begin]
    assert [found[begin + place] for place in known] == [expected[begin + place] for place in known]
    assert quota.decide(found) == quota.decide(expected)


def test_without_a_prompt_nothing_is_agreed_between_two_agreements() -> None:
    there = ranks([], [])
    common = CommonQuota()
    assert common.tokens(there, ()) is None
    common.agree(there, (), regular=True)
    first = common.tokens(there, ())
    there[0].engine.add(sequence(1, 3000, 5))
    # It has more than a newcomer may compute: it asks for an agreement after this step.
    assert common.tokens(there, [0]) == first
    common.agree(there, [0], regular=False)
    assert common._outcome.pending
    common.begin()
    assert common.tokens(there, [0]) is None


def test_a_lone_long_prompt_does_not_stop_those_that_write() -> None:
    arrivals = [Arrival(0.0, 20, 400) for _ in range(120)] + [Arrival(0.5, 20_000, 2)]
    free = finished(arrivals, ranks=4, routing="round-robin", lockstep=True, quota=False).outcome
    bound = finished(arrivals, ranks=4, routing="round-robin", lockstep=True).outcome
    assert bound.tpot_p50_ms < free.tpot_p50_ms * 0.9


def test_peers_have_none() -> None:
    arrivals = drawn(20, 10.0)
    for routing in ("vllm-0.32", "bf-io"):
        assert type(finished(arrivals, lockstep=True, routing=routing)._quota()) is PrefillQuota


def test_memory_counts_as_places() -> None:
    assert quota.places(64, 0, 0, 1000) == 64
    assert quota.places(64, 10, 1000, 1000) == 10
    assert quota.places(64, 10, 500, 1000) == 20
    assert quota.places(64, 10, 10, 1000) == 64
    assert quota.places(64, 70, 2000, 1000) == 64
    assert quota.places(64, 10, 10, 0) == 64
