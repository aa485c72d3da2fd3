"""Whole runs: nothing is lost, the same seed is the same run, and many steps at once are as many single ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec.structs import asdict

from paceline.errors import ConfigError
from paceline.simulate.traffic.engine import Engine
from paceline.simulate.traffic.peers_lockstep import LOCKSTEP_PEERS
from paceline.simulate.traffic.run import Deployment, Run, routing_names, run
from paceline.simulate.traffic.trace import Arrival
from tests.simulate.traffic.deployments import drawn, finished

ROUTINGS = [name for name in routing_names() if name not in ("session", *LOCKSTEP_PEERS)]


@dataclass
class Times:
    """When each request had its first and its last token."""

    first: list[float]
    last: list[float]


def times(done: Run) -> Times:
    return Times([one.first for one in done.sequences], [one.last for one in done.sequences])


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_request_ends_and_tokens_add_up(routing: str, lockstep: bool) -> None:
    arrivals = drawn(150, 40.0, shared=True)
    done = finished(arrivals, ranks=4, frontends=3, routing=routing, lockstep=lockstep, slots=16, kv_tokens=20_000)
    outcome = done.outcome
    assert (outcome.requests, outcome.refused) == (150, 0)
    assert outcome.output_tokens == sum(one.answer_tokens for one in arrivals)
    assert done.recorder.ended == 150
    for one in done.sequences:
        assert one.at < one.first <= one.last
        assert one.made == one.answer
        assert 0 <= one.rank < 4
    engines = [rank.engine for rank in done._ranks]
    assert sum(engine.finished for engine in engines) == 150
    assert all(engine.kv_used == 0 and engine.kv_peak <= 20_000 for engine in engines)
    assert outcome.throughput_tokens_per_s * outcome.duration_s == pytest.approx(outcome.output_tokens)
    assert (outcome.barrier_share > 0) == lockstep


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("routing", ["least-load", "vllm-0.32", "oracle"])
def test_the_same_seed_is_the_same_run(routing: str, lockstep: bool) -> None:
    arrivals = drawn(120, 60.0)
    settings = {"ranks": 4, "front_ends": 4, "routing": routing, "lockstep": lockstep}
    one, two = (asdict(finished(arrivals, seed=5, **settings).outcome) for _ in range(2))
    other = asdict(finished(arrivals, seed=6, **settings).outcome)
    for figures in (one, two, other):
        del figures["real_s"]
    assert one == two
    assert (one == other) == (routing == "oracle")


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("bind", ["broker", "arrival"])
@pytest.mark.parametrize("routing", ["round-robin", "sglang-total-tokens", "least-load"])
def test_many_steps_at_once_are_as_many_single_ones(
    routing: str, bind: str, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = drawn(100, 12.0)
    settings = {"ranks": 3, "front_ends": 2, "routing": routing, "bind": bind, "lockstep": lockstep, "slots": 24}
    settings |= {"quota": False}
    many = times(finished(arrivals, **settings))
    steady = Engine.steady
    monkeypatch.setattr(Engine, "steady", lambda engine: min(1, steady(engine)))
    single = times(finished(arrivals, **settings))
    assert many.first == pytest.approx(single.first, abs=1e-6)
    assert many.last == pytest.approx(single.last, abs=1e-6)


def test_with_the_quota_they_nearly_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # What was to be agreed on amidst many steps is agreed on at their end, with the memory in use by then.
    arrivals = drawn(100, 12.0)
    settings = {"ranks": 3, "front_ends": 2, "routing": "round-robin", "lockstep": True, "slots": 24}
    many = times(finished(arrivals, **settings))
    steady = Engine.steady
    monkeypatch.setattr(Engine, "steady", lambda engine: min(1, steady(engine)))
    single = times(finished(arrivals, **settings))
    assert sum(many.first) == pytest.approx(sum(single.first), rel=0.01)
    assert sum(many.last) == pytest.approx(sum(single.last), rel=0.01)


def test_one_request_takes_what_its_steps_cost() -> None:
    done = finished([Arrival(0.0, 3000, 11)], ranks=2, routing="oracle")
    # Two steps for the prompt, 2,048 tokens and 952; with the second comes the first token; then ten steps of one.
    assert done.sequences[0].first == pytest.approx((6 + 2048 * 0.09 + 6 + 952 * 0.09 + 0.02) / 1e3)
    assert done.sequences[0].last - done.sequences[0].first == pytest.approx(10 * 6.02 / 1e3)


def test_lockstep_ranks_wait_for_the_slowest() -> None:
    arrivals = [Arrival(0.0, 2048, 2), Arrival(0.0, 1, 2)]
    done = finished(arrivals, ranks=2, routing="oracle", lockstep=True)
    long, short = done.sequences
    assert long.rank != short.rank
    assert short.first == long.first == pytest.approx((6 + 2048 * 0.09 + 0.02) / 1e3)
    assert done.outcome.barrier_share > 0.4
    assert finished(arrivals, ranks=2, routing="oracle").sequences[1].first == pytest.approx(0.00611)


def test_paused_ranks_are_woken_again() -> None:
    arrivals = [Arrival(0.0, 10, 2), Arrival(5.0, 10, 2), Arrival(5.001, 10, 30)]
    done = finished(arrivals, ranks=3, frontends=2, lockstep=True)
    # Pausing takes until the next agreement at most: nobody steps for seconds without work.
    assert done.outcome.steps < 100
    assert all(one.first - one.at < 0.05 for one in done.sequences)


def test_what_never_fits_is_left_out() -> None:
    outcome = run(Deployment(), [Arrival(0.0, 200_000, 1), Arrival(1.0, 10, 1)])
    assert (outcome.requests, outcome.refused) == (1, 1)
    with pytest.raises(ConfigError, match="--kv-tokens: no request"):
        run(Deployment(), [Arrival(0.0, 200_000, 1)])


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    Run(Deployment(ranks=2), drawn(50, 5.0)).run(lambda done, count: told.append((done, count)))
    assert told == sorted(told)
    assert {count for _, count in told} == {50}
