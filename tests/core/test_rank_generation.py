"""A rank's machine as a member of generations: forming, the end of one, and the next."""

from __future__ import annotations

from paceline.core.load import Load
from paceline.core.messages import Form, GroupMember, RankHello, Suspension
from paceline.core.rank.events import (
    Agree,
    Agreed,
    CoordinatorSaid,
    Effect,
    EpochEnded,
    Formed,
    FormGroup,
    FrontendSaid,
    Loaded,
    Step,
    Stepped,
    Turn,
    Wait,
)
from paceline.core.rank.machine import Rank
from paceline.core.requests import AddRequest, SamplingParams
from tests.core.harness import find, one, said

NUMBER, LIFE, FRONTEND = 3, 33, 100


def add(machine: Rank) -> None:
    machine.handle(FrontendSaid(FRONTEND, AddRequest(1, 1, LIFE, 0, [1, 2], SamplingParams(4))), 0.0)


def turn(machine: Rank) -> list[Effect]:
    return machine.handle(Turn(Load(), True), 0.0)


def step_done(machine: Rank) -> list[Effect]:
    return machine.handle(Stepped((), Load(), True), 0.0)


def told(machine: Rank, event: CoordinatorSaid) -> list[Effect]:
    """A Form comes; what the rank does then, and at its next turn."""
    return machine.handle(event, 0.0) + turn(machine)


def form(epoch: int, wave: int = 0, life: int = LIFE, suspension: Suspension | None = None) -> CoordinatorSaid:
    members = [GroupMember(0, 30, "group 0"), GroupMember(NUMBER, life, "group 3")]
    return CoordinatorSaid(Form(epoch, wave, members, suspension))


def grouped() -> Rank:
    machine = Rank(NUMBER, LIFE, "address", lockstep=True, sync_interval=4, group_address="group 3")
    machine.handle(Loaded(), 0.0)
    return machine


def test_a_joining_rank_takes_up_the_wave_forms_and_is_ready() -> None:
    machine = grouped()
    effects = told(machine, form(1, wave=7, suspension=Suspension(1, "keep")))
    assert one(find(effects, FormGroup)).epoch == 1
    assert (machine.phase.value, machine.wave, machine.pause.number) == ("joining", 7, 1)
    hello = one(said(machine.handle(Formed(1), 0.0), RankHello, generation=1))
    assert (hello.ready, hello.wave, hello.suspension, hello.held) == (True, 7, 1, True)


def test_a_form_that_comes_again_or_late_or_for_another_life_changes_nothing() -> None:
    machine = grouped()
    assert find(told(machine, form(2, life=LIFE + 1)), FormGroup) == []
    told(machine, form(2))
    assert find(told(machine, form(2)), FormGroup) == [], "it is at it"
    machine.handle(Formed(2), 0.0)
    assert said(told(machine, form(2)), RankHello, generation=2)
    assert find(told(machine, form(1)), FormGroup) == []


def test_the_end_of_a_generation_is_told_and_stops_the_steps_until_the_next_is_formed() -> None:
    machine = grouped()
    told(machine, form(1))
    machine.handle(Formed(1), 0.0)
    add(machine)
    for _ in range(3):
        turn(machine)
        if find(step_done(machine), Agree):
            machine.handle(Agreed(True, 0), 0.0)
    turn(machine)
    assert said(machine.handle(EpochEnded(), 0.0), RankHello, generation=0, running=True)
    assert find(turn(machine), Wait)
    told(machine, form(2, wave=9))
    assert machine.wave == 0, "a rank that is ready ends its own wave with the others"
    machine.handle(Formed(2), 0.0)
    assert find(turn(machine), Step)
    assert find(step_done(machine), Agree), "the count of steps begins anew"


def test_the_end_of_a_generation_that_is_being_formed_leaves_the_rank_without_one() -> None:
    machine = grouped()
    told(machine, form(1))
    assert said(machine.handle(EpochEnded(), 0.0), RankHello, generation=0, ready=False)
    assert find(told(machine, form(2)), FormGroup)


def test_a_suspension_holds_a_rank_whose_generation_has_ended_only_when_it_has_stopped() -> None:
    machine = grouped()
    told(machine, form(1))
    machine.handle(Formed(1), 0.0)
    add(machine)
    turn(machine)
    machine.handle(EpochEnded(), 0.0)
    hello = said(machine.handle(CoordinatorSaid(Suspension(1, "keep")), 0.0), RankHello)[-1]
    assert (hello.suspension, hello.held, hello.running) == (1, False, True)
    told(machine, form(2))
    machine.handle(Formed(2), 0.0)
    turn(machine)
    agree = one(find(step_done(machine), Agree))
    hello = said(machine.handle(Agreed(True, 0, agree.suspension), 0.0), RankHello)[-1]
    assert (hello.suspension, hello.held, hello.running) == (1, True, False)


def test_of_several_that_came_in_a_step_only_the_newest_is_formed() -> None:
    machine = grouped()
    for epoch in (1, 3, 2):
        machine.handle(form(epoch), 0.0)
    assert [effect.epoch for effect in find(turn(machine), FormGroup)] == [3]
    assert find(turn(machine), FormGroup) == []
    assert said(machine.handle(Formed(3), 0.0), RankHello, generation=3, told=3)
