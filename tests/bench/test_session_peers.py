"""Other systems' rules for sessions, on cases made by hand; and the bound, which nothing serves faster than."""

from __future__ import annotations

import pytest
from bench.replay import replay_of
from bench.session_peers import (
    SESSION_CLIENTS,
    CacheAware,
    ConsistentHash,
    DynamoKv,
    LlmdScorers,
    LlmdSticky,
    OfPrefixes,
    PrefixAffinity,
    SessionHash,
    VllmCacheAware,
)
from bench.sessions import BOUND, OURS, ROUTINGS, Row, bound, report, serve, table

from paceline.sim.engine import EngineShape, MemoryEngine, Sequence
from paceline.sim.replay import Setup
from paceline.sim.trace import Session, Sessions

SHAPE = EngineShape(kv_tokens=1 << 20, block_tokens=128)
SESSIONS = [
    Session(
        [(0.0, 4000, 40, 0), *((1.0, 4000 + 200 * turn, 40, 3900 + 200 * turn) for turn in range(1, 8))], 1000, name
    )
    for name in "abcdef"
]


def made(kind: type[OfPrefixes], ranks: int = 3) -> OfPrefixes:
    client = kind(0, 1, ranks)
    client.engines([MemoryEngine(SHAPE, lambda request: turn(1)) for _ in range(ranks)])
    return client


def turn(number: int, session: int = 1, blocks: int = 10, first: int = 0) -> Sequence:
    return Sequence(number, 128 * blocks, 5, range(first, first + blocks), session)


@pytest.mark.parametrize("kind", [SessionHash, ConsistentHash, PrefixAffinity])
def test_a_session_stays_and_sessions_spread(kind: type[SessionHash]) -> None:
    client = kind(0, 1, 8)
    ranks = [client.choose(turn(1, session)) for session in range(1, 200)]
    assert ranks == [client.choose(turn(1, session)) for session in range(1, 200)]
    assert set(ranks) == set(range(8))


def test_the_guard_of_affinity_passes_an_overloaded_rank_over() -> None:
    client = PrefixAffinity(0, 1, 4)
    rank = client.choose(turn(1))
    client.in_flight[rank] = 20
    assert client.choose(turn(1)) != rank


@pytest.mark.parametrize("kind", [CacheAware, VllmCacheAware, LlmdScorers, LlmdSticky])
def test_a_prompt_goes_where_most_of_it_was_sent(kind: type[OfPrefixes]) -> None:
    client = made(kind)
    homes = [client.choose(turn(number, first=100 * number)) for number in (1, 2, 3)]
    assert [client.choose(turn(9, blocks=12, first=100 * number)) for number in (1, 2, 3)] == homes


def test_cache_aware_turns_to_load_where_requests_are_far_apart() -> None:
    client = made(CacheAware)
    home = client.choose(turn(1))
    client.in_flight[home] = 65
    assert client.choose(turn(2)) != home


def test_sticky_is_so_until_saturated_and_again_when_its_first_tokens_have_come() -> None:
    client = made(LlmdSticky)
    home = client.choose(turn(1, blocks=200))
    assert client.choose(turn(2, blocks=150)) != home
    client.heard(1, False)
    client.heard(2, False)
    assert client.choose(turn(3, blocks=200)) == home


def test_dynamo_counts_what_is_to_be_computed_and_what_is_there() -> None:
    client = made(DynamoKv)
    assert isinstance(client, DynamoKv)
    ranks = [client.choose(turn(number)) for number in (1, 2, 3)]
    assert sorted(ranks) == [0, 1, 2]
    client.heard(2, True)
    assert client.choose(turn(4)) == ranks[1]


@pytest.mark.parametrize("routing", [*SESSION_CLIENTS, *ROUTINGS.values()])
def test_every_turn_is_served(routing: str) -> None:
    load = Sessions(SESSIONS, SHAPE.kv_tokens, 4, None, 1, 40)
    outcome = replay_of(Setup(2, 2, routing=routing, engine=SHAPE), load).run()
    assert outcome.requests == 40
    assert outcome.prefix_hit_rate > 0.2


def test_nothing_is_faster_than_the_bound_and_the_report_says_how_much() -> None:
    row = Row(8, 1, 4)
    served = [serve(SESSIONS, row, seed, by) for seed in (1, 2) for by in (BOUND, *ROUTINGS)]
    limits = {one.seed: one for one in served if one.by == BOUND}
    for one in served:
        limit = limits[one.seed]
        assert one.turns_per_s <= limit.turns_per_s * 1.001
        assert one.ttft_p50_ms >= limit.ttft_p50_ms
        assert one.hit_rate <= limit.hit_rate + 1e-9
    lines = "\n".join(table(row, served))
    assert f"| {OURS} | " in lines
    assert "2 orders" in lines
    assert report(served).count("###") == 1


def test_the_bound_serves_turns_in_the_order_in_which_they_come() -> None:
    found = bound(Sessions([Session([(5.0, 2048, 1, 0)], 0)], 1 << 20, 2, None, 1, 2), Row(1, 1, 2), 1)
    assert found.ttft_p50_ms == pytest.approx(6 + 0.09 * 2048)
    assert found.turns_per_s == pytest.approx(2 / (5 + 0.19032), rel=1e-3)
