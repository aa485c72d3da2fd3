"""The coordinator's machine: pauses that are asked for, told, acknowledged and published; epochs."""

from __future__ import annotations

import itertools

import pytest

from paceline.core import messages
from paceline.core.coordinator import events
from paceline.core.coordinator.machine import Coordinator
from paceline.core.requests import ControlAction, SuspendMode
from paceline.core.retry import FIRST_S
from tests.core.harness import find, one, said

FRONTEND, COORDINATOR = 100, 1


def hello(
    rank: int, number: int = 0, held: bool = False, *, mode: SuspendMode = "keep", wave: int = 0, running: bool = False,
    ready: bool = True, life: int = 0, group: str = "", epoch: int = 0,
) -> events.RankSaid:  # fmt: skip
    return events.RankSaid(
        messages.RankHello(messages.PROTOCOL_VERSION, rank, life or 10 + rank, f"address {rank}", ready, wave, running,
                           number, mode, held, group, epoch)
    )  # fmt: skip


CALLS = itertools.count(1000)


def control(action: ControlAction, call: int | None = None, frontend: int = FRONTEND) -> events.FrontendSaid:
    return events.FrontendSaid(messages.ControlRequest(frontend, next(CALLS) if call is None else call, action))


def started(lockstep: bool = True, number: int = 0) -> Coordinator:
    """Two ranks that are ready, and nothing to be said."""
    machine = Coordinator(2, COORDINATOR, 0.1, lockstep=lockstep)
    machine.handle(events.FrontendSubscribed(), 0.0)
    for rank in (0, 1):
        machine.handle(hello(rank, number, number % 2 == 1), 0.0)
    machine.handle(events.Tick(), 1.0)
    return machine


def suspended(lockstep: bool = True, mode: SuspendMode = "keep") -> Coordinator:
    machine = started(lockstep)
    machine.handle(control(mode), 2.0)
    for rank in (0, 1):
        machine.handle(hello(rank, 1, True, mode=mode), 2.0)
    assert machine.statistics()["suspension_settled"]
    return machine


def state(effects: list[events.Effect]) -> messages.SuspensionState:
    view = said(find(effects, events.ToFrontends), messages.LoadView)[-1]
    assert isinstance(view, messages.LoadView)
    return view.suspension


def told(effects: list[events.Effect]) -> list[messages.Suspension]:
    return said(find(effects, events.ToRanks), messages.Suspension)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_a_call_is_answered_told_and_published_at_once(lockstep: bool, mode: SuspendMode) -> None:
    machine = started(lockstep)
    effects = machine.handle(control(mode, 7), 2.0)
    assert one(said(effects, messages.ControlAnswer)) == messages.ControlAnswer(COORDINATOR, FRONTEND, 7, 1)
    assert told(effects) == [messages.Suspension(1, mode)]
    assert state(effects) == messages.SuspensionState(1, mode, False, [0, 1])
    assert said(machine.handle(hello(0, 1, True, mode=mode), 2.001), messages.LoadView) == [], "it is no end yet"
    assert state(machine.handle(events.Tick(), 2.2)) == messages.SuspensionState(1, mode, False, [1])
    assert state(machine.handle(hello(1, 1, True, mode=mode), 2.201)) == messages.SuspensionState(1, mode, True, [])


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_call_brings_the_number_that_only_its_frontend_knows(lockstep: bool) -> None:
    """The coordinator and all ranks are new: a resumption asked for of the suspension before is not done already."""
    machine = started(lockstep)
    asked = messages.ControlRequest(FRONTEND, 7, "resume", known=37, mode="wait")
    effects = machine.handle(events.FrontendSaid(asked), 2.0)
    assert one(said(effects, messages.ControlAnswer)).number == 38
    assert told(effects) == [messages.Suspension(38, "wait", not lockstep)]
    assert not state(effects).settled


def test_independent_ranks_go_on_as_each_hears_that_it_may() -> None:
    """None of them is waited for: it may be stopped, or on its way back."""
    machine = suspended(lockstep=False)
    effects = machine.handle(control("resume"), 3.0)
    assert told(effects) == [messages.Suspension(2, "keep", True)]
    assert state(effects) == messages.SuspensionState(2, "keep", False, [0, 1])
    machine.handle(hello(0, 2, False), 3.001)
    assert state(machine.handle(events.Tick(), 3.2)).waiting_for == [1]
    assert told(machine.handle(events.Tick(), machine.deadline)) == [messages.Suspension(2, "keep", True)], (
        "until it has heard"
    )
    assert state(machine.handle(hello(1, 2, False), 3.5)) == messages.SuspensionState(2, "keep", True, [])


def test_a_new_coordinator_lets_independent_ranks_go_on_before_all_have_spoken() -> None:
    machine = Coordinator(2, COORDINATOR, 0.1, lockstep=False)
    assert told(machine.handle(hello(0, 2, True), 0.0)) == [messages.Suspension(2, "keep", True)]


def test_a_resumption_in_lockstep_is_released_when_all_know_it() -> None:
    machine = suspended()
    assert told(machine.handle(control("resume"), 3.0)) == [messages.Suspension(2, "keep", False)]
    assert told(machine.handle(hello(0, 2, True), 3.001)) == []
    assert told(machine.handle(hello(1, 2, True), 3.002)) == [messages.Suspension(2, "keep", True)]
    machine.handle(hello(0, 2, False), 3.003)
    assert state(machine.handle(hello(1, 2, False), 3.004)) == messages.SuspensionState(2, "keep", True, [])


def test_calls_twice_are_answered_twice_and_done_once() -> None:
    machine = started()
    machine.handle(control("keep", 7), 2.0)
    effects = machine.handle(control("keep", 8, FRONTEND + 1), 2.0)
    assert one(said(effects, messages.ControlAnswer)) == messages.ControlAnswer(COORDINATOR, FRONTEND + 1, 8, 1)
    assert told(effects) == []


def test_what_is_so_already_is_answered_and_nobody_is_told() -> None:
    machine = suspended()
    effects = machine.handle(control("keep", 9), 3.0)
    assert one(said(effects, messages.ControlAnswer)).number == 1
    assert told(effects) == []
    machine = started()
    effects = machine.handle(control("resume", 9), 3.0)
    assert one(said(effects, messages.ControlAnswer)).number == 0
    assert told(effects) == []


def test_it_is_repeated_at_its_deadline_until_every_rank_has_answered() -> None:
    machine = started()
    machine.handle(control("keep"), 2.0)
    machine.handle(hello(0, 1, True), 2.0)
    assert machine.deadline == pytest.approx(2.0 + FIRST_S)
    assert told(machine.handle(events.Tick(), machine.deadline)) == [messages.Suspension(1, "keep")]
    machine.handle(hello(1, 1, True), 2.1)
    assert told(machine.handle(events.Tick(), 9.0)) == []


# Waves and suspensions ------------------------------------------------------------------------
@pytest.mark.parametrize("released", [False, True])
def test_notices_wake_nobody_while_paused_and_do_not_linger(released: bool) -> None:
    machine = suspended()
    if released:
        machine.handle(control("resume"), 3.0)
        machine.handle(hello(0, 2, True), 3.0)
    notice = events.FrontendSaid(messages.WakeNotice(FRONTEND, 0, 0))
    assert said(machine.handle(notice, 4.0), messages.StartDPWave) == []
    machine.handle(control("resume"), 5.0)
    for number, held in ((2, True), (2, False)):
        for rank in (0, 1):
            assert said(machine.handle(hello(rank, number, held), 5.0), messages.StartDPWave) == []
    assert said(machine.handle(notice, 6.0), messages.StartDPWave) == [messages.StartDPWave(0, 0)]


def test_a_notice_from_before_the_pause_wakes_nobody_in_it() -> None:
    machine = started()
    machine.handle(events.FrontendSaid(messages.WakeNotice(FRONTEND, 0, 0)), 2.0)
    assert machine.statistics()["lagging"] == [0, 1]
    machine.handle(control("keep"), 2.0)
    assert said(machine.handle(events.Tick(), 2.0 + FIRST_S), messages.StartDPWave) == []


def test_a_rank_that_started_before_it_heard_is_joined_by_the_others_under_a_new_number() -> None:
    machine = started()
    machine.handle(control("keep"), 2.0)
    machine.handle(hello(1, 1, True), 2.0)
    effects = machine.handle(events.RankSaid(messages.StartWave(0, 10, 0)), 2.001)
    assert said(effects, messages.StartDPWave) == [messages.StartDPWave(0, 0)]
    assert told(effects) == [messages.Suspension(3, "keep")]
    # What rank 1 said before the wake may still be on its way, and does not count.
    assert said(machine.handle(hello(1, 1, True), 2.002), messages.LoadView) == [], "nothing has changed"
    machine.handle(hello(1, 1, False, running=True), 2.003)
    for rank in (0, 1):
        machine.handle(hello(rank, 3, False, running=True), 2.004)
    machine.handle(hello(0, 3, True, wave=1), 2.005)
    assert state(machine.handle(hello(1, 3, True, wave=1), 2.005)) == messages.SuspensionState(3, "keep", True, [])


def test_wakes_that_are_repeated_number_each_time() -> None:
    machine = started()
    machine.handle(hello(0, running=True), 2.0)
    machine.handle(control("wait"), 2.0)
    before = machine.statistics()["suspension"]
    effects = machine.handle(events.Tick(), 2.0 + FIRST_S)
    assert len(said(effects, messages.StartDPWave)) == 1
    assert one(told(effects)).number == int(str(before)) + 2


def test_a_wake_while_nothing_is_paused_numbers_nothing() -> None:
    machine = started()
    effects = machine.handle(events.RankSaid(messages.StartWave(0, 10, 0)), 2.0)
    assert said(effects, messages.StartDPWave) == [messages.StartDPWave(0, 0)]
    assert told(effects) == []


# Soft state -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [3, 4])
def test_a_frontends_hello_carries_the_pause_to_a_new_coordinator(number: int) -> None:
    machine = started()
    effects = machine.handle(
        events.FrontendSaid(messages.FrontendHello(messages.PROTOCOL_VERSION, FRONTEND, number, "wait")), 2.0
    )
    assert told(effects) == [messages.Suspension(number, "wait", False)]
    assert state(effects) == messages.SuspensionState(number, "wait", False, [0, 1])


def test_a_frontend_that_knows_less_changes_nothing() -> None:
    machine = suspended()
    effects = machine.handle(events.FrontendSaid(messages.FrontendHello(messages.PROTOCOL_VERSION, FRONTEND, 0)), 3.0)
    assert state(effects) == messages.SuspensionState(1, "keep", True, [])


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_new_coordinator_finds_a_settled_pause_from_the_ranks_hellos(lockstep: bool) -> None:
    machine = Coordinator(2, COORDINATOR, 0.1, lockstep=lockstep)
    effects = machine.handle(hello(0, 5, True, mode="wait"), 0.0)
    assert told(effects) == [], "nobody who is known lacks it"
    assert state(effects) == messages.SuspensionState(5, "wait", False, [1])
    assert state(machine.handle(hello(1, 5, True, mode="wait"), 0.0)) == messages.SuspensionState(5, "wait", True, [])
    assert said(machine.handle(events.Tick(), 9.0), messages.StartDPWave) == []


def test_a_new_coordinator_completes_a_resumption() -> None:
    machine = Coordinator(2, COORDINATOR, 0.1)
    machine.handle(hello(0, 6, False), 0.0)
    effects = machine.handle(hello(1, 5, True), 0.0)
    assert state(effects) == messages.SuspensionState(6, "keep", False, [1])
    assert told(machine.handle(hello(1, 6, True), 0.0)) == [messages.Suspension(6, "keep", True)]
    assert state(machine.handle(hello(1, 6, False), 0.0)).settled


@pytest.mark.parametrize("ready", [False, True])
def test_a_new_coordinator_asks_and_whoever_joins_is_told_the_pause(ready: bool) -> None:
    machine = suspended()
    assert said(machine.handle(events.RankSubscribed(), 3.0), messages.Identify)
    effects = machine.handle(hello(1, 0, False, ready=ready, life=21), 3.0)
    assert state(effects) == messages.SuspensionState(1, "keep", False, [1])
    if ready:
        assert told(effects) == [messages.Suspension(1, "keep")]
    else:
        assert one(said(effects, messages.Admit)) == messages.Admit(1, 21, 0, messages.Suspension(1, "keep"))


# Ranks that are away --------------------------------------------------------------------------
def test_in_lockstep_a_rank_that_is_away_is_waited_for_and_named() -> None:
    machine = started()
    machine.handle(events.RankSaid(messages.RankLeaving(1, 11)), 2.0)
    machine.handle(control("keep"), 2.0)
    machine.handle(hello(0, 1, True), 2.0)
    assert state(machine.handle(events.Tick(), 2.2)) == messages.SuspensionState(1, "keep", False, [1])
    machine.handle(hello(1, 0, False, ready=False, life=21), 3.0)
    assert state(machine.handle(hello(1, 1, True, life=21), 3.0)).settled


def test_an_independent_rank_that_has_left_is_not_waited_for() -> None:
    machine = started(lockstep=False)
    machine.handle(events.RankSaid(messages.RankLeaving(1, 11)), 2.0)
    machine.handle(control("keep"), 2.0)
    assert state(machine.handle(hello(0, 1, True), 2.0)).settled


# Generations ----------------------------------------------------------------------------------
def test_form_is_broadcast_and_repeated_until_all_have_formed() -> None:
    machine = Coordinator(2, COORDINATOR, 0.1)
    effects = machine.handle(hello(0, ready=False, group="group 0"), 0.0)
    assert said(effects, messages.Form) == []
    assert said(effects, messages.Admit) == [], "it is ready when it has formed"
    effects = machine.handle(hello(1, ready=False, group="group 1"), 0.0)
    form = one(said(effects, messages.Form))
    members = [messages.GroupMember(0, 10, "group 0"), messages.GroupMember(1, 11, "group 1")]
    assert form == messages.Form(1, 0, members, messages.Suspension(0, "keep", True))
    machine.handle(hello(0, group="group 0", epoch=1), 0.01)
    assert machine.deadline <= FIRST_S
    assert said(machine.handle(events.Tick(), FIRST_S), messages.Form) == [form]
    machine.handle(hello(1, group="group 1", epoch=1), 0.2)
    assert said(machine.handle(events.Tick(), 5.0), messages.Form) == []
    assert machine.statistics()["generation"] == 1
    assert machine.statistics()["ready"] == [0, 1]


def test_form_tells_the_wave_and_the_pause() -> None:
    machine = Coordinator(2, COORDINATOR, 0.1)
    for rank in (0, 1):
        machine.handle(hello(rank, 3, True, wave=6, group=f"group {rank}", epoch=4), 0.0)
    effects = machine.handle(hello(1, ready=False, group="group 1", life=21), 1.0)
    assert said(effects, messages.Form) == [], "rank 0 has not said anything since"
    effects = machine.handle(hello(0, 3, True, wave=6, group="group 0", epoch=4), 1.0)
    form = one(said(effects, messages.Form))
    assert (form.generation, form.wave, form.suspension) == (5, 6, messages.Suspension(3, "keep"))
    assert form.members[1] == messages.GroupMember(1, 21, "group 1")


def test_ranks_whose_epoch_has_ended_are_asked_until_all_have_spoken() -> None:
    machine = Coordinator(2, COORDINATOR, 0.1)
    for rank in (0, 1):
        machine.handle(hello(rank, group=f"group {rank}", epoch=4), 0.0)
    machine.handle(events.Tick(), 1.0)
    effects = machine.handle(hello(0, group="group 0", epoch=0), 2.0)
    asked = len(said(effects, messages.Identify))
    while machine.deadline < 3.9:
        asked += len(said(machine.handle(events.Tick(), machine.deadline), messages.Identify))
    assert asked >= 3, "a question that was lost is asked again"
    effects = machine.handle(hello(1, group="group 1", epoch=4), 3.9)
    assert one(said(effects, messages.Form)).generation == 5


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_hello_of_a_new_rank_is_no_reason_to_ask_all(lockstep: bool) -> None:
    machine = Coordinator(2, COORDINATOR, 0.1, lockstep=lockstep)
    asked = 0
    for rank in (0, 1):
        asked += len(said(machine.handle(hello(rank), 1.0 + rank), messages.Identify))
        asked += len(said(machine.handle(events.Tick(), 1.5 + rank), messages.Identify))
    assert asked == 0


def test_independent_ranks_form_nothing() -> None:
    machine = Coordinator(1, COORDINATOR, 0.1, lockstep=False)
    effects = machine.handle(hello(0, ready=False, group="group 0"), 0.0)
    assert said(effects, messages.Form) == []
    assert one(said(effects, messages.Admit)).rank == 0


def test_a_rank_beyond_the_deployment_is_of_no_epoch_and_holds_up_no_pause() -> None:
    machine = started()
    effects = machine.handle(hello(2, group="group 2", ready=False), 2.0)
    assert said(effects, messages.Form) == []
    assert state(machine.handle(control("keep"), 2.0)).waiting_for == [0, 1]
