"""A rank's machine while the deployment is paused."""

from __future__ import annotations

import pytest

from paceline.core.load import Load
from paceline.core.messages import Admit, Identify, RankHello, StartDPWave, StartWave, Suspension, WaveComplete
from paceline.core.rank import events
from paceline.core.rank.machine import Rank
from paceline.core.requests import AbortRequests, AddRequest, SamplingParams, SuspendMode
from paceline.core.transaction import MODES, PauseState
from tests.core.harness import find, one, said

NUMBER, LIFE, FRONTEND = 3, 33, 100
KEEP_1 = 1 * len(MODES)


def ready(lockstep: bool = False, suspension: Suspension | None = None) -> Rank:
    machine = Rank(NUMBER, LIFE, "address", lockstep=lockstep, sync_interval=4)
    machine.handle(events.Loaded(), 0.0)
    machine.handle(events.CoordinatorSaid(Admit(NUMBER, LIFE, 0, suspension)), 0.0)
    return machine


def tell(machine: Rank, number: int, mode: SuspendMode = "keep", released: bool = False) -> list[events.Effect]:
    return machine.handle(events.CoordinatorSaid(Suspension(number, mode, released)), 0.0)


def add(machine: Rank, request: int = 1) -> list[events.Effect]:
    return machine.handle(
        events.FrontendSaid(FRONTEND, AddRequest(request, request, LIFE, 0, [1, 2], SamplingParams(4))), 0.0
    )


def turn(machine: Rank, has_work: bool = False) -> list[events.Effect]:
    return machine.handle(events.Turn(Load(), has_work), 0.0)


def step_done(machine: Rank, has_work: bool, *outputs: events.StepOutput) -> list[events.Effect]:
    return machine.handle(events.Stepped(outputs, Load(), has_work), 0.0)


def agreeing() -> Rank:
    """In lockstep, after its first step: the ranks are about to agree."""
    machine = ready(True)
    add(machine)
    turn(machine, True)
    step_done(machine, True)
    return machine


def word(effects: list[events.Effect]) -> tuple[int, bool]:
    hello = said(effects, RankHello)[-1]
    return hello.suspension, hello.held


def packed(number: int, mode: SuspendMode = "keep") -> int:
    found = PauseState()
    found.learn(number, mode, False)
    return found.packed


def finish_reasons(effects: list[events.Effect]) -> list[str]:
    return [output.finish_reason for effect in find(effects, events.ToFrontend) for output in effect.message.outputs]


# What is told, and what is said ---------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_idle_rank_holds_at_once_and_each_telling_is_answered(lockstep: bool, mode: SuspendMode) -> None:
    machine = ready(lockstep)
    assert word(tell(machine, 1, mode)) == (1, True)
    assert word(tell(machine, 1, mode)) == (1, True)
    assert word(tell(machine, 2, mode)) == (2, True)
    assert word(tell(machine, 2, mode, released=True)) == (2, False)
    assert word(tell(machine, 1, mode)) == (2, False), "an older word changes nothing"


def test_a_rank_that_loads_does_not_answer_and_one_that_joins_does() -> None:
    machine = Rank(NUMBER, LIFE, "address")
    assert tell(machine, 1) == []
    machine.handle(events.Loaded(), 0.0)
    assert said(tell(machine, 3), RankHello, ready=False, suspension=3)


@pytest.mark.parametrize("lockstep", [False, True])
def test_who_joins_a_paused_deployment_holds(lockstep: bool) -> None:
    machine = ready(lockstep, Suspension(5, "wait"))
    assert (machine.pause.number, machine.quiesced) == (5, True)
    assert find(add(machine), events.Take) == []


def test_who_joins_before_the_release_waits_for_it() -> None:
    machine = ready(False, Suspension(6, "keep", False))
    add(machine)
    assert find(turn(machine), events.Wait)
    tell(machine, 6, released=True)
    assert find(turn(machine), events.Take)


# Requests that come meanwhile -----------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_requests_are_held_in_order_until_the_release(lockstep: bool, mode: SuspendMode) -> None:
    machine = ready(lockstep)
    tell(machine, 1, mode)
    assert [add(machine, request) for request in (2, 1)] == [[], []]
    assert find(turn(machine), events.Step | events.DummyStep) == []
    tell(machine, 2, mode)
    assert find(turn(machine), events.Step | events.DummyStep | events.Take) == [], "not all know it yet"
    tell(machine, 2, mode, released=True)
    effects = turn(machine)
    assert [effect.request.request for effect in find(effects, events.Take)] == [2, 1]
    assert find(effects, events.Again)
    assert len(said(effects, StartWave)) == (1 if lockstep else 0)
    assert find(turn(machine, True), events.Step)


def test_in_abort_mode_a_request_is_refused_until_the_resumption() -> None:
    machine = ready()
    tell(machine, 1, "abort")
    assert finish_reasons(add(machine, 1)) == ["abort"]
    tell(machine, 2, "abort")
    assert add(machine, 2) == []
    tell(machine, 2, "abort", released=True)
    assert one(find(turn(machine), events.Take)).request.request == 2


@pytest.mark.parametrize("lockstep", [False, True])
def test_abort_ends_what_runs_and_what_is_held_at_the_next_turn(lockstep: bool) -> None:
    machine = ready(lockstep)
    key = one(find(add(machine, 1), events.Take)).key
    tell(machine, 1, "keep")
    add(machine, 2)
    tell(machine, 3, "abort")
    effects = turn(machine, True)
    assert find(effects, events.Drop) == [events.Drop(key)]
    assert finish_reasons(effects) == ["abort", "abort"]
    assert find(effects, events.Again)
    assert machine.statistics()["requests"] == 0
    # A wave that runs is ended with the others; alone, nothing is left to do.
    assert find(turn(machine), events.DummyStep if lockstep else events.Wait)


def test_what_is_held_can_be_abandoned() -> None:
    machine = ready()
    tell(machine, 1)
    for request in (1, 2):
        add(machine, request)
    machine.handle(events.FrontendSaid(FRONTEND, AbortRequests([1])), 0.0)
    assert machine.requests.kept_back == 1
    machine.handle(events.FrontendGone(FRONTEND), 0.0)
    assert machine.requests.kept_back == 0
    tell(machine, 2, released=True)
    assert find(turn(machine), events.Wait)


def test_what_is_held_is_reported_as_waiting() -> None:
    machine = ready()
    tell(machine, 1)
    add(machine)
    report = one([effect.message for effect in find(turn(machine), events.ToCoordinator)])
    assert (report.load.waiting, report.taken) == (1, {FRONTEND: 1})


# Independent ranks ----------------------------------------------------------------------------
def test_independent_keep_stops_after_the_step_that_runs() -> None:
    machine = ready()
    add(machine)
    assert find(turn(machine, True), events.Step)
    assert word(tell(machine, 1)) == (1, False), "it computes"
    assert word(step_done(machine, True)) == (1, True)
    assert find(turn(machine, True), events.Wait)
    tell(machine, 2)
    assert find(turn(machine, True), events.Wait)
    assert word(tell(machine, 2, released=True)) == (2, False)
    assert find(turn(machine, True), events.Step)


def test_independent_wait_runs_until_all_that_it_has_is_finished() -> None:
    machine = ready()
    key = one(find(add(machine), events.Take)).key
    assert word(tell(machine, 1, "wait")) == (1, False)
    for _ in range(3):
        assert find(turn(machine, True), events.Step)
        assert said(step_done(machine, True, events.StepOutput(key, [1])), RankHello, held=True) == []
    turn(machine, True)
    assert word(step_done(machine, False, events.StepOutput(key, [1], finish_reason="stop"))) == (1, True)
    assert find(turn(machine), events.Wait)


def test_independent_wait_ends_where_the_last_client_goes() -> None:
    machine = ready()
    add(machine)
    tell(machine, 1, "wait")
    assert word(machine.handle(events.FrontendGone(FRONTEND), 0.0)) == (1, True)


# Mid-step -------------------------------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_agreement", [False, True])
def test_what_is_handled_in_mid_step_only_sends(lockstep: bool, mode: SuspendMode, in_agreement: bool) -> None:
    machine = ready(lockstep)
    add(machine)
    turn(machine, True)
    if in_agreement and lockstep:
        assert find(step_done(machine, True), events.Agree)
    for message in (Suspension(1, mode), Identify(1, 9), Suspension(2, mode), Suspension(2, mode, True)):
        assert isinstance(message, events.IN_MID_STEP)
        effects = machine.handle(events.CoordinatorSaid(message), 0.0)
        assert effects
        assert all(isinstance(effect, events.ToCoordinator | events.Urge) for effect in effects)
        assert word(effects)[1] is False


# Lockstep -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_lockstep_stops_by_agreement_also_where_it_has_not_heard_itself(mode: SuspendMode) -> None:
    machine = agreeing()
    effects = machine.handle(events.Agreed(True, 4, packed(1, mode)), 0.0)
    if mode == "wait":
        assert machine.running
        assert word(effects) == (1, False)
        assert find(turn(machine, True), events.Step)
        return
    assert said(effects, WaveComplete, wave=4)
    assert (machine.wave, machine.running) == (5, False)
    assert word(effects) == (1, True)
    assert said(effects, StartWave) == []
    assert find(turn(machine, True), events.Step | events.DummyStep) == []


@pytest.mark.parametrize(("mode", "urged"), [("keep", True), ("abort", True), ("wait", False)])
def test_a_running_rank_urges_the_next_agreement_and_it_comes_after_that_step(mode: SuspendMode, urged: bool) -> None:
    machine = ready(True)
    assert find(tell(machine, 1, mode), events.Urge) == [], "it does not run"
    tell(machine, 2, mode, released=True)
    add(machine)
    turn(machine, True)
    step_done(machine, True)
    machine.handle(events.Agreed(True, 0, 0), 0.0)
    turn(machine, True)
    assert len(find(tell(machine, 3, mode), events.Urge)) == urged
    effects = machine.handle(events.Stepped((), Load(), True, urged=urged), 0.0)
    assert len(find(effects, events.Agree, suspension=packed(3, mode))) == urged


def test_lockstep_says_what_it_knows_in_the_agreement() -> None:
    machine = ready(True)
    add(machine)
    turn(machine, True)
    tell(machine, 1)
    assert one(find(step_done(machine, True), events.Agree)).suspension == KEEP_1


def test_lockstep_goes_by_what_was_agreed_not_by_what_it_has_heard_since() -> None:
    machine = agreeing()
    tell(machine, 1)
    machine.handle(events.Agreed(True, 0, 0), 0.0)
    assert machine.running, "the others have not stopped either"
    for _ in range(4):
        assert find(turn(machine, True), events.Step)
        effects = step_done(machine, True)
    assert one(find(effects, events.Agree)).suspension == KEEP_1
    machine.handle(events.Agreed(True, 0, KEEP_1), 0.0)
    assert not machine.running


def test_lockstep_goes_on_with_its_requests_after_the_release_in_one_new_wave() -> None:
    machine = agreeing()
    machine.handle(events.Agreed(True, 0, KEEP_1), 0.0)
    tell(machine, 2)
    assert find(turn(machine, True), events.Step) == []
    tell(machine, 2, released=True)
    effects = turn(machine, True)
    assert said(effects, StartWave, wave=1)
    assert find(turn(machine, True), events.Step)


def test_lockstep_released_in_mid_agreement_stops_with_the_others_and_starts_the_next_wave() -> None:
    machine = agreeing()
    tell(machine, 2, released=True)
    effects = machine.handle(events.Agreed(True, 0, KEEP_1), 0.0)
    assert said(effects, WaveComplete, wave=0)
    assert said(effects, StartWave, wave=1)
    assert machine.pause.number == 2


def test_lockstep_follows_a_wake_while_held_and_stops_at_the_first_agreement() -> None:
    machine = ready(True)
    tell(machine, 1)
    effects = machine.handle(events.CoordinatorSaid(StartDPWave(0)), 0.0)
    assert word(effects) == (1, False)
    assert find(turn(machine), events.DummyStep)
    assert one(find(step_done(machine, False), events.Agree)).suspension == KEEP_1
    assert word(machine.handle(events.Agreed(True, 0, KEEP_1), 0.0)) == (1, True)
    assert machine.handle(events.CoordinatorSaid(StartDPWave(0)), 0.0) == [], "that wave is finished"
