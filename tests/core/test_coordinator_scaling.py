"""The coordinator's machine while the deployment gets more ranks, or fewer."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core.coordinator.events import Effect, FrontendSaid, RankGone, RankSaid, RankSubscribed, Tick
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    ControlRequest,
    Form,
    FrontendHello,
    Identify,
    LoadView,
    Members,
    NodeHello,
    RankFailed,
    RankHello,
    RankReport,
    ScaleRequest,
    Scaling,
)
from tests.core.harness import one, said

FRONTEND = 100
NODE = 7


def hello(rank: int, ready: bool = True, epoch: int = 0, told: int = 0, suspension: int = 0) -> RankSaid:
    group = f"ipc:///group-{rank}"
    return RankSaid(
        RankHello(
            PROTOCOL_VERSION, rank, 10 + rank, f"ipc:///{rank}", ready, suspension=suspension, group_address=group,
            generation=epoch, told=told,
        )
    )  # fmt: skip


def report(rank: int, step: int = 1, **load: int) -> RankSaid:
    return RankSaid(RankReport(rank, 10 + rank, step, 0, False, Load(**load)))


def knows(state: Scaling | None) -> FrontendSaid:
    return FrontendSaid(FrontendHello(PROTOCOL_VERSION, FRONTEND, scaling=state))


def scale(size: int, call: int = 1) -> FrontendSaid:
    return FrontendSaid(ScaleRequest(FRONTEND, call, size, 2000, 5000))


def started(ranks: int, lockstep: bool) -> Coordinator:
    """Ready, in generation 1 where they run in lockstep, with a front-end and a node."""
    machine = Coordinator(ranks, 1, 0.0, lockstep=lockstep)
    for rank in range(ranks):
        machine.handle(hello(rank, epoch=1, told=1) if lockstep else hello(rank), 0.0)
        machine.handle(report(rank), 0.0)
    machine.handle(knows(None), 0.0)
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE, list(range(ranks)), Scaling(0, ranks, ranks))), 0.0)
    return machine


def last(effects: list[Effect], kind: type) -> Any:
    return said(effects, kind)[-1]


@pytest.mark.parametrize("lockstep", [False, True])
def test_new_ranks_load_beside_the_others_and_join_together(lockstep: bool) -> None:
    machine = started(2, lockstep)
    effects = machine.handle(scale(4), 1.0)
    state = one(said(effects, Scaling))
    assert (state.size, state.target, state.hosts) == (2, 4, [(2, NODE), (3, NODE)])
    assert last(effects, Members).scaling == state
    effects = machine.handle(hello(2, ready=False), 2.0)
    assert not said(effects, Admit) + said(effects, Form)
    assert last(effects, Members).missing == []
    effects = machine.handle(hello(3, ready=False), 3.0)
    assert last(effects, Members).missing == [2, 3]
    assert last(effects, Scaling).size == 4
    if not lockstep:
        assert {message.rank for message in said(effects, Admit)} == {2, 3}
        return
    # The others have not spoken yet, so they are asked; then all form the next generation.
    assert said(effects, Identify)
    for rank in (0, 1):
        effects = machine.handle(hello(rank, epoch=1, told=1), 3.0)
    form = one(said(effects, Form))
    assert (form.generation, [member.rank for member in form.members]) == (2, [0, 1, 2, 3])


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_rank_that_fails_or_is_gone_leaves_all_as_it_was(lockstep: bool) -> None:
    machine = started(2, lockstep)
    machine.handle(scale(4), 1.0)
    machine.handle(hello(2, ready=False), 2.0)
    machine.handle(RankGone(2, 12), 2.0)
    effects = machine.handle(hello(3, ready=False), 2.0)
    assert last(effects, Members).scaling.waiting_for == [2]
    effects = machine.handle(RankSaid(RankFailed(NODE, 1, 2, "killed")), 3.0)
    assert last(effects, Members).scaling.outcome == "failed"
    assert last(effects, Members).missing == []
    assert not said(machine.handle(hello(3, ready=False), 4.0), Admit)
    assert machine.statistics()["generation"] == (1 if lockstep else 0)


def test_a_deadline_of_the_ranks_that_load_is_kept() -> None:
    machine = started(2, False)
    machine.handle(scale(3), 1.0)
    assert machine.deadline <= 6.0
    assert last(machine.handle(Tick(), 6.0), Members).scaling.outcome == "late"


@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_leave_once_frontends_know_it_and_they_have_nothing(lockstep: bool) -> None:
    machine = started(4, lockstep)
    machine.handle(report(3, 2, running=1), 1.0)
    state = one(said(machine.handle(scale(2), 1.0), Scaling))
    assert state.waiting_for == [2, 3]
    machine.handle(knows(state), 1.1)
    # A rank that waits only for its requests to end may take longer than a moment, and is still a member.
    effects = machine.handle(Tick(), 1.2)
    assert machine.statistics()["ready"] == [0, 1, 2, 3]
    effects = machine.handle(report(3, 3), 1.5)
    members = last(effects, Members)
    assert (members.scaling.size, members.missing) == (2, [])
    assert {member.rank for member in members.members} == {0, 1}
    assert (2, 12) in members.ended
    assert (3, 13) in members.ended
    assert {view.rank for view in last(effects, LoadView).ranks} == {0, 1}
    if lockstep:
        form = one(said(effects, Form))
        assert (form.generation, [member.rank for member in form.members]) == (2, [0, 1])


def test_what_has_left_is_heard_no_more_and_another_life_of_it_is_when_it_is_wanted() -> None:
    machine = started(3, False)
    machine.handle(scale(2), 1.0)
    machine.handle(knows(Scaling(1, 3, 2)), 1.0)
    assert machine.statistics()["ready"] == [0, 1]
    machine.handle(hello(2), 1.1)
    machine.handle(report(2, 9), 1.1)
    assert machine.statistics()["ready"] == [0, 1]
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE, [0, 1], Scaling(2, 2, 2))), 1.9)
    machine.handle(scale(3, call=2), 2.0)
    effects = machine.handle(hello(2), 2.1)
    assert not said(effects, Admit)
    again = RankSaid(RankHello(PROTOCOL_VERSION, 2, 99, "ipc:///again", False))
    assert one(said(machine.handle(again, 2.2), Admit)).incarnation == 99


def test_new_coordinator_takes_up_the_size_from_a_node_and_hears_the_ranks_beyond_its_own() -> None:
    machine = Coordinator(2, 1, 0.0, lockstep=True, fresh=False)
    for rank in (0, 1):
        machine.handle(hello(rank, epoch=5, told=5), 0.0)
    known = Scaling(2, 4, 4, hosts=[(2, NODE), (3, NODE)])
    effects = machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE, [0, 1, 2, 3], known)), 1.0)
    assert last(effects, Members).missing == [2, 3]
    assert said(effects, Identify)
    for rank in (2, 3):
        effects = machine.handle(hello(rank, epoch=5, told=5), 1.1)
    assert last(effects, Members).missing == []
    assert machine.statistics()["generation"] == 5
    assert not said(effects, Form)


def test_nothing_is_begun_before_the_ranks_are_heard() -> None:
    machine = Coordinator(2, 1, 0.0, lockstep=True, fresh=False)
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE, [0, 1], Scaling(0, 2, 2))), 0.0)
    machine.handle(RankSubscribed(), 0.0)
    assert not said(machine.handle(scale(4), 0.0), Scaling)
    for rank in (0, 1):
        machine.handle(hello(rank, epoch=1, told=1), 0.1)
    assert said(machine.handle(scale(4), 0.2), Scaling)


def test_a_suspension_waits_for_new_ranks_and_not_for_those_that_left() -> None:
    machine = started(2, False)
    machine.handle(FrontendSaid(ControlRequest(FRONTEND, 1, "keep")), 1.0)
    machine.handle(scale(3, call=2), 1.0)
    machine.handle(hello(2, ready=False), 1.0)
    assert machine._pause.header.waiting_for == [0, 1, 2]
    machine.handle(scale(1, call=3), 2.0)
    machine.handle(knows(Scaling(3, 3, 1)), 2.0)
    assert machine._scaling.state.size == 1
    assert machine._pause.header.waiting_for == [0]


def test_a_new_coordinator_that_has_not_heard_all_ranks_waits_when_the_time_of_a_change_is_up() -> None:
    coordinator = Coordinator(2, 9, 0.1, fresh=False)
    change = Scaling(5, 2, 1, frontend=100, call=1, drain_ms=1000)
    coordinator.handle(RankSaid(NodeHello(PROTOCOL_VERSION, 7, [0, 1], change)), 0.0)
    for now in (0.5, 1.0, 1.5, 20.0):
        coordinator.handle(Tick(), now)
        assert coordinator.deadline > now
