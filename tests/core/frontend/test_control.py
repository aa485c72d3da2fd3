"""A front-end's machine: calls to pause and to resume, what becomes of them, and what it believes."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from paceline.core import messages
from paceline.core.frontend import events
from paceline.core.frontend.control import ASK_AGAIN_S
from paceline.core.frontend.machine import Frontend
from paceline.core.requests import AddRequest, ControlAction, SamplingParams, SuspendMode
from paceline.core.routing import LeastLoad
from tests.core.harness import find, one, said

IDENTITY = 100


class Views:
    """What one coordinator publishes, numbered."""

    def __init__(self, machine: Frontend, coordinator: int = 1) -> None:
        self.machine, self.coordinator, self.number = machine, coordinator, 0

    def state(self, number: int, settled: bool, mode: SuspendMode = "keep") -> list[events.Effect]:
        self.number += 1
        state = messages.SuspensionState(number, mode, settled, [] if settled else [1])
        return hear(self.machine, messages.LoadView(self.coordinator, self.number, 0, False, None, {}, state))


def hear(
    machine: Frontend, message: messages.Members | messages.LoadView | messages.ControlAnswer
) -> list[events.Effect]:
    return machine.handle(events.CoordinatorSaid(message), 0.0)


def members(machine: Frontend, coordinator: int = 1) -> list[events.Effect]:
    return hear(
        machine, messages.Members(messages.PROTOCOL_VERSION, coordinator, 0, False, [messages.Member(0, 10, "address")])
    )


def fresh() -> tuple[Frontend, Views]:
    machine = Frontend(IDENTITY, LeastLoad())
    members(machine)
    return machine, Views(machine)


def ask(machine: Frontend, call: int, action: ControlAction) -> list[events.Effect]:
    return machine.handle(events.Control(call, action), 0.0)


def answer(machine: Frontend, call: int, number: int, frontend: int = IDENTITY) -> list[events.Effect]:
    return hear(machine, messages.ControlAnswer(1, frontend, call, number))


@pytest.mark.parametrize("action", ["keep", "wait", "abort", "resume"])
def test_a_call_is_sent_on_and_repeated_until_it_is_served(action: ControlAction) -> None:
    machine, views = fresh()
    request = messages.ControlRequest(IDENTITY, 7, action)
    assert said(ask(machine, 7, action), messages.ControlRequest) == [request]
    assert machine.deadline == ASK_AGAIN_S
    assert not machine.handle(events.Tick(), ASK_AGAIN_S / 2)
    answer(machine, 7, 1)
    for now in (ASK_AGAIN_S, 2 * ASK_AGAIN_S):
        again = one(said(machine.handle(events.Tick(), now), messages.ControlRequest))
        assert again == messages.ControlRequest(IDENTITY, 7, action, answered=1)
    views.state(1, True)
    assert machine.deadline == float("inf")


def test_a_call_says_what_the_frontend_knows() -> None:
    machine, views = fresh()
    views.state(3, True, "abort")
    asked = one(said(ask(machine, 7, "resume"), messages.ControlRequest))
    assert asked == messages.ControlRequest(IDENTITY, 7, "resume", 0, 3, "abort")


def test_a_call_is_served_once_its_number_is_settled() -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    assert views.state(1, False) == []
    assert answer(machine, 7, 1) == []
    assert views.state(1, False) == []
    assert views.state(1, True) == [events.Controlled(7, 1, False)]
    assert views.state(1, True) == [], "once"


def test_the_answer_may_come_after_the_state() -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    assert views.state(1, True) == [], "whether this is what was asked for, nobody has said"
    assert answer(machine, 7, 1) == [events.Controlled(7, 1, False)]


def test_a_settled_state_from_before_serves_nobody() -> None:
    machine, views = fresh()
    views.state(2, True)
    ask(machine, 7, "keep")
    assert answer(machine, 7, 3) == []
    assert views.state(2, True) == []
    assert views.state(3, True) == [events.Controlled(7, 3, False)]


def test_a_wake_in_between_raises_the_number_and_the_call_goes_on() -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    answer(machine, 7, 1)
    assert views.state(3, False) == []
    assert views.state(5, True) == [events.Controlled(7, 5, False)]


@pytest.mark.parametrize("settled", [False, True])
def test_a_call_is_superseded_by_the_contrary(settled: bool) -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    answer(machine, 7, 1)
    assert views.state(2, settled) == [events.Controlled(7, 2, True)]


def test_calls_that_wait_for_the_same_are_served_together() -> None:
    machine, views = fresh()
    for call, number in ((7, 1), (8, 1), (9, 2)):
        ask(machine, call, "keep" if number == 1 else "resume")
        answer(machine, call, number)
    assert views.state(1, True) == [events.Controlled(7, 1, False), events.Controlled(8, 1, False)]
    assert views.state(2, True) == [events.Controlled(9, 2, False)]


def test_a_call_that_is_given_up_is_served_no_more() -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    assert machine.handle(events.ControlGivenUp(7), 0.0) == []
    assert machine.handle(events.ControlGivenUp(7), 0.0) == []
    assert answer(machine, 7, 1) == []
    assert views.state(1, True) == []


def test_answers_to_others_are_not_ours() -> None:
    machine, views = fresh()
    ask(machine, 7, "keep")
    assert answer(machine, 7, 1, frontend=IDENTITY + 1) == []
    assert answer(machine, 8, 1) == []
    assert views.state(1, True) == []


def test_a_call_that_another_coordinator_numbered_is_numbered_anew() -> None:
    machine, _ = fresh()
    ask(machine, 7, "keep")
    answer(machine, 7, 5)
    members(machine, coordinator=2)
    later = Views(machine, coordinator=2)
    assert later.state(3, True) == []
    machine.handle(events.Tick(), ASK_AGAIN_S)
    assert answer(machine, 7, 3) == [events.Controlled(7, 3, False)]


def test_a_coordinator_that_knows_less_is_told_the_number_that_perhaps_nobody_else_knows() -> None:
    machine, views = fresh()
    assert views.state(3, True, "wait") == []
    later = Views(machine, coordinator=2)
    assert one(said(later.state(0, True), messages.FrontendHello)) == messages.FrontendHello(
        messages.PROTOCOL_VERSION, IDENTITY, 3, "wait"
    )
    assert later.state(3, False, "wait") == []


# The number -----------------------------------------------------------------------------------
def test_a_new_coordinator_that_knows_less_does_not_take_the_number_down() -> None:
    machine, views = fresh()
    views.state(3, True, "abort")
    Views(machine, coordinator=2).state(0, True)
    assert (machine.suspension.number, machine.suspension.mode) == (3, "abort")


def test_a_new_coordinator_is_told_the_number() -> None:
    machine, views = fresh()
    views.state(3, True, "wait")
    hello = messages.FrontendHello(messages.PROTOCOL_VERSION, IDENTITY, 3, "wait")
    assert one(said(members(machine, coordinator=2), messages.FrontendHello)) == hello
    assert one(said(machine.handle(events.Connected(), 0.0), messages.FrontendHello)) == hello


@given(states=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8), st.booleans()), max_size=20))
def test_the_number_never_goes_down(states: list[tuple[int, int, bool]]) -> None:
    machine, _ = fresh()
    by_coordinator = {coordinator: Views(machine, coordinator) for coordinator in (1, 2, 3)}
    for coordinator, number, settled in states:
        before = machine.suspension.number
        by_coordinator[coordinator].state(number, settled)
        assert machine.suspension.number == max(before, number)


# Requests -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "refused"), [("keep", False), ("wait", False), ("abort", True)])
@pytest.mark.parametrize("settled", [False, True])
def test_requests_are_refused_while_all_are_aborted_and_only_then(
    mode: SuspendMode, refused: bool, settled: bool
) -> None:
    machine, views = fresh()
    views.state(1, settled, mode)
    effects = machine.handle(events.Submit(1, [1], SamplingParams(2)), 0.0)
    assert len(find(effects, events.Refuse, reason="suspended")) == refused
    assert len(said(find(effects, events.ToRank), AddRequest)) == (not refused)
    views.state(2, False, mode)
    effects = machine.handle(events.Submit(2, [1], SamplingParams(2)), 0.0)
    assert find(effects, events.Refuse) == []
    assert machine.in_flight() == 2 - refused


def test_a_rank_that_is_unknown_is_named_before_the_pause() -> None:
    machine, views = fresh()
    views.state(1, True, "abort")
    effects = machine.handle(events.Submit(1, [1], SamplingParams(2), rank=5), 0.0)
    assert one(find(effects, events.Refuse)).reason == "unknown-rank"


def test_statistics_tell_the_pause() -> None:
    machine, views = fresh()
    views.state(1, False, "wait")
    assert machine.statistics()["suspension"] == {"number": 1, "mode": "wait", "settled": False, "waiting_for": [1]}
