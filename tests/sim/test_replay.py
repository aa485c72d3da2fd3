"""Whole traces: nothing is lost, the same seed is the same run, and many steps at once are as many single ones."""

from __future__ import annotations

from typing import Any

import pytest
from bench.peers import CLIENTS, QUEUES
from msgspec.structs import asdict

from paceline.core.blocks import BLOCK_TOKENS as NAMED
from paceline.core.routing import POLICIES
from paceline.errors import ConfigError
from paceline.sim.engine import BLOCK_TOKENS, EngineShape, MemoryEngine
from paceline.sim.processes import Planned
from paceline.sim.replay import Replay, Setup, prompt_of
from paceline.sim.trace import Arrival
from tests.sim.traces import Done, drawn, finished, sequence

OURS = [name for name in POLICIES if name != "session"]
ROUTINGS = [*OURS, *CLIENTS, "oracle"]


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_ends_and_tokens_add_up(routing: str, lockstep: bool) -> None:
    arrivals = drawn(150, 40.0, shared=True)
    done = finished(arrivals, ranks=4, frontends=3, routing=routing, lockstep=lockstep, slots=16, kv_tokens=20_000)
    outcome = done.outcome
    assert (outcome.requests, outcome.refused) == (150, 0)
    assert outcome.output_tokens == sum(one.answer_tokens for one in arrivals)
    for number, answer in done.answers.items():
        assert answer.asked < answer.first <= answer.ended
        assert answer.tokens == done.run.sequences[number - 1].made == arrivals[number - 1].answer_tokens
        assert 0 <= answer.rank < 4
    assert all(engine.kv_used == 0 and engine.kv_peak <= 20_000 for engine in done.run.engines)
    assert outcome.throughput_tokens_per_s * outcome.duration_s == pytest.approx(outcome.output_tokens)
    assert (outcome.barrier_share > 0) == lockstep


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("routing", ["least-load", "vllm-0.32", "oracle"])
def test_the_same_seed_is_the_same_run(routing: str, lockstep: bool) -> None:
    arrivals = drawn(120, 60.0)
    settings: dict[str, Any] = {"ranks": 4, "frontends": 4, "routing": routing, "lockstep": lockstep}
    one, two = (asdict(finished(arrivals, seed=5, **settings).outcome) for _ in range(2))
    other = asdict(finished(arrivals, seed=6, **settings).outcome)
    for figures in (one, two, other):
        del figures["real_s"]
    assert one == two
    assert (one == other) == (routing == "oracle")


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    plan, dummy = MemoryEngine.plan, MemoryEngine.plan_dummy
    patch.setattr(MemoryEngine, "plan", lambda self, quota=None: Planned(plan(self, quota).step_s))
    patch.setattr(MemoryEngine, "plan_dummy", lambda self: Planned(dummy(self).step_s))


def times(done: Done) -> list[float]:
    return [when for answer in done.answers.values() for when in (answer.first, answer.ended)]


@pytest.mark.slow
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("routing", ["round-robin", "sglang-total-tokens", "least-load"])
def test_many_steps_at_once_are_as_many_single_ones(
    routing: str, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"ranks": 3, "frontends": 2, "routing": routing, "lockstep": lockstep, "slots": 24}
    arrivals = drawn(100, 12.0)
    many = finished(arrivals, **settings)
    one_by_one(monkeypatch)
    single = finished(arrivals, **settings)
    assert many.run.world.journal.events < single.run.world.journal.events * (0.8 if lockstep else 0.3)
    if routing == "round-robin" and not lockstep:
        assert times(many) == pytest.approx(times(single), abs=1e-6)
        assert many.outcome.steps == single.outcome.steps
    else:
        # Ranks report their memory less often, and in lockstep agree on what they have reported by then.
        assert sum(times(many)) == pytest.approx(sum(times(single)), rel=0.02)


def test_one_request_takes_what_its_steps_cost() -> None:
    done = finished([Arrival(0.0, 3000, 11)], ranks=2, routing="oracle")
    # Two steps for the prompt, 2,048 tokens and 952; with the second comes the first token; then ten steps of one.
    (first,), answer = done.firsts(), done.answers[1]
    assert first == pytest.approx((6 + 2048 * 0.09 + 6 + 952 * 0.09 + 0.02) / 1e3, abs=1e-4)
    assert answer.ended - answer.first == pytest.approx(10 * 6.02 / 1e3)


def test_lockstep_ranks_wait_for_the_slowest() -> None:
    arrivals = [Arrival(0.0, 2048, 2), Arrival(0.0, 1, 2)]
    done = finished(arrivals, ranks=2, routing="oracle", lockstep=True)
    assert done.ranks() == [0, 1]
    assert done.firsts() == pytest.approx([(6 + 2048 * 0.09 + 0.02) / 1e3] * 2, abs=1e-4)
    assert done.outcome.barrier_share > 0.4
    assert finished(arrivals, ranks=2, routing="oracle").firsts()[1] == pytest.approx(0.00611, abs=1e-4)


def test_paused_ranks_are_woken_again() -> None:
    arrivals = [Arrival(0.0, 10, 2), Arrival(5.0, 10, 2), Arrival(5.001, 10, 30)]
    done = finished(arrivals, ranks=3, frontends=2, lockstep=True)
    # Pausing takes until the next agreement at most: nobody steps for seconds without work.
    assert done.outcome.steps < 100
    assert max(done.firsts()) < 0.05


def test_what_never_fits_is_left_out() -> None:
    outcome = finished([Arrival(0.0, 200_000, 1), Arrival(1.0, 10, 1)]).outcome
    assert (outcome.requests, outcome.refused) == (1, 1)
    with pytest.raises(ConfigError, match="--kv-tokens: no request"):
        finished([Arrival(0.0, 200_000, 1)])


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    Replay(Setup(ranks=2), drawn(50, 5.0)).run(lambda done, count: told.append((done, count)))
    assert told == sorted(told)
    assert {count for _, count in told} == {50}


# The machines -------------------------------------------------------------------------------------


def test_prompts_are_as_long_as_they_are_and_equal_where_their_blocks_are() -> None:
    one, two = sequence(1, 1300, 1, (5, 6, 7)), sequence(2, 1100, 1, (5, 6, 8))
    assert len(prompt_of(one, contents=False)) == 1300
    first, second = prompt_of(one, contents=True), prompt_of(two, contents=True)
    assert (len(first), len(second)) == (1300, 1100)
    assert first[: 2 * BLOCK_TOKENS] == second[: 2 * BLOCK_TOKENS]
    assert first[2 * BLOCK_TOKENS] != second[2 * BLOCK_TOKENS]
    alone, other = (prompt_of(sequence(number, 700, 1), contents=True) for number in (2, 3))
    assert (len(alone), alone[0] == other[0]) == (700, False)


def test_prefix_routing_finds_what_a_rank_has() -> None:
    arrivals = drawn(300, 30.0, shared=True)
    blind = finished(arrivals, ranks=4, frontends=1, routing="round-robin").outcome
    sighted = finished(arrivals, ranks=4, frontends=1, routing="prefix").outcome
    assert sighted.prefix_hit_rate > blind.prefix_hit_rate * 1.05


def test_frontends_believe_what_is_when_all_is_over() -> None:
    done = finished(drawn(200, 50.0), ranks=3, frontends=2, interval_s=0.05)
    done.run.world.run_for(10.0)
    for frontend in done.run.frontends.values():
        frontend.submit()
        known = [frontend.machine.believed(rank) for rank in range(3)]
        assert sum(load.waiting + load.running for load in known) == frontend.machine.in_flight() == 1


def test_what_waits_is_bound_when_a_rank_can_start_it() -> None:
    arrivals = drawn(400, 60.0)
    dispatcher, arrival = (
        finished(arrivals, ranks=4, frontends=4, bind=bind, slots=16).outcome for bind in ("late", "arrival")
    )
    bound = finished(arrivals, ranks=4, routing="oracle", slots=16).outcome
    assert dispatcher.ttft_p99_ms < arrival.ttft_p99_ms
    assert dispatcher.ttft_p99_ms < bound.ttft_p99_ms * 1.1


@pytest.mark.slow
def test_no_herd_forms_where_frontends_bind_at_arrival() -> None:
    # Lockstep shows it most: a rank that gets too much holds all up.
    def p99_ms(**settings: Any) -> float:
        traces = [drawn(1500, 56.0, seed) for seed in (2, 3)]
        runs = [finished(one, ranks=4, lockstep=True, slots=64, warm_up=0.2, **settings) for one in traces]
        return sum(run.outcome.ttft_p99_ms for run in runs)

    bound = p99_ms(routing="oracle")
    for frontends in (4, 16):
        assert p99_ms(frontends=frontends, bind="arrival") < bound * 1.25


def test_frontends_share_their_sends() -> None:
    # A burst through four front-ends: nobody knows of the others' but by the relay, and still it is level.
    ranks = finished([Arrival(0.001 * number, 1000, 50) for number in range(64)], ranks=8, frontends=4).ranks()
    each = [ranks.count(rank) for rank in range(8)]
    assert max(each) - min(each) <= 4


def test_a_lone_long_prompt_does_not_stop_those_that_write() -> None:
    arrivals = [Arrival(0.0, 20, 400) for _ in range(120)] + [Arrival(0.5, 20_000, 2)]
    free = finished(arrivals, ranks=4, routing="round-robin", lockstep=True, quota=False).outcome
    bound = finished(arrivals, ranks=4, routing="round-robin", lockstep=True).outcome
    assert bound.tpot_p50_ms < free.tpot_p50_ms * 0.9


@pytest.mark.parametrize("routing", QUEUES)
def test_a_queues_requests_all_end(routing: str) -> None:
    arrivals = drawn(200, 60.0, shared=True)
    done = finished(arrivals, ranks=4, frontends=2, lockstep=True, routing=routing, slots=8, kv_tokens=9000)
    assert all(answer.tokens == arrivals[number - 1].answer_tokens for number, answer in done.answers.items())
    assert set(done.ranks()) == {0, 1, 2, 3}
    assert max(engine.kv_peak for engine in done.run.engines) <= 9000


@pytest.mark.parametrize("crash", [False, True])
def test_the_queue_knows_what_each_rank_holds(crash: bool) -> None:
    """Exactly, though memory is short and blocks go again; also where the coordinator has died in the middle."""
    shape = EngineShape(slots=8, kv_tokens=20_000)
    run = Replay(Setup(3, 2, engine=shape), drawn(120, 30.0, shared=True))
    if crash:
        run.world.at(3.0, run.crash_coordinator)
        run.world.at(3.5, run.start_coordinator)
    run.run()
    run.world.run_for(2.0)
    assert run.coordinator is not None
    (group,) = run.coordinator.machine.dispatcher._groups.values()
    index, parts = group.queue.homes.index, BLOCK_TOKENS // NAMED
    for rank, engine in enumerate(run.engines):
        blocks = (*engine._cache.held, *engine._cache.idle)
        there = {block * parts + part for block in blocks for part in range(parts)}
        assert len(there) > 40
        known = {name for name in index._holders if index.holds(rank, name)} - set(index._blocks[rank])
        assert known == there
