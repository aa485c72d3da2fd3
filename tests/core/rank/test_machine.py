"""A rank's machine: joining, taking requests in, running and idling in waves and epochs, reporting load."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core import messages
from paceline.core.load import Load
from paceline.core.rank import events
from paceline.core.rank.machine import HELLO_REPEAT_S, Rank
from paceline.core.requests import AbortRequests, AddRequest, CallEngine, Output, Outputs, SamplingParams
from tests.core.harness import find, one, said

NUMBER, LIFE = 3, 33
FIRST, SECOND = 100, 200
IDLE = events.Turn(Load(), False)


def joining(**settings: Any) -> Rank:
    machine = Rank(NUMBER, LIFE, "address", **settings)
    machine.handle(events.Loaded(), 0.0)
    return machine


def ready(wave: int = 0, **settings: Any) -> Rank:
    machine = joining(**settings)
    machine.handle(events.CoordinatorSaid(messages.Admit(NUMBER, LIFE, wave)), 0.0)
    return machine


def add(
    machine: Rank, request: int, frontend: int = FIRST, number: int = 1, wave: int = 0, incarnation: int = LIFE
) -> list[events.Effect]:
    message = AddRequest(request, number, incarnation, wave, [1, 2], SamplingParams(4))
    return machine.handle(events.FrontendSaid(frontend, message), 0.0)


def key_of(effects: list[events.Effect]) -> int:
    return one(find(effects, events.Take)).key


def start(machine: Rank, wave: int, exclude: int | None = None) -> list[events.Effect]:
    return machine.handle(events.CoordinatorSaid(messages.StartDPWave(wave, exclude)), 0.0)


def stepped(
    machine: Rank, *outputs: events.StepOutput, load: Load | None = None, has_work: bool = False
) -> list[events.Effect]:
    return machine.handle(events.Stepped(outputs, load or Load(), has_work), 0.0)


# Joining --------------------------------------------------------------------------------------
def test_the_hello_is_repeated_until_the_rank_is_admitted() -> None:
    machine = Rank(NUMBER, LIFE, "address")
    hello = one(
        said(machine.handle(events.Loaded(), 5.0), messages.RankHello, rank=NUMBER, incarnation=LIFE, address="address")
    )
    assert (hello.version, hello.ready) == (messages.PROTOCOL_VERSION, False)
    assert find(machine.handle(IDLE, 5.01), events.Wait, until=5.0 + HELLO_REPEAT_S)
    effects = machine.handle(IDLE, 5.0 + HELLO_REPEAT_S)
    assert said(effects, messages.RankHello, ready=False)
    assert one(find(effects, events.Wait)).until == pytest.approx(5.0 + 2 * HELLO_REPEAT_S)
    effects = machine.handle(events.CoordinatorSaid(messages.Admit(NUMBER, LIFE, 6)), 5.15)
    assert said(effects, messages.RankHello, ready=True, wave=6, running=False)
    assert find(machine.handle(IDLE, 9.0), events.Wait, until=None)
    assert not said(machine.handle(IDLE, 19.0), messages.RankHello)


def test_an_admission_of_another_rank_or_life_or_a_second_one_changes_nothing() -> None:
    machine = joining()
    for rank, life in ((NUMBER, 32), (NUMBER + 1, LIFE)):
        assert machine.handle(events.CoordinatorSaid(messages.Admit(rank, life, 6)), 0.0) == []
    assert machine.statistics()["phase"] == "joining"
    machine = ready(wave=4)
    assert machine.handle(events.CoordinatorSaid(messages.Admit(NUMBER, LIFE, 4)), 0.0) == []
    assert machine.wave == 4


def test_a_ready_rank_is_told_of_waves_that_were_finished_while_it_joined_unless_it_runs() -> None:
    machine = ready(wave=4, lockstep=True)
    assert said(
        machine.handle(events.CoordinatorSaid(messages.Admit(NUMBER, LIFE, 9)), 0.0),
        messages.RankHello,
        ready=True,
        wave=9,
    )
    add(machine, 1, wave=9)
    assert machine.handle(events.CoordinatorSaid(messages.Admit(NUMBER, LIFE, 11)), 0.0) == []
    assert (machine.wave, machine.running) == (9, True)


def test_who_asks_is_told_who_it_is_once_the_engine_is_there() -> None:
    identify = events.CoordinatorSaid(messages.Identify(messages.PROTOCOL_VERSION, 1))
    assert Rank(NUMBER, LIFE, "address").handle(identify, 0.0) == []
    assert said(joining().handle(identify, 0.0), messages.RankHello, ready=False)
    machine = ready(wave=2, lockstep=True)
    start(machine, 2)
    assert said(machine.handle(identify, 0.0), messages.RankHello, ready=True, wave=2, running=True)


def test_who_asks_is_told_the_load_too() -> None:
    machine = ready()
    turn = events.Turn(Load(2, 3), True)
    assert said(machine.handle(turn, 0.0), messages.RankReport)
    machine.handle(events.CoordinatorSaid(messages.Identify(messages.PROTOCOL_VERSION, 2)), 1.0)
    assert said(machine.handle(turn, 1.0), messages.RankReport, load=Load(2, 3))


def test_a_rank_says_that_it_leaves() -> None:
    assert said(ready().handle(events.Leave(), 0.0), messages.RankLeaving, rank=NUMBER, incarnation=LIFE)


# Requests -------------------------------------------------------------------------------------
def test_a_request_is_given_to_the_engine_and_stepped_for() -> None:
    machine = ready()
    take = one(find(add(machine, 7), events.Take))
    assert (take.request.request, take.request.prompt_token_ids) == (7, [1, 2])
    assert find(machine.handle(events.Turn(Load(1), True), 0.0), events.Step)
    assert find(machine.handle(IDLE, 0.0), events.Wait, until=None)


def test_what_a_step_made_is_one_message_for_each_frontend() -> None:
    machine = ready()
    keys = [key_of(add(machine, request, frontend)) for request, frontend in ((7, FIRST), (7, SECOND), (8, FIRST))]
    assert len(set(keys)) == 3
    made = [events.StepOutput(key, [place], f"{place}", None) for place, key in enumerate(keys)]
    effects = stepped(machine, *made, events.StepOutput(999, [5]), has_work=True)
    to_first, to_second = (
        find(effects, events.ToFrontend, frontend=FIRST),
        find(effects, events.ToFrontend, frontend=SECOND),
    )
    assert [(o.request, o.token_ids, o.text) for o in one(to_first).message.outputs] == [(7, [0], "0"), (8, [2], "2")]
    assert [(o.request, o.token_ids) for o in one(to_second).message.outputs] == [(7, [1])]
    assert len(said(effects, Outputs, rank=NUMBER, incarnation=LIFE)) == 2


def test_an_output_has_all_that_the_engine_said() -> None:
    machine = ready()
    key = key_of(add(machine, 7))
    outputs = one(
        said(stepped(machine, events.StepOutput(key, [1], "t", "stop", "</s>", None, "why")), Outputs)
    ).outputs
    output = one(outputs)
    assert (output.finish_reason, output.stop_reason, output.error) == ("stop", "</s>", "why")


def test_a_finished_request_is_over() -> None:
    machine = ready()
    key = key_of(add(machine, 7))
    stepped(machine, events.StepOutput(key, [1], "", "length"))
    assert machine.statistics()["requests"] == 0
    assert machine.statistics()["finished"] == 1
    assert not said(stepped(machine, events.StepOutput(key, [1])), Outputs)
    # Its number may be used again.
    assert find(add(machine, 7, number=2), events.Take)


def test_an_abort_drops_what_is_there_and_ignores_the_rest() -> None:
    machine = ready()
    key, other = key_of(add(machine, 7)), key_of(add(machine, 7, SECOND))
    effects = machine.handle(events.FrontendSaid(FIRST, AbortRequests([5, 7, 7])), 0.0)
    assert [effect.key for effect in find(effects, events.Drop)] == [key]
    assert len(effects) == 1
    assert machine.handle(events.FrontendSaid(FIRST, AbortRequests([7])), 0.0) == []
    assert said(stepped(machine, events.StepOutput(key, [1]), events.StepOutput(other, [1])), Outputs, rank=NUMBER)
    assert machine.statistics()["finished"] == 1


@pytest.mark.parametrize(("request_number", "life", "why"), [(7, LIFE, "twice"), (8, 32, "another life")])
def test_a_request_that_was_sent_twice_or_to_another_life_is_refused(request_number: int, life: int, why: str) -> None:
    machine = ready(lockstep=True)
    add(machine, 7, number=4)
    effects = add(machine, request_number, number=5, incarnation=life)
    assert not find(effects, events.Take)
    output = one(one(said(effects, Outputs, incarnation=LIFE)).outputs)
    assert (output.request, output.finish_reason, output.token_ids) == (request_number, "error", [])
    assert why in str(output.error)
    assert machine.statistics()["void_messages"] == 1
    # Sent twice to this life, it has arrived, and is on the wire no more.
    assert said(machine.handle(IDLE, 0.0), messages.RankReport, taken={FIRST: 5 if life == LIFE else 4})


def test_what_a_frontend_that_is_gone_had_sent_is_dropped() -> None:
    machine = ready()
    keys = [key_of(add(machine, request, FIRST, number=request)) for request in (1, 2)]
    kept = key_of(add(machine, 1, SECOND))
    assert sorted(
        effect.key for effect in find(machine.handle(events.FrontendGone(FIRST), 0.0), events.Drop)
    ) == sorted(keys)
    # How many were taken stays true: that front-end may only have a new connection.
    assert said(machine.handle(IDLE, 0.0), messages.RankReport, taken={FIRST: 2, SECOND: 1})
    assert said(stepped(machine, events.StepOutput(kept, [1])), Outputs)
    assert machine.handle(events.FrontendGone(FIRST), 0.0) == []


# Reports --------------------------------------------------------------------------------------
def test_a_report_goes_out_before_and_after_a_step_when_it_says_anything_new() -> None:
    machine = ready()
    first = one(said(machine.handle(IDLE, 0.0), messages.RankReport, rank=NUMBER, incarnation=LIFE, step=0))
    assert (first.wave, first.running, first.taken) == (0, False, {})
    assert not said(machine.handle(IDLE, 0.0), messages.RankReport)
    key = key_of(add(machine, 7))
    before = one(said(machine.handle(events.Turn(Load(1), True), 0.0), messages.RankReport))
    assert (before.step, before.load.waiting, before.taken) == (0, 1, {FIRST: 1})
    after = one(
        said(stepped(machine, events.StepOutput(key, [1]), load=Load(0, 1), has_work=True), messages.RankReport)
    )
    assert (after.step, after.load.running) == (1, 1)
    assert not said(machine.handle(events.Turn(Load(0, 1), True), 0.0), messages.RankReport)
    assert not said(stepped(machine, events.StepOutput(key, [1]), load=Load(0, 1), has_work=True), messages.RankReport)
    assert said(stepped(machine, events.StepOutput(key, [1], "", "stop")), messages.RankReport, step=3)


def test_a_report_says_how_fast_the_rank_is_and_what_it_has_finished() -> None:
    machine = ready()
    key = key_of(add(machine, 7))
    done = events.Stepped((events.StepOutput(key, [1], "", "stop"),), Load(), False, 300, 100, 0.4)
    load = one(said(machine.handle(done, 0.0), messages.RankReport)).load
    assert (load.prefill_rate, load.decode_rate, load.finished) == (1000, 1000, 1)


def test_nothing_is_reported_in_external_mode_or_before_the_rank_is_ready() -> None:
    for machine in (ready(report_loads=False), joining()):
        machine.handle(IDLE, 0.0)
        key = key_of(add(machine, 7))
        assert not said(machine.handle(events.Turn(Load(1), True), 0.0), messages.RankReport)
        assert not said(stepped(machine, events.StepOutput(key, [1]), load=Load(0, 1)), messages.RankReport)


# Waves ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("own", "stamped", "runs"), [(0, 0, 0), (5, 3, 5), (5, 8, 8)])
def test_a_paused_rank_that_takes_a_request_runs_in_the_later_wave(own: int, stamped: int, runs: int) -> None:
    machine = ready(own, lockstep=True)
    assert said(add(machine, 7, wave=stamped), messages.StartWave, rank=NUMBER, incarnation=LIFE, wave=runs)
    assert (machine.wave, machine.running) == (runs, True)
    assert not said(add(machine, 8, number=2, wave=stamped), messages.StartWave)


def test_a_wake_makes_a_paused_rank_run_and_it_answers() -> None:
    machine = ready(lockstep=True)
    assert said(start(machine, 0), messages.RankHello, wave=0, running=True)
    assert find(machine.handle(IDLE, 0.0), events.DummyStep)
    assert find(machine.handle(events.Turn(Load(1), True), 0.0), events.Step)
    # A second one changes nothing, and is answered too.
    assert said(start(machine, 0), messages.RankHello, wave=0, running=True)
    assert (machine.wave, machine.running) == (0, True)


@pytest.mark.parametrize(("wave", "exclude"), [(4, None), (5, NUMBER)])
def test_a_wake_for_a_finished_wave_or_that_leaves_this_rank_out_is_ignored(wave: int, exclude: int | None) -> None:
    machine = ready(5, lockstep=True)
    start(machine, wave, exclude)
    assert (machine.wave, machine.running) == (5, False)


def test_a_wake_means_nothing_before_the_rank_is_ready_or_without_lockstep() -> None:
    for machine in (joining(lockstep=True), ready(lockstep=False)):
        assert start(machine, 0) == []
        assert not machine.running


def test_the_ranks_agree_on_the_first_step_and_every_interval() -> None:
    machine = ready(lockstep=True, sync_interval=3)
    start(machine, 0)
    agrees = []
    for _ in range(7):
        effects = stepped(machine, has_work=True)
        agrees.append(bool(find(effects, events.Agree, has_work=True, wave=0)))
        machine.handle(events.Agreed(True, 0), 0.0)
    assert agrees == [True, False, False, True, False, False, True]


def test_when_none_has_work_the_rank_pauses_and_the_next_wave_is_one_more() -> None:
    machine = ready(4, lockstep=True)
    start(machine, 4)
    assert find(stepped(machine), events.Agree, has_work=False, wave=4)
    assert said(
        machine.handle(events.Agreed(False, 4), 0.0), messages.WaveComplete, wave=4, rank=NUMBER, incarnation=LIFE
    )
    effects = machine.handle(IDLE, 0.0)
    assert find(effects, events.Wait)
    assert said(effects, messages.RankReport, wave=5, running=False)
    assert start(machine, 4) == []


def test_the_agreement_brings_a_rank_to_the_wave_of_the_group() -> None:
    machine = ready(lockstep=True)
    add(machine, 7)
    stepped(machine, has_work=True)
    machine.handle(events.Agreed(True, 6), 0.0)
    assert machine.wave == 6
    machine.handle(events.FrontendSaid(FIRST, AbortRequests([7])), 0.0)
    assert said(machine.handle(events.Agreed(False, 6), 0.0), messages.WaveComplete, wave=6)
    assert machine.wave == 7


def test_a_request_that_came_during_the_agreement_starts_the_next_wave() -> None:
    machine = ready(lockstep=True)
    start(machine, 0)
    stepped(machine)
    add(machine, 7)
    effects = machine.handle(events.Agreed(False, 0), 0.0)
    assert [type(effect.message) for effect in effects] == [messages.WaveComplete, messages.StartWave]
    assert said(effects, messages.WaveComplete, wave=0)
    assert said(effects, messages.StartWave, wave=1)
    # The next wave's first step is an agreement again, or this rank would be alone in its collective.
    assert find(stepped(machine, has_work=True), events.Agree)


def test_a_wake_for_the_next_wave_is_kept_until_this_one_has_ended() -> None:
    machine = ready(lockstep=True)
    start(machine, 0)
    assert said(start(machine, 1), messages.RankHello, wave=0, running=True)
    effects = machine.handle(events.Agreed(False, 0), 0.0)
    assert said(effects, messages.WaveComplete, wave=0)
    assert said(effects, messages.StartWave, wave=1)
    assert not said(machine.handle(events.Agreed(False, 1), 0.0), messages.StartWave)


def test_what_is_no_event_raises_and_names_it() -> None:
    with pytest.raises(TypeError, match="rank 3: Load is not an event"):
        ready().handle(Load(), 0.0)  # type: ignore[arg-type]


# A rank's machine as a member of generations: forming, the end of one, and the next -----------------


NUMBER_EPOCH, LIFE_EPOCH, FRONTEND = 3, 33, 100


def add_epoch(machine: Rank) -> None:
    machine.handle(events.FrontendSaid(FRONTEND, AddRequest(1, 1, LIFE_EPOCH, 0, [1, 2], SamplingParams(4))), 0.0)


def turn(machine: Rank) -> list[events.Effect]:
    return machine.handle(events.Turn(Load(), True), 0.0)


def step_done(machine: Rank) -> list[events.Effect]:
    return machine.handle(events.Stepped((), Load(), True), 0.0)


def told(machine: Rank, event: events.CoordinatorSaid) -> list[events.Effect]:
    """A Form comes; what the rank does then, and at its next turn."""
    return machine.handle(event, 0.0) + turn(machine)


def form(
    epoch: int, wave: int = 0, life: int = LIFE_EPOCH, suspension: messages.Suspension | None = None
) -> events.CoordinatorSaid:
    members = [messages.GroupMember(0, 30, "group 0"), messages.GroupMember(NUMBER_EPOCH, life, "group 3")]
    return events.CoordinatorSaid(messages.Form(epoch, wave, members, suspension))


def grouped() -> Rank:
    machine = Rank(NUMBER_EPOCH, LIFE_EPOCH, "address", lockstep=True, sync_interval=4, group_address="group 3")
    machine.handle(events.Loaded(), 0.0)
    return machine


def test_a_joining_rank_takes_up_the_wave_forms_and_is_ready() -> None:
    machine = grouped()
    effects = told(machine, form(1, wave=7, suspension=messages.Suspension(1, "keep")))
    assert one(find(effects, events.FormGroup)).epoch == 1
    assert (machine.phase.value, machine.wave, machine.pause.number) == ("joining", 7, 1)
    hello = one(said(machine.handle(events.Formed(1), 0.0), messages.RankHello, generation=1))
    assert (hello.ready, hello.wave, hello.suspension, hello.held) == (True, 7, 1, True)


def test_a_form_that_comes_again_or_late_or_for_another_life_changes_nothing() -> None:
    machine = grouped()
    assert find(told(machine, form(2, life=LIFE_EPOCH + 1)), events.FormGroup) == []
    told(machine, form(2))
    assert find(told(machine, form(2)), events.FormGroup) == [], "it is at it"
    machine.handle(events.Formed(2), 0.0)
    assert said(told(machine, form(2)), messages.RankHello, generation=2)
    assert find(told(machine, form(1)), events.FormGroup) == []


def test_the_end_of_an_epoch_is_told_and_stops_the_steps_until_the_next_is_formed() -> None:
    machine = grouped()
    told(machine, form(1))
    machine.handle(events.Formed(1), 0.0)
    add_epoch(machine)
    for _ in range(3):
        turn(machine)
        if find(step_done(machine), events.Agree):
            machine.handle(events.Agreed(True, 0), 0.0)
    turn(machine)
    assert said(machine.handle(events.EpochEnded(), 0.0), messages.RankHello, generation=0, running=True)
    assert find(turn(machine), events.Wait)
    told(machine, form(2, wave=9))
    assert machine.wave == 0, "a rank that is ready ends its own wave with the others"
    machine.handle(events.Formed(2), 0.0)
    assert find(turn(machine), events.Step)
    assert find(step_done(machine), events.Agree), "the count of steps begins anew"


def test_the_end_of_an_epoch_that_is_being_formed_leaves_the_rank_without_one() -> None:
    machine = grouped()
    told(machine, form(1))
    assert said(machine.handle(events.EpochEnded(), 0.0), messages.RankHello, generation=0, ready=False)
    assert find(told(machine, form(2)), events.FormGroup)


def test_a_pause_holds_a_rank_whose_epoch_has_ended_only_when_it_has_stopped() -> None:
    machine = grouped()
    told(machine, form(1))
    machine.handle(events.Formed(1), 0.0)
    add_epoch(machine)
    turn(machine)
    machine.handle(events.EpochEnded(), 0.0)
    hello = said(machine.handle(events.CoordinatorSaid(messages.Suspension(1, "keep")), 0.0), messages.RankHello)[-1]
    assert (hello.suspension, hello.held, hello.running) == (1, False, True)
    told(machine, form(2))
    machine.handle(events.Formed(2), 0.0)
    turn(machine)
    agree = one(find(step_done(machine), events.Agree))
    hello = said(machine.handle(events.Agreed(True, 0, agree.suspension), 0.0), messages.RankHello)[-1]
    assert (hello.suspension, hello.held, hello.running) == (1, True, False)


def test_of_several_that_came_in_a_step_only_the_newest_is_formed() -> None:
    machine = grouped()
    for epoch in (1, 3, 2):
        machine.handle(form(epoch), 0.0)
    assert [effect.epoch for effect in find(turn(machine), events.FormGroup)] == [3]
    assert find(turn(machine), events.FormGroup) == []
    assert said(machine.handle(events.Formed(3), 0.0), messages.RankHello, generation=3, told=3)


# Engines whose collectives cannot be formed anew ------------------------------------------------


def once() -> Rank:
    machine = Rank(NUMBER_EPOCH, LIFE_EPOCH, "address", lockstep=True, group_address="group 3", once=True)
    assert said(machine.handle(events.Loaded(), 0.0), messages.RankHello, once=True)
    return machine


def test_before_its_engine_has_begun_it_forms_whatever_is_told_last() -> None:
    machine = once()
    assert one(find(told(machine, form(1)), events.FormGroup)).epoch == 1
    assert find(machine.handle(events.EpochEnded(), 0.0), events.StartAgain) == []
    assert one(find(told(machine, form(2)), events.FormGroup)).epoch == 2


@pytest.mark.parametrize("loaded", [False, True])
def test_once_begun_the_end_of_its_epoch_is_the_end_of_its_life(loaded: bool) -> None:
    for end in (events.EpochEnded(), form(2)):
        machine = once()
        told(machine, form(1))
        machine.handle(events.Met(1), 0.0)
        assert machine.bound
        if loaded:
            machine.handle(events.Formed(1), 0.0)
        assert find(machine.handle(form(1), 0.0), events.StartAgain) == [], "that is the one that it is in"
        assert machine.handle(end, 0.0) == [events.StartAgain()]


def test_other_engines_go_on_in_the_next_epoch() -> None:
    machine = grouped()
    told(machine, form(1))
    machine.handle(events.Met(1), 0.0)
    machine.handle(events.Formed(1), 0.0)
    assert find(machine.handle(events.EpochEnded(), 0.0), events.StartAgain) == []
    assert one(find(told(machine, form(2)), events.FormGroup)).epoch == 2


def test_a_call_to_the_engine_is_handed_on_and_answered() -> None:
    machine = ready()
    call = CallEngine(5, LIFE, "sleep", '{"level":1}')
    assert machine.handle(events.FrontendSaid(FIRST, call), 0.0) == [events.Invoke(FIRST, call)]
    other = CallEngine(5, LIFE + 1, "sleep")
    assert machine.handle(events.FrontendSaid(FIRST, other), 0.0) == [], "meant for another life"
    (said,) = find(machine.handle(events.Invoked(FIRST, 5, "true"), 0.0), events.ToFrontend, frontend=FIRST)
    assert said.message == Outputs(NUMBER, LIFE, [Output(5, [], "true", "stop")])
    (said,) = find(machine.handle(events.Invoked(FIRST, 5, "", "why"), 0.0), events.ToFrontend)
    assert said.message == Outputs(NUMBER, LIFE, [Output(5, [], "", "error", error="why")])
