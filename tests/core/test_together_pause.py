"""Pausing and resuming a whole deployment of machines: it never blocks, and nobody steps while it is paused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from paceline.core.messages import ControlAnswer, ControlRequest, LoadView, StartDPWave, Suspension, WakeNotice
from paceline.core.rank.events import Phase
from paceline.core.requests import ControlAction
from paceline.core.transaction import MODES
from paceline.sim.deployment import Deployment
from paceline.sim.processes import Call, FrontendProcess
from paceline.sim.world import Delays
from tests.core.harness import find
from tests.pace import examples
from tests.sim.deployments import ready, rest, seen, tokens


def control(deployment: Deployment, action: ControlAction, frontend: int = 0, limit_s: float = 30.0) -> Call:
    process = deployment.frontends[frontend]
    call = process.calls[process.control(action)]
    deployment.world.run_until(lambda: call.over, limit_s)
    return call


def number(deployment: Deployment) -> int:
    return max(rank.machine.pause.number for rank in deployment.ranks.values())


def load(deployment: Deployment, requests: int = 6, max_tokens: int = 12) -> None:
    for frontend, index in itertools.product(deployment.frontends.values(), range(requests)):
        frontend.submit(max_tokens=max_tokens, rank=index % deployment.shape.ranks)


def is_suspended(deployment: Deployment) -> None:
    before = seen(deployment).steps
    deployment.world.run_for(10.0)
    assert seen(deployment).steps == before
    assert not any(rank.busy for rank in deployment.ranks.values())


def aborted(frontend: FrontendProcess) -> list[int]:
    return [request for request, answer in frontend.answers.items() if answer.finish_reason == "abort"]


# One call at a time ---------------------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.004, 0.013, 0.031])
def test_under_load_all_stop_and_all_finish_after_the_resume(
    mode: ControlAction, lockstep: bool, after_s: float
) -> None:
    deployment = ready(ranks=3, frontends=2, lockstep=lockstep)
    load(deployment)
    deployment.world.run_for(after_s)
    assert not control(deployment, mode).superseded
    is_suspended(deployment)
    finished = all(frontend.finished() for frontend in deployment.frontends.values())
    assert finished == (mode != "keep" and not any(r.machine.requests.kept_back for r in deployment.ranks.values()))
    assert not control(deployment, "resume").superseded
    deployment.finish()
    if mode != "abort":
        assert not any(aborted(frontend) for frontend in deployment.frontends.values())
        assert set(tokens(deployment.frontends.values())) == {12}
    if lockstep:
        rest(deployment)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_idle_deployment_is_paused_without_a_step(mode: ControlAction, lockstep: bool) -> None:
    deployment = ready(ranks=4, lockstep=lockstep)
    for _ in range(3):
        assert not control(deployment, mode, limit_s=0.1).superseded
        assert not control(deployment, "resume", limit_s=0.1).superseded
    assert seen(deployment).steps == 0
    assert number(deployment) == 6


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_comes_while_paused(mode: ControlAction, lockstep: bool) -> None:
    deployment = ready(ranks=2, frontends=2, lockstep=lockstep)
    control(deployment, mode)
    deployment.world.run_for(1.0)
    request = deployment.frontends[1].submit()
    is_suspended(deployment)
    assert deployment.frontends[1].answers[request].refused == ("suspended" if mode == "abort" else None)
    assert deployment.frontends[1].answers[request].tokens == 0
    control(deployment, "resume")
    deployment.finish(limit_s=1.0)


def test_asking_twice_is_asking_once() -> None:
    deployment = ready(ranks=2, frontends=2)
    for action, number in (("keep", 1), ("resume", 2)):
        numbers = [control(deployment, action, frontend).number for frontend in (0, 1, 0)]
        assert numbers == [number] * 3


# Losses and crashes ---------------------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("times", [1, 4])
def test_lost_broadcasts_are_made_up_for(lockstep: bool, times: int) -> None:
    deployment = ready(ranks=3, lockstep=lockstep)
    load(deployment)
    for action in ("keep", "resume", "wait", "resume"):
        deployment.ranks[1].broadcasts.lose(Suspension, times)
        deployment.ranks[2].broadcasts.lose(StartDPWave, times)
        deployment.frontends[0].to_coordinator.lose(ControlRequest)
        deployment.frontends[0].broadcasts.lose(ControlAnswer)
        control(deployment, action)
        if action != "resume":
            is_suspended(deployment)
        deployment.ranks[1].broadcasts.lose_no_more()
        deployment.ranks[2].broadcasts.lose_no_more()
    deployment.finish()


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("crash_after_s", [0.0, 0.0006, 0.0011, 0.0016, 0.0021, 0.0026, 0.02])
@pytest.mark.parametrize("down_s", [0.0, 0.3])
def test_the_coordinator_crashes_in_the_midst_of_it(
    lockstep: bool, mode: ControlAction, crash_after_s: float, down_s: float
) -> None:
    deployment = ready(ranks=3, frontends=2, lockstep=lockstep)
    load(deployment)
    deployment.world.run_for(0.015)
    for action in (mode, "resume"):
        call = deployment.frontends[0].control(action)
        deployment.world.run_for(crash_after_s)
        deployment.crash_coordinator()
        deployment.world.run_for(down_s)
        deployment.start_coordinator()
        deployment.world.run_until(deployment.controlled, 10.0)
        assert not deployment.frontends[0].calls[call].superseded, "nobody asked for the contrary"
        if action != "resume":
            is_suspended(deployment)
    deployment.finish()


# Calls that cross -----------------------------------------------------------------------------

ACTIONS = st.sampled_from(["keep", "wait", "abort", "resume"])
STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 1), ACTIONS),
    st.tuples(st.just("submit"), st.integers(0, 1), st.integers(0, 2)),
    st.tuples(st.just("run"), st.sampled_from([0.0003, 0.0006, 0.002, 0.011, 0.06, 0.4]), st.none()),
    st.tuples(st.just("lose at rank"), st.integers(0, 2), st.sampled_from([Suspension, StartDPWave])),
    st.tuples(st.just("lose at front-end"), st.integers(0, 1), st.sampled_from([LoadView, ControlAnswer])),
    st.tuples(st.just("lose upwards"), st.integers(0, 1), st.sampled_from([ControlRequest, WakeNotice])),
    st.tuples(st.just("crash"), st.sampled_from([0.0, 0.001, 0.2]), st.none()),
)


def perform(deployment: Deployment, what: str, which: Any, value: Any) -> None:
    match what:
        case "ask":
            deployment.frontends[which].control(value)
        case "submit":
            deployment.frontends[which].submit(max_tokens=3, rank=value)
        case "run":
            deployment.world.run_for(which)
        case "lose at rank":
            deployment.ranks[which].broadcasts.lose(value)
        case "lose at front-end":
            deployment.frontends[which].broadcasts.lose(value)
        case "lose upwards":
            deployment.frontends[which].to_coordinator.lose(value)
        case "crash":
            deployment.crash_coordinator()
            deployment.world.run_for(which)
            deployment.start_coordinator()


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
@given(lockstep=st.booleans(), schedule=st.lists(STEPS, min_size=1, max_size=14))
def test_calls_that_cross_never_block(lockstep: bool, schedule: list[tuple[str, Any, Any]]) -> None:
    deployment = ready(ranks=3, frontends=2, lockstep=lockstep)
    for what, which, value in schedule:
        perform(deployment, what, which, value)
    deployment.world.run_until(deployment.controlled)
    assert not control(deployment, "resume").superseded
    deployment.finish()
    deployment.world.run_for(5.0)
    assert not any(rank.machine.quiesced for rank in deployment.ranks.values())
    assert len({rank.machine.pause.number for rank in deployment.ranks.values()}) == 1
    assert find(seen(deployment).broadcasts, Suspension) == [] or number(deployment) % 2 == 0


def test_a_new_life_of_a_rank_at_a_new_coordinator_does_not_step() -> None:
    deployment = ready(ranks=2, lockstep=False)
    control(deployment, "keep")
    deployment.crash_rank(1)
    deployment.crash_coordinator()
    deployment.ranks[0].to_coordinator.delays = deployment.frontends[0].to_coordinator.delays = Delays(0.01, 0, 0, 0)
    deployment.start_coordinator()
    deployment.start_rank(1)
    for _ in range(20):
        deployment.world.run_for(0.002)
        deployment.frontends[0].submit()
    is_suspended(deployment)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone_s", [0.0, 0.5])
def test_a_new_life_of_a_rank_holds_the_pause_and_serves_after_it(mode: ControlAction, gone_s: float) -> None:
    deployment = ready(ranks=2, lockstep=False)
    control(deployment, mode)
    deployment.crash_rank(1)
    deployment.world.run_for(gone_s)
    deployment.start_rank(1)
    deployment.world.run_until(lambda: deployment.ranks[1].machine.phase is Phase.READY)
    load(deployment, 2)
    is_suspended(deployment)
    assert not control(deployment, "resume").superseded
    deployment.finish()
    request = deployment.frontends[0].submit(rank=1)
    deployment.finish()
    assert deployment.frontends[0].answers[request].tokens
