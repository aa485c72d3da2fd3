"""Suspending and resuming a whole deployment of machines: it never blocks, and nobody steps while it is suspended."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.events import Control, Controlled
from paceline.core.messages import (
    ControlAnswer,
    ControlRequest,
    LoadView,
    StartDPWave,
    Suspension,
    WakeNotice,
)
from paceline.core.rank import events as rank_events
from paceline.core.rank.events import Phase
from paceline.core.requests import ControlAction
from paceline.core.standing import MODES
from tests.core.deployment import Deployment
from tests.core.harness import FrontendShell, RankShell, find

REPEAT_S = 0.25
"""How often a shell asks again."""


class Calls:
    """One front-end's calls, repeated until they are served as `server/client.py` does."""

    def __init__(self, shell: FrontendShell) -> None:
        self.shell = shell
        self.done: dict[int, Controlled] = {}
        self.asked: dict[int, ControlAction] = {}
        self._numbers = itertools.count(1)
        self._feed = shell.feed
        shell.feed = self._observed  # type: ignore[method-assign]

    def ask(self, action: ControlAction) -> int:
        """A new call; returns its number."""
        call = next(self._numbers)
        self.asked[call] = action
        self._repeat(call)
        return call

    def served(self) -> bool:
        """Whether every call has ended."""
        return self.done.keys() == self.asked.keys()

    def _repeat(self, call: int) -> None:
        if call not in self.done:
            self.shell.feed(Control(call, self.asked[call]))
            self.shell.world.at(self.shell.world.now + REPEAT_S, lambda: self._repeat(call))

    def _observed(self, event: frontend_events.Event) -> None:
        machine, shell = self.shell.machine, self.shell
        effects = machine.handle(event, shell.world.now)
        for effect in effects:
            if isinstance(effect, Controlled):
                assert effect.call not in self.done, "a call ended twice"
                self.done[effect.call] = effect
            shell._perform(effect)


class Suspendable(Deployment):
    """A deployment with calls, which checks at each step that no settled suspension forbids it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.calls: list[Calls] = []
        self.lives: list[object] = []
        self.settled: set[int] = set()
        self.steps = 0
        super().__init__(*arguments, **options)
        self.world.after_each = self._note_settled

    def start_coordinator(self) -> None:
        super().start_coordinator()
        # `_check` goes by id(): that of a coordinator that is gone must not be another's.
        self.lives.append(self.coordinator)

    def start_frontend(self, index: int, count: int) -> FrontendShell:
        shell = super().start_frontend(index, count)
        self.calls.append(Calls(shell))
        return shell

    def start_rank(self, number: int) -> RankShell:
        shell = super().start_rank(number)
        perform = shell._perform

        def watched(effect: rank_events.Effect) -> None:
            if isinstance(effect, rank_events.Step | rank_events.DummyStep):
                self._may_step(number)
            perform(effect)

        shell._perform = watched  # type: ignore[method-assign]
        return shell

    def control(self, action: ControlAction, frontend: int = 0, limit_s: float = 30.0) -> Controlled:
        """Ask, and run until that is served."""
        calls = self.calls[frontend]
        call = calls.ask(action)
        self.run_until(lambda: call in calls.done, limit_s)
        return calls.done[call]

    def served(self) -> bool:
        return all(calls.served() for calls in self.calls)

    def number(self) -> int:
        """The highest number that any rank knows."""
        return max(rank.machine.standing.number for rank in self.ranks.values())

    def load(self, requests: int = 6, max_tokens: int = 12) -> None:
        """Requests at every front-end, spread over all ranks."""
        for frontend, index in itertools.product(self.frontends, range(requests)):
            frontend.submit(max_tokens=max_tokens, rank=None if self.external else index % self.size)

    def is_suspended(self) -> None:
        """Fails unless no rank steps for ten seconds."""
        before = self.steps
        self.world.run_for(10.0)
        assert self.steps == before
        assert not any(rank._busy for rank in self.ranks.values())

    def _may_step(self, rank: int) -> None:
        self.steps += 1
        # In lockstep nobody steps before all know of the end.
        known = [
            shell.machine.standing.number for number, shell in self.ranks.items() if self.lockstep or number == rank
        ]
        forbidden = [number for number in self.settled if number >= min(known)]
        assert not forbidden, f"rank {rank} begins a step while suspension {forbidden} is settled"

    def _note_settled(self) -> None:
        self._check()
        for frontend in self.frontends:
            state = frontend.machine.suspension
            if state.number % 2 and state.settled and state.number not in self.settled:
                self.settled.add(state.number)
                stepping = [n for n, rank in self.ranks.items() if rank._busy and self._lags(rank, state.number)]
                assert not stepping, f"ranks {stepping} compute although suspension {state.number} is settled"

    def _lags(self, rank: RankShell, number: int) -> bool:
        return rank.machine.standing.number <= number


def aborted(frontend: FrontendShell) -> list[int]:
    """Requests that ended with an abort."""
    return [r for r, outputs in frontend.outputs.items() if outputs and outputs[-1].finish_reason == "abort"]


# One call at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.004, 0.013, 0.031])
def test_under_load_all_stop_and_all_finish_after_the_resume(
    mode: ControlAction, lockstep: bool, after_s: float
) -> None:
    deployment = Suspendable(ranks=3, frontends=2, lockstep=lockstep).ready()
    deployment.load()
    deployment.world.run_for(after_s)
    assert not deployment.control(mode).superseded
    deployment.is_suspended()
    finished = all(frontend.finished() for frontend in deployment.frontends)
    assert finished == (mode != "keep" and not any(r.machine.requests.held for r in deployment.ranks.values()))
    assert not deployment.control("resume").superseded
    deployment.finish()
    if mode != "abort":
        assert not any(aborted(frontend) for frontend in deployment.frontends)
        tokens = [sum(len(o.token_ids) for o in got) for f in deployment.frontends for got in f.outputs.values()]
        assert set(tokens) == {12}
    if lockstep:
        deployment.rest()


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_idle_deployment_is_suspended_without_a_step(mode: ControlAction, lockstep: bool) -> None:
    deployment = Suspendable(ranks=4, lockstep=lockstep).ready()
    for _ in range(3):
        assert not deployment.control(mode, limit_s=0.1).superseded
        assert not deployment.control("resume", limit_s=0.1).superseded
    assert deployment.steps == 0
    assert deployment.number() == 6


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_request_that_comes_while_suspended(mode: ControlAction, lockstep: bool) -> None:
    deployment = Suspendable(ranks=2, frontends=2, lockstep=lockstep).ready()
    deployment.control(mode)
    deployment.world.run_for(1.0)
    request = deployment.frontends[1].submit()
    deployment.is_suspended()
    assert deployment.frontends[1].refused.get(request) == ("suspended" if mode == "abort" else None)
    assert deployment.frontends[1].outputs[request] == []
    deployment.control("resume")
    deployment.finish(limit_s=1.0)


def test_asking_twice_is_asking_once() -> None:
    deployment = Suspendable(ranks=2, frontends=2).ready()
    for action, number in (("keep", 1), ("resume", 2)):
        numbers = [deployment.control(action, frontend).number for frontend in (0, 1, 0)]
        assert numbers == [number] * 3


# Losses and crashes ---------------------------------------------------------------------------


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("times", [1, 4])
def test_lost_broadcasts_are_made_up_for(lockstep: bool, times: int) -> None:
    deployment = Suspendable(ranks=3, lockstep=lockstep).ready()
    deployment.load()
    for action in ("keep", "resume", "wait", "resume"):
        deployment.ranks[1].broadcasts.lose(Suspension, times)
        deployment.ranks[2].broadcasts.lose(StartDPWave, times)
        deployment.frontends[0].to_coordinator.lose(ControlRequest)
        deployment.frontends[0].broadcasts.lose(ControlAnswer)
        deployment.control(action)
        if action != "resume":
            deployment.is_suspended()
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
    deployment = Suspendable(ranks=3, frontends=2, lockstep=lockstep).ready()
    deployment.load()
    deployment.world.run_for(0.015)
    for action in (mode, "resume"):
        call = deployment.calls[0].ask(action)
        deployment.world.run_for(crash_after_s)
        deployment.crash_coordinator()
        deployment.world.run_for(down_s)
        deployment.start_coordinator()
        deployment.run_until(lambda: deployment.served(), 10.0)
        assert not deployment.calls[0].done[call].superseded, "nobody asked for the contrary"
        if action != "resume":
            deployment.is_suspended()
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


def perform(deployment: Suspendable, what: str, which: Any, value: Any) -> None:
    match what:
        case "ask":
            deployment.calls[which].ask(value)
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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lockstep=st.booleans(), schedule=st.lists(STEPS, min_size=1, max_size=14))
def test_calls_that_cross_never_block(lockstep: bool, schedule: list[tuple[str, Any, Any]]) -> None:
    deployment = Suspendable(ranks=3, frontends=2, lockstep=lockstep).ready()
    for what, which, value in schedule:
        perform(deployment, what, which, value)
    deployment.run_until(deployment.served)
    assert not deployment.control("resume").superseded
    deployment.finish()
    deployment.world.run_for(5.0)
    assert not any(rank.machine.held for rank in deployment.ranks.values())
    assert len({rank.machine.standing.number for rank in deployment.ranks.values()}) == 1
    assert find(deployment.broadcast, Suspension) == [] or deployment.number() % 2 == 0


def test_a_new_life_of_a_rank_at_a_new_coordinator_does_not_step() -> None:
    deployment = Suspendable(ranks=2, lockstep=False).ready()
    deployment.control("keep")
    deployment.ranks[1].kill()
    deployment.crash_coordinator()
    deployment.ranks[0].to_coordinator.delay_s = deployment.frontends[0].to_coordinator.delay_s = 0.01
    deployment.start_coordinator()
    deployment.start_rank(1)
    for _ in range(20):
        deployment.world.run_for(0.002)
        deployment.frontends[0].submit()
    deployment.is_suspended()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone_s", [0.0, 0.5])
def test_a_new_life_of_a_rank_holds_the_suspension_and_serves_after_it(mode: ControlAction, gone_s: float) -> None:
    deployment = Suspendable(ranks=2, lockstep=False).ready()
    deployment.control(mode)
    deployment.ranks[1].kill()
    deployment.world.run_for(gone_s)
    deployment.start_rank(1)
    deployment.run_until(lambda: deployment.ranks[1].machine.phase is Phase.READY)
    deployment.load(2)
    deployment.is_suspended()
    assert not deployment.control("resume").superseded
    deployment.finish()
    request = deployment.frontends[0].submit(rank=1)
    deployment.finish()
    assert deployment.frontends[0].outputs[request]
