"""A front-end's machine: its sends, what is in flight, and whom it tells of them."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core import binding, messages
from paceline.core.frontend import events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.requests import AbortRequests, AddRequest, CallEngine, Output, Outputs, SamplingParams
from paceline.core.routing import LeastLoad
from tests.core.harness import find, one, said

IDENTITY = 100


def members(
    *lives: tuple[int, int], coordinator: int = 1, wave: int = 0, running: bool = False, **more: Any
) -> events.CoordinatorSaid:
    ready = [messages.Member(rank, incarnation, f"address {incarnation}") for rank, incarnation in lives]
    return events.CoordinatorSaid(
        messages.Members(messages.PROTOCOL_VERSION, coordinator, wave, running, ready, **more)
    )


def view(
    number: int, *ranks: messages.RankView, coordinator: int = 1, wave: int = 0, running: bool = False
) -> events.CoordinatorSaid:  # fmt: skip
    return events.CoordinatorSaid(messages.LoadView(coordinator, number, wave, running, list(ranks) or None))


def frontend(*lives: tuple[int, int], **settings: Any) -> Frontend:
    machine = Frontend(IDENTITY, LeastLoad(), **settings)
    machine.handle(members(*(lives or ((0, 10), (1, 11)))), 0.0)
    return machine


def submit(machine: Frontend, request: int, tokens: int = 4, rank: int | None = None) -> list[events.Effect]:
    return machine.handle(events.Submit(request, [7] * tokens, SamplingParams(5), rank, priority=3), 0.0)


def outputs(rank: int, incarnation: int, *requests: int, finish: str | None = None) -> events.RankSaid:
    made = [Output(request, [1], "x", finish) for request in requests]  # type: ignore[arg-type]
    return events.RankSaid(Outputs(rank, incarnation, made))


# Sending --------------------------------------------------------------------------------------
def test_it_says_hello_when_it_is_connected() -> None:
    effects = Frontend(IDENTITY, LeastLoad()).handle(events.Connected(), 0.0)
    assert find(effects, events.ToCoordinator, message=messages.FrontendHello(messages.PROTOCOL_VERSION, IDENTITY))


def test_a_request_goes_to_a_rank_with_all_that_the_client_said() -> None:
    machine = frontend()
    machine.handle(view(1, wave=6), 0.0)
    effects = submit(machine, 55, rank=1)
    assert find(effects, events.ToRank, rank=1)
    assert find(effects, events.Placed, request=55, rank=1)
    add = one(said(effects, AddRequest, request=55, incarnation=11, wave=6, priority=3))
    assert (add.prompt_token_ids, add.params) == ([7] * 4, SamplingParams(5))
    assert machine.in_flight() == 1


def test_sends_are_numbered_from_1_for_each_life_of_each_rank() -> None:
    machine = frontend()
    order = [0, 1, 1, 0, 1]
    sent = [one(said(submit(machine, i, rank=rank), AddRequest)).number for i, rank in enumerate(order)]
    assert sent == [1, 1, 2, 2, 3]
    # The three that the old life had go to rank 0, which has the fewest.
    machine.handle(members((0, 10), (1, 99)), 0.0)
    assert said(submit(machine, 10, rank=1), AddRequest, number=1, incarnation=99)
    assert said(submit(machine, 11, rank=0), AddRequest, number=6)


def test_the_coordinator_is_told_to_wake_only_in_lockstep_and_while_the_ranks_are_paused() -> None:
    machine = frontend(lockstep=True)
    machine.handle(view(1, wave=4), 0.0)
    assert find(submit(machine, 1, rank=1), events.ToCoordinator, message=messages.WakeNotice(IDENTITY, 1, 4))
    machine.handle(view(2, wave=4, running=True), 0.0)
    assert not said(submit(machine, 2), messages.WakeNotice)
    machine.handle(members((0, 10), (1, 11), wave=5), 0.0)
    assert said(submit(machine, 3), messages.WakeNotice, wave=5)
    assert not said(submit(frontend(lockstep=False), 1), messages.WakeNotice)


def test_sends_are_shared_only_where_others_balance_over_the_same_ranks() -> None:
    machine = frontend(relay_sends=True)
    submit(machine, 1, rank=0)
    notice = one(said(submit(machine, 2, tokens=9, rank=0), binding.SendNotice, frontend=IDENTITY))
    assert notice.sends == [binding.Send(0, 10, 2, 9, 5)]
    assert not said(submit(frontend(), 1), binding.SendNotice)


# Refusals -------------------------------------------------------------------------------------
def test_a_rank_that_is_not_here_is_refused_by_name() -> None:
    machine = frontend(relay_sends=True, lockstep=True)
    effects = submit(machine, 5, rank=7)
    refusal = one(find(effects, events.Refuse, request=5, reason="unknown-rank"))
    assert "rank 7" in refusal.text
    assert "0, 1" in refusal.text
    assert len(effects) == 1
    assert machine.in_flight() == 0


def test_without_a_rank_every_request_is_refused() -> None:
    machine = Frontend(IDENTITY, LeastLoad())
    assert one(submit(machine, 5)) == one(find(submit(machine, 5), events.Refuse, request=5, reason="no-rank"))
    assert "none" in one(find(submit(machine, 6, rank=0), events.Refuse, reason="unknown-rank")).text


def test_when_too_many_wait_for_a_slot_requests_are_refused() -> None:
    machine = frontend(max_waiting=3)
    ranks = [messages.RankView(rank, 10 + rank, 1, Load(waiting=1, running=4, slots=4)) for rank in (0, 1)]
    machine.handle(view(1, *ranks), 0.0)
    assert machine.waiting() == 2
    assert find(submit(machine, 1), events.Placed)
    assert find(submit(machine, 2), events.Refuse, request=2, reason="overloaded", retry_after_s=1)
    machine.handle(view(2, messages.RankView(0, 10, 2, Load(running=1, slots=4), {IDENTITY: 1})), 0.0)
    assert find(submit(machine, 3), events.Placed)


def test_who_is_refused_is_told_when_there_will_be_a_place() -> None:
    """One request is under way at a time and takes 7 s."""
    machine = frontend(max_waiting=1)
    full = Load(waiting=1, running=4, slots=4)
    for number in range(3):
        machine.handle(events.Submit(number + 1, [1], SamplingParams(5), rank=0), 7.0 * number)
        machine.handle(
            events.RankSaid(Outputs(0, 10, [Output(number + 1, [1], finish_reason="length")])), 7.0 * number + 7.0
        )
        machine.handle(view(number + 1, messages.RankView(0, 10, number, Load(slots=4), {IDENTITY: number + 1})), 21.0)
    machine.handle(events.Submit(8, [1], SamplingParams(5), rank=0), 21.0)
    machine.handle(view(9, messages.RankView(0, 10, 9, full, {IDENTITY: 4}), messages.RankView(1, 11, 9, full)), 21.0)
    told = [
        one(machine.handle(events.Submit(number, [1], SamplingParams(5)), 21.0)).retry_after_s for number in (9, 10, 11)
    ]
    assert told == [7, 14, 21]


# What comes back ------------------------------------------------------------------------------
def test_outputs_are_delivered_until_the_last_one() -> None:
    machine = frontend()
    for request in (1, 2):
        submit(machine, request, rank=0)
    assert [o.request for o in one(machine.handle(outputs(0, 10, 1, 2), 0.0)).outputs] == [1, 2]
    assert machine.in_flight() == 2
    assert one(machine.handle(outputs(0, 10, 1, finish="stop"), 0.0)).outputs[0].finish_reason == "stop"
    assert machine.in_flight() == 1
    assert machine.handle(outputs(0, 10, 1), 0.0) == []


def test_what_clients_abandon_is_aborted_rank_by_rank_and_comes_no_more() -> None:
    machine = frontend()
    for request, rank in ((1, 0), (2, 1), (3, 0), (4, 1)):
        submit(machine, request, rank=rank)
    effects = machine.handle(events.Abandon([1, 2, 3, 77]), 0.0)
    assert [(e.rank, e.message) for e in find(effects, events.ToRank)] == [
        (0, AbortRequests([1, 3])),
        (1, AbortRequests([2])),
    ]
    assert machine.in_flight() == 1
    assert machine.handle(outputs(0, 10, 1, 3), 0.0) == []
    delivered = one(find(machine.handle(outputs(1, 11, 2, 4), 0.0), events.Deliver)).outputs
    assert [output.request for output in delivered] == [4]
    assert machine.handle(events.Abandon([1, 2, 3]), 0.0) == []


def test_what_an_old_life_or_a_stranger_sends_is_void() -> None:
    machine = frontend()
    submit(machine, 1, rank=0)
    for rank, incarnation in ((0, 9), (1, 10), (7, 10)):
        assert machine.handle(outputs(rank, incarnation, 1), 0.0) == []
    assert machine.statistics()["void_messages"] == 3
    assert find(machine.handle(outputs(0, 10, 1), 0.0), events.Deliver)


# Ranks that come and go -----------------------------------------------------------------------
def test_a_new_member_is_connected_to_once() -> None:
    machine = frontend()
    effects = machine.handle(members((0, 10), (1, 11), (2, 12), missing=[3]), 0.0)
    assert effects == find(effects, events.Connect, member=messages.Member(2, 12, "address 12"))
    assert len(effects) == 1
    assert machine.handle(members((0, 10), (1, 11), (2, 12)), 0.0) == []
    assert machine.ready_ranks() == [0, 1, 2]


def test_a_new_life_is_connected_to_in_place_of_the_old_one_whose_requests_go_elsewhere() -> None:
    machine = frontend()
    for request, rank in ((1, 0), (2, 1), (3, 0)):
        submit(machine, request, rank=rank)
    effects = machine.handle(members((0, 99), (1, 11)), 0.0)
    assert [type(effect) for effect in effects] == [
        events.Disconnect, events.ToRank, events.Moved, events.ToRank, events.Moved, events.Connect
    ]  # fmt: skip
    assert find(effects, events.Moved, before=0, rank=1, tokens=0, why="it has ended")
    assert [effect.rank for effect in find(effects, events.ToRank)] == [1, 1]
    assert find(effects, events.Disconnect, rank=0)
    assert find(effects, events.Connect, member=messages.Member(0, 99, "address 99"))
    assert machine.in_flight() == 3
    assert machine.believed(0) == Load()


def test_a_rank_that_has_ended_is_lost() -> None:
    machine = frontend()
    submit(machine, 1, rank=0)
    effects = machine.handle(members((1, 11), missing=[0], ended=[(0, 10)]), 0.0)
    assert find(effects, events.Disconnect, rank=0)
    assert find(effects, events.ToRank, rank=1)
    assert (machine.ready_ranks(), machine.missing) == ([1], [0])


def test_a_coordinator_that_came_back_empty_loses_nothing() -> None:
    machine = frontend()
    submit(machine, 1, rank=0)
    effects = machine.handle(members(coordinator=2, missing=[0, 1]), 0.0)
    # The new one does not know who there is.
    assert effects == find(
        effects, events.ToCoordinator, message=messages.FrontendHello(messages.PROTOCOL_VERSION, IDENTITY)
    )
    # Nor does an end of a life that is over anyway.
    assert machine.handle(members(coordinator=2, ended=[(0, 9)]), 0.0) == []
    assert machine.ready_ranks() == [0, 1]
    assert find(submit(machine, 2, rank=1), events.ToRank)
    assert find(machine.handle(outputs(0, 10, 1), 0.0), events.Deliver)


def test_a_rank_whose_address_is_none_is_lost_and_not_tried_again_in_this_life() -> None:
    machine = frontend()
    submit(machine, 1, rank=0)
    effects = machine.handle(events.LinkFailed(0), 0.0)
    assert find(effects, events.ToRank, rank=1)
    assert find(effects, events.Moved, before=0, rank=1, why="it could not be reached")
    assert machine.handle(members((0, 10), (1, 11)), 0.0) == []
    assert machine.ready_ranks() == [1]
    assert find(machine.handle(members((0, 99), (1, 11)), 0.0), events.Connect)


def test_hybrid_mode_knows_only_its_own_ranks() -> None:
    machine = Frontend(IDENTITY, LeastLoad(), ranks=frozenset({2, 3}))
    effects = machine.handle(members((0, 10), (1, 11), (2, 12), missing=[3, 4], ended=[(0, 9)]), 0.0)
    assert [effect.member.rank for effect in find(effects, events.Connect)] == [2]
    assert (machine.ready_ranks(), machine.missing) == ([2], [3])
    assert one(find(submit(machine, 1), events.Placed)).rank == 2
    assert find(submit(machine, 2, rank=0), events.Refuse, reason="unknown-rank")
    machine.handle(view(1, messages.RankView(0, 10, 1, Load(9)), messages.RankView(2, 12, 1, Load(5))), 0.0)
    assert machine.believed(2).waiting == 6


# The view -------------------------------------------------------------------------------------
def test_a_belief_is_the_report_and_what_it_has_not_taken() -> None:
    machine = frontend()
    for request in range(3):
        submit(machine, request, tokens=10, rank=0)
    assert (machine.believed(0).waiting, machine.believed(0).prefill_tokens) == (3, 30)
    machine.handle(view(1, messages.RankView(0, 10, 1, Load(5, prefill_tokens=50), {IDENTITY: 2, 200: 9})), 0.0)
    assert (machine.believed(0).waiting, machine.believed(0).prefill_tokens) == (6, 60)


def test_views_of_one_coordinator_never_go_back_and_those_of_the_next_begin_anew() -> None:
    machine = frontend()
    machine.handle(view(7, messages.RankView(0, 10, 5, Load(1))), 0.0)
    for number in (7, 6):
        machine.handle(view(number, messages.RankView(0, 10, 6, Load(2))), 0.0)
    assert machine.believed(0).waiting == 1
    assert machine.statistics()["void_messages"] == 2
    machine.handle(view(1, messages.RankView(0, 10, 6, Load(3)), coordinator=2), 0.0)
    assert machine.believed(0).waiting == 3


def test_a_report_of_an_older_step_or_another_life_changes_nothing() -> None:
    machine = frontend()
    machine.handle(view(1, messages.RankView(0, 10, 5, Load(1))), 0.0)
    machine.handle(view(2, messages.RankView(0, 10, 4, Load(2)), messages.RankView(1, 99, 9, Load(2))), 0.0)
    assert (machine.believed(0).waiting, machine.believed(1).waiting) == (1, 0)


def test_what_others_have_unacked_counts_in_routing_and_ones_own_does_not_count_twice() -> None:
    machine = frontend()
    others = [messages.OnTheWire(200, 9, 9, 9_000), messages.OnTheWire(IDENTITY, 1, 1, 4)]
    machine.handle(view(1, messages.RankView(0, 10, 1, Load(), {}, others), messages.RankView(1, 11, 1, Load(2))), 0.0)
    assert one(find(submit(machine, 1), events.Placed)).rank == 1
    assert machine.believed(0) == Load()
    machine = frontend()
    own = [messages.OnTheWire(IDENTITY, 9, 9, 9_000)]
    machine.handle(view(1, messages.RankView(0, 10, 1, Load(), {}, own), messages.RankView(1, 11, 1, Load(2))), 0.0)
    assert one(find(submit(machine, 1), events.Placed)).rank == 0


def test_a_view_that_knows_one_send_makes_no_rank_look_free() -> None:
    """A view made after the first send of a burst and read amid it: its rank is no less loaded than the others."""
    lives = [(rank, 10 + rank) for rank in range(4)]
    machine = Frontend(IDENTITY, LeastLoad(0, 2), relay_sends=True)
    machine.handle(members(*lives), 0.0)
    for request in range(28):
        submit(machine, request)
    entries = [messages.RankView(rank, life, 0, Load()) for rank, life in lives]
    entries[0] = messages.RankView(0, 10, 1, Load(waiting=1, prefill_tokens=4), {IDENTITY: 1})
    machine.handle(events.CoordinatorSaid(messages.LoadView(1, 1, 0, False, entries, {IDENTITY: 1})), 0.0)
    for request in range(28, 32):
        submit(machine, request)
    assert [load["in_flight"] for load in machine.loads()] == [8, 8, 8, 8]


def test_the_wave_never_goes_down_whoever_says_so() -> None:
    machine = frontend(lockstep=True)
    machine.handle(view(1, wave=5, running=True), 0.0)
    machine.handle(view(1, coordinator=2, wave=0), 0.0)
    machine.handle(members((0, 10), coordinator=2, wave=4), 0.0)
    assert (machine.wave, machine.running) == (5, True)
    machine.handle(view(2, coordinator=2, wave=5), 0.0)
    assert (machine.wave, machine.running) == (5, False)


def test_what_is_no_event_raises_and_names_it() -> None:
    with pytest.raises(TypeError, match="Load is not an event"):
        frontend().handle(Load(), 0.0)  # type: ignore[arg-type]


# Calls to ranks' engines ------------------------------------------------------------------------


def calls_of(effects: list[events.Effect]) -> dict[int, CallEngine]:
    sent = [(one.rank, one.message) for one in effects if isinstance(one, events.ToRank)]
    return {rank: message for rank, message in sent if isinstance(message, CallEngine)}


def answered(machine: Frontend, rank: int, call: CallEngine, text: str, error: str | None = None) -> Any:
    output = Output(call.call, [], text, "stop" if error is None else "error", error=error)
    effects = machine.handle(events.RankSaid(Outputs(rank, call.incarnation, [output])), 0.0)
    return next((one for one in effects if isinstance(one, events.Called)), None)


def test_a_call_has_each_rank_s_answer() -> None:
    machine = frontend()
    calls = calls_of(machine.handle(events.CallRanks(7, "sleep", "{}"), 0.0))
    assert sorted(calls) == [0, 1]
    assert answered(machine, 0, calls[0], "true") is None
    assert answered(machine, 0, calls[0], "false") is None, "it has answered"
    assert answered(machine, 1, calls[1], "", "why") == events.Called(7, {0: "true"}, {1: "why"})


def test_a_call_names_ranks_and_ends_with_those_that_are_lost() -> None:
    machine = frontend()
    calls = calls_of(machine.handle(events.CallRanks(7, "sleep", "{}", [1, 5]), 0.0))
    assert sorted(calls) == [1]
    effects = machine.handle(events.LinkDown(1), 0.0)
    (called,) = [one for one in effects if isinstance(one, events.Called)]
    assert sorted(called.errors) == [1, 5]
    assert machine.handle(events.CallRanks(8, "sleep", "{}", [5]), 0.0) == [events.Called(8, {}, {5: "is not there"})]


def test_a_call_that_is_given_up_is_nobody_s() -> None:
    machine = frontend()
    calls = calls_of(machine.handle(events.CallRanks(7, "sleep", "{}"), 0.0))
    machine.handle(events.ControlGivenUp(7), 0.0)
    assert answered(machine, 0, calls[0], "true") is None
    assert answered(machine, 1, calls[1], "true") is None
