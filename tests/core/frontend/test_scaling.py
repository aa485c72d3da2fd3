"""A front-end's machine while the deployment gets more ranks, or fewer."""

from __future__ import annotations

from typing import Any

from paceline.core.frontend import events
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import FrontendHello, Member, ScaleRequest, Scaling
from paceline.core.requests import AddRequest
from tests.core.frontend.test_machine import IDENTITY, frontend, members, outputs, submit
from tests.core.harness import find, one, said

NODE = 7
FOUR = ((0, 10), (1, 11), (2, 12), (3, 13))
DOWN = Scaling(1, 4, 2, waiting_for=[2, 3])
LEFT = Scaling(2, 2, 2)


def hear(machine: Frontend, state: Scaling, *lives: tuple[int, int], **more: Any) -> list[events.Effect]:
    return machine.handle(members(*(lives or FOUR), scaling=state, **more), 0.0)


def ranks_of(effects: list[events.Effect]) -> list[int]:
    return [effect.rank for effect in find(effects, events.ToRank) if isinstance(effect.message, AddRequest)]


# Down -----------------------------------------------------------------------------------------
def test_ranks_that_leave_get_nothing_new_and_end_what_they_have() -> None:
    machine = frontend(*FOUR)
    submit(machine, 1, rank=3)
    effects = hear(machine, DOWN)
    assert one(said(effects, FrontendHello)).scaling == DOWN
    assert machine.ready_ranks() == [0, 1]
    used = {rank for request in range(2, 10) for rank in ranks_of(submit(machine, request))}
    assert used == {0, 1}
    assert one(find(submit(machine, 10, rank=3), events.Refuse)).reason == "unknown-rank"
    assert machine.handle(outputs(3, 13, 1, finish="length"), 0.0)
    assert machine.in_flight() == 8


def test_it_says_once_that_it_knows() -> None:
    machine = frontend(*FOUR)
    hear(machine, DOWN)
    assert not said(hear(machine, DOWN), FrontendHello)
    assert one(said(hear(machine, LEFT, (0, 10), (1, 11)), FrontendHello)).scaling == LEFT


def test_what_a_rank_has_not_ended_when_it_leaves_goes_on_elsewhere() -> None:
    machine = frontend(*FOUR, resumes=True)
    submit(machine, 1, rank=3)
    machine.handle(outputs(3, 13, 1), 0.0)
    hear(machine, DOWN)
    effects = hear(machine, LEFT, (0, 10), (1, 11), ended=[(3, 13)])
    assert find(effects, events.Disconnect) == [events.Disconnect(2), events.Disconnect(3)]
    again = one(find(effects, events.ToRank))
    assert again.rank in (0, 1)
    assert again.message.made_token_ids == [1]


def test_a_rank_that_dies_while_it_leaves_is_not_waited_for() -> None:
    machine = frontend(*FOUR, resumes=True)
    submit(machine, 1, rank=3)
    hear(machine, DOWN)
    assert ranks_of(machine.handle(events.LinkDown(3), 0.0))[0] in (0, 1)
    machine.handle(events.LinkUp(3), 0.0)
    assert machine.ready_ranks() == [0, 1]


def test_a_frontend_that_comes_meanwhile_does_not_connect_to_what_leaves() -> None:
    machine = Frontend(IDENTITY, frontend()._router._policy)
    assert [effect.member.rank for effect in find(hear(machine, DOWN), events.Connect)] == [0, 1]


def test_an_older_word_brings_nothing_back() -> None:
    machine = frontend(*FOUR)
    hear(machine, LEFT, (0, 10), (1, 11))
    hear(machine, Scaling(0, 4, 4), coordinator=2)
    assert machine.ready_ranks() == [0, 1]
    assert machine.scaling == LEFT


# Up, and whose the new ranks are -----------------------------------------------------------------
def test_new_ranks_are_connected_to_when_they_are_ready() -> None:
    machine = frontend((0, 10))
    assert not find(hear(machine, Scaling(1, 1, 2), (0, 10)), events.Connect)
    effects = hear(machine, Scaling(2, 2, 2), (0, 10), (1, 11))
    assert find(effects, events.Connect) == [events.Connect(Member(1, 11, "address 11"))]


def test_in_hybrid_mode_a_frontend_balances_over_what_comes_to_its_node() -> None:
    machine = frontend((0, 10), ranks=frozenset({0}), node=NODE, late_binding=True)
    up = Scaling(1, 2, 4, hosts=[(2, NODE), (3, 8)])
    assert one(said(hear(machine, up, (0, 10), (1, 11)), FrontendHello)).ranks == [0, 2]
    done = Scaling(2, 4, 4, hosts=up.hosts)
    assert [effect.member.rank for effect in find(hear(machine, done), events.Connect)] == [2]
    assert machine.ready_ranks() == [0, 2]
    hear(machine, Scaling(4, 1, 1), (0, 10))
    assert machine.ranks == {0}


# Calls ------------------------------------------------------------------------------------------

CALL = events.Scale(5, 4, 1000, 2000)


def mine(number: int, size: int, target: int, **more: Any) -> Scaling:
    return Scaling(number, size, target, frontend=IDENTITY, call=5, **more)


def test_a_call_is_over_when_the_new_ranks_are_ready() -> None:
    machine = frontend()
    hear(machine, Scaling(0, 2, 2), (0, 10), (1, 11))
    effects = machine.handle(CALL, 0.0)
    assert said(effects, ScaleRequest) == [ScaleRequest(IDENTITY, 5, 4, 1000, 2000)]
    assert not find(hear(machine, mine(1, 2, 4)), events.Scaled)
    done = mine(2, 4, 4)
    assert not find(hear(machine, done, missing=[3]), events.Scaled)
    assert find(hear(machine, done, missing=[1]), events.Scaled) == [events.Scaled(5, 2, done)]
    assert not find(hear(machine, done), events.Scaled)


def test_a_call_is_over_when_it_was_undone() -> None:
    machine = frontend()
    hear(machine, Scaling(0, 2, 2), (0, 10), (1, 11))
    machine.handle(CALL, 0.0)
    undone = mine(2, 2, 4, outcome="failed", why="no memory")
    assert find(hear(machine, undone), events.Scaled) == [events.Scaled(5, 2, undone)]


def test_a_call_while_another_is_under_way_is_told_so_by_the_coordinators_next_word() -> None:
    machine = frontend(*FOUR)
    hear(machine, DOWN)
    # What is known here may be out of date.
    assert not find(machine.handle(CALL, 0.0), events.Scaled)
    assert find(hear(machine, DOWN), events.Scaled) == [events.Scaled(5, 4, None)]


def test_a_second_call_during_the_first_does_not_overtake_it() -> None:
    """The coordinator may not have heard the first: where it heard the second before, it would take it for a repeat."""
    machine = frontend(*FOUR)
    hear(machine, Scaling(0, 4, 4))
    assert said(machine.handle(events.Scale(1, 5, 2000, 5000), 0.0), ScaleRequest)
    assert machine.handle(events.Scale(2, 6, 2000, 5000), 0.0) == [events.Scaled(2, 4, None)]
    assert one(said(machine.handle(events.Tick(), machine.deadline), ScaleRequest)).call == 1, "repeated"
    machine.handle(events.ControlGivenUp(1), 0.0)
    assert said(machine.handle(events.Scale(3, 6, 2000, 5000), 0.0), ScaleRequest)


def test_nobody_is_told_of_a_call_that_was_given_up() -> None:
    machine = frontend(*FOUR)
    machine.handle(CALL, 0.0)
    machine.handle(events.ControlGivenUp(5), 0.0)
    assert not find(hear(machine, mine(2, 4, 4)), events.Scaled)
