"""A change of how many ranks there are: what begins it, what ends it, what a new coordinator takes up."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from paceline.core.coordinator.events import Effect, FrontendSaid, RankGone, RankSaid, RankSubscribed, Tick
from paceline.core.coordinator.machine import Coordinator
from paceline.core.coordinator.scaling import AWAY_S, NODES_S, DeploymentScaling
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
from paceline.core.retry import FIRST_S
from tests.core.harness import one, said

NODE, OTHER = 7, 8
FRONTEND = 100


def scaling(size: int = 2, **nodes: list[int]) -> DeploymentScaling:
    """Of one node, or of those that are named `node_7`, …"""
    found = DeploymentScaling(size)
    for name, ranks in (nodes or {f"node_{NODE}": list(range(size))}).items():
        found.said(node_hello(int(name.removeprefix("node_")), ranks, found.state), 0.0)
    return found


def node_hello(node: int, ranks: list[int], state: Scaling, **more: Any) -> NodeHello:
    return NodeHello(PROTOCOL_VERSION, node, ranks, state, **more)


def known(found: DeploymentScaling, ranks: int) -> None:
    """The node answers with what it has heard, and so many ranks."""
    found.said(node_hello(NODE, list(range(ranks)), found.state), 0.0)


def ask(found: DeploymentScaling, size: int, call: int = 1, now: float = 0.0, frontend: int = FRONTEND) -> None:
    found.ask(ScaleRequest(frontend, call, size, 2000, 5000), now)


def loaded(found: DeploymentScaling, *ranks: int) -> None:
    for rank in ranks:
        found.hello(RankHello(PROTOCOL_VERSION, rank, 10 + rank, "ipc:///rank", False))


def advance(found: DeploymentScaling, now: float = 0.0, busy: tuple[int, ...] = (), frontends: Any = ()) -> None:
    found.advance(frontends, lambda rank: rank not in busy, now)


def numbers(found: DeploymentScaling) -> tuple[int, int, str]:
    return found.state.number, found.state.size, found.state.outcome


def test_more_ranks_than_there_may_be_are_refused() -> None:
    found = DeploymentScaling(2, 4)
    found.said(node_hello(NODE, [0, 1], found.state), 0.0)
    ask(found, 5)
    assert (found.state.outcome, found.state.size) == ("refused", 2)
    assert found.state.why == "the coordinator allows 4 ranks (--max-data-parallel-size)"
    known(found, 2)
    ask(found, 4, call=2)
    assert found.state.joining == range(2, 4)


@pytest.mark.parametrize(
    "claim",
    [Scaling(8, 65_535, 65_535), Scaling(7, 2, 65_535), Scaling(9, 2, 4, waiting_for=list(range(2, 1000))),
     Scaling(9, 2, 4, hosts=[(rank, NODE) for rank in range(2, 1000)])],
)  # fmt: skip
def test_nobody_is_believed_who_claims_more_ranks_than_there_may_be(claim: Scaling) -> None:
    found = DeploymentScaling(2)
    found.frontend(FRONTEND, claim, 0.0)
    found.said(node_hello(NODE, [0, 1], claim), 0.0)
    assert found.state == Scaling(0, 2, 2)


def test_new_ranks_go_where_there_are_fewest() -> None:
    found = scaling(4, node_7=[0, 1, 2], node_8=[3])
    ask(found, 8)
    assert found.state.hosts == [(4, OTHER), (5, OTHER), (6, NODE), (7, OTHER)]


def test_a_node_that_has_gone_gets_no_rank() -> None:
    found = scaling(4, node_7=[0, 1, 2], node_8=[3])
    found.forget_node(OTHER)
    ask(found, 5)
    assert found.state.hosts == [(4, NODE)]


def test_a_rank_that_fails_takes_all_new_ones_with_it() -> None:
    found = scaling()
    ask(found, 4)
    loaded(found, 2)
    found.said(RankFailed(NODE, 1, 3, "no memory"), 1.0)
    assert numbers(found) == (2, 2, "failed")
    assert found.state.why == "rank 3 ended before it was ready: no memory"
    assert found.state.limit == 2
    assert found.arrivals() == []


@pytest.mark.parametrize(
    "failure", [RankFailed(NODE, 0, 3, ""), RankFailed(NODE, 1, 1, ""), RankFailed(NODE, 3, 3, "")]
)
def test_a_failure_of_another_change_or_rank_counts_for_nothing(failure: RankFailed) -> None:
    found = scaling()
    ask(found, 4)
    found.said(failure, 1.0)
    assert found.state.under_way


def test_what_takes_too_long_to_load_is_undone() -> None:
    found = scaling()
    ask(found, 4, now=1.0)
    loaded(found, 2)
    advance(found, 5.9)
    assert found.state.under_way
    assert found.due is not None
    assert found.due <= 6.0
    advance(found, 6.0)
    assert numbers(found) == (2, 2, "late")
    assert found.state.why == "rank 3 had not loaded after 5 s"


def test_ranks_leave_after_the_drain_time_in_any_case() -> None:
    found = scaling(4)
    ask(found, 2)
    advance(found, 1.9, busy=(2, 3), frontends={FRONTEND})
    assert found.state.under_way
    advance(found, 2.0, busy=(2, 3), frontends={FRONTEND})
    assert numbers(found) == (2, 2, "done")


def test_a_frontend_that_has_gone_is_not_waited_for() -> None:
    found = scaling(4)
    ask(found, 2, frontend=200)
    found.forget_frontend(FRONTEND)
    advance(found, frontends=())
    assert found.state.size == 2


def test_a_second_one_changes_nothing_while_the_first_is_under_way() -> None:
    found = scaling()
    ask(found, 4)
    before = found.state
    ask(found, 8, call=2, frontend=200)
    assert found.state == before
    loaded(found, 2, 3)
    advance(found)
    known(found, 4)
    ask(found, 8, call=2, frontend=200)
    assert (found.state.number, found.state.target) == (3, 8)


def test_a_call_is_served_once_however_often_it_comes() -> None:
    found = scaling()
    ask(found, 1, call=5)
    advance(found)
    assert found.state.size == 1
    known(found, 1)
    ask(found, 3, call=6, frontend=200)
    loaded(found, 1, 2)
    advance(found)
    known(found, 3)
    ask(found, 1, call=5)
    assert numbers(found) == (4, 3, "done")


def test_what_is_so_already_is_done_at_once() -> None:
    found = scaling()
    ask(found, 2)
    assert numbers(found) == (2, 2, "done")
    assert (found.state.frontend, found.state.call) == (FRONTEND, 1)


def test_external_mode_and_a_node_without_ranks_are_refused() -> None:
    found = scaling(4)
    found.said(node_hello(OTHER, [2, 3], found.state, own_frontends=True), 0.0)
    ask(found, 2)
    assert numbers(found) == (2, 4, "refused")
    assert "the one with rank 2, 3 would have none" in found.state.why
    known(found, 4)
    found.said(node_hello(OTHER, [2, 3], found.state, fixed=True), 0.0)
    ask(found, 8, call=2)
    assert numbers(found) == (4, 4, "refused")
    assert "external mode" in found.state.why


def test_a_new_coordinator_waits_a_moment_for_the_nodes() -> None:
    found = DeploymentScaling(2)
    ask(found, 4, now=0.0)
    assert found.state.number == 0
    ask(found, 4, now=NODES_S)
    assert numbers(found) == (2, 2, "refused")


def test_a_new_coordinator_takes_up_the_newest_that_anybody_knows() -> None:
    state = Scaling(5, 4, 2, frontend=FRONTEND, call=3, drain_ms=1000)
    found = DeploymentScaling(4)
    found.frontend(FRONTEND, state, 10.0)
    found.said(node_hello(NODE, [0, 1, 2, 3], Scaling(4, 4, 4)), 10.0)
    # Under a number of its own: the one before may have ended it.
    assert found.state == replace(state, number=7)
    ask(found, 2, call=3, now=10.0)
    assert found.state == replace(state, number=7)
    found.frontend(FRONTEND, found.state, 10.5)
    assert found.state.number == 7
    advance(found, 11.0, busy=(2,), frontends={FRONTEND})
    assert numbers(found) == (8, 2, "done")


def test_a_change_that_the_coordinator_before_had_ended_ends_as_it_did_there() -> None:
    found = DeploymentScaling(1)
    found.said(node_hello(NODE, [0, 1], Scaling(1, 1, 2, startup_ms=1000)), 0.0)
    found.frontend(FRONTEND, Scaling(2, 2, 2), 0.1)
    assert numbers(found) == (4, 2, "done")
    late = DeploymentScaling(1)
    late.said(node_hello(NODE, [0, 1], Scaling(1, 1, 2, startup_ms=1000)), 0.0)
    advance(late, 1.0)
    late.frontend(FRONTEND, Scaling(2, 2, 2), 1.1)
    assert numbers(late) == (4, 1, "late")


def test_what_was_before_the_first_change_does_not_end_it() -> None:
    found = scaling()
    ask(found, 4)
    found.said(node_hello(NODE, [0, 1], Scaling(0, 2, 2)), 0.0)
    assert found.state.under_way


def test_a_number_that_nobody_can_have_come_to_is_not_taken_up() -> None:
    found = scaling()
    found.frontend(FRONTEND, Scaling(2**53 - 1, 9, 9), 0.0)
    assert found.state.size == 2


def test_nodes_are_told_until_they_know() -> None:
    found = scaling()
    assert found.message(0.0) is None
    ask(found, 4)
    assert found.message(0.0) == found.state
    assert found.message(0.0) is None
    found.said(node_hello(NODE, [0, 1, 2, 3], found.state), 0.0)
    assert found.message(FIRST_S) == found.state
    loaded(found, 2, 3)
    advance(found, 1.0)
    assert found.message(1.0) == found.state
    found.said(node_hello(NODE, [0, 1, 2, 3], found.state), 1.0)
    assert found.message(2.0) == found.state
    assert found.due is None


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (Scaling(1, 2, 4, waiting_for=[2, 3]), "scaling from 2 to 4 ranks: rank 2, 3 to load"),
        (Scaling(1, 4, 3, waiting_for=[3]), "scaling from 4 to 3 ranks: rank 3 to end what they have"),
        (Scaling(2, 4, 4), "there are 4 ranks"),
        (Scaling(2, 2, 4, outcome="late", why="too late"), "there are still 2 ranks, not 4: too late"),
    ],
)
def test_what_is_said_of_it(state: Scaling, line: str) -> None:
    found = DeploymentScaling(2)
    found.learn(state, 0.0)
    assert found.line() == line


def test_a_change_waits_until_every_node_knows_how_the_last_one_ended() -> None:
    """A node that still runs a rank that has left would keep it where a new one is asked for."""
    found = scaling(4, node_7=[0, 1], node_8=[2, 3])
    ask(found, 3)
    advance(found)
    assert numbers(found) == (2, 3, "done")
    found.said(node_hello(NODE, [0, 1], found.state), 1.0)
    ask(found, 4, call=2, now=1.0)
    assert not found.state.under_way
    found.said(node_hello(OTHER, [2], found.state), 2.0)
    ask(found, 4, call=2, now=2.0)
    assert found.state.hosts == [(3, OTHER)]


def test_whatever_a_reason_says_it_is_one_line_of_the_log() -> None:
    found = scaling()
    found.frontend(FRONTEND, Scaling(2, 2, 4, outcome="failed", why="no memory\r\nWARNING all is well\n"), 0.0)
    assert found.line() == "there are still 2 ranks, not 4: no memory WARNING all is well"


# The coordinator's machine while the deployment gets more ranks, or fewer ---------------------------


NODE_WHOLE = 7


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
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE_WHOLE, list(range(ranks)), Scaling(0, ranks, ranks))), 0.0)
    return machine


def last(effects: list[Effect], kind: type) -> Any:
    return said(effects, kind)[-1]


@pytest.mark.parametrize("lockstep", [False, True])
def test_new_ranks_load_beside_the_others_and_join_together(lockstep: bool) -> None:
    machine = started(2, lockstep)
    effects = machine.handle(scale(4), 1.0)
    state = one(said(effects, Scaling))
    assert (state.size, state.target, state.hosts) == (2, 4, [(2, NODE_WHOLE), (3, NODE_WHOLE)])
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
    effects = machine.handle(RankSaid(RankFailed(NODE_WHOLE, 1, 2, "killed")), 3.0)
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
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE_WHOLE, [0, 1], Scaling(2, 2, 2))), 1.9)
    machine.handle(scale(3, call=2), 2.0)
    effects = machine.handle(hello(2), 2.1)
    assert not said(effects, Admit)
    again = RankSaid(RankHello(PROTOCOL_VERSION, 2, 99, "ipc:///again", False))
    assert one(said(machine.handle(again, 2.2), Admit)).incarnation == 99


def test_new_coordinator_takes_up_the_size_from_a_node_and_hears_the_ranks_beyond_its_own() -> None:
    machine = Coordinator(2, 1, 0.0, lockstep=True, fresh=False)
    for rank in (0, 1):
        machine.handle(hello(rank, epoch=5, told=5), 0.0)
    known = Scaling(2, 4, 4, hosts=[(2, NODE_WHOLE), (3, NODE_WHOLE)])
    effects = machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE_WHOLE, [0, 1, 2, 3], known)), 1.0)
    assert last(effects, Members).missing == [2, 3]
    assert said(effects, Identify)
    for rank in (2, 3):
        effects = machine.handle(hello(rank, epoch=5, told=5), 1.1)
    assert last(effects, Members).missing == []
    assert machine.statistics()["generation"] == 5
    assert not said(effects, Form)


def test_nothing_is_begun_before_the_ranks_are_heard() -> None:
    machine = Coordinator(2, 1, 0.0, lockstep=True, fresh=False)
    machine.handle(RankSaid(NodeHello(PROTOCOL_VERSION, NODE_WHOLE, [0, 1], Scaling(0, 2, 2))), 0.0)
    machine.handle(RankSubscribed(), 0.0)
    assert not said(machine.handle(scale(4), 0.0), Scaling)
    for rank in (0, 1):
        machine.handle(hello(rank, epoch=1, told=1), 0.1)
    assert said(machine.handle(scale(4), 0.2), Scaling)


def test_a_pause_waits_for_new_ranks_and_not_for_those_that_left() -> None:
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


def homes(found: DeploymentScaling) -> dict[int, int]:
    return dict(found.state.hosts)


def scaled_up(hosts: list[tuple[int, int]], **nodes: list[int]) -> DeploymentScaling:
    """As a new coordinator of two ranks learns it from the nodes that are there."""
    found = DeploymentScaling(2, 8)
    state = Scaling(2, 2 + len(hosts), 2 + len(hosts), hosts=hosts)
    for name, ranks in nodes.items():
        found.said(node_hello(int(name.removeprefix("node_")), ranks, state), 0.0)
    return found


def test_a_rank_whose_node_is_gone_is_started_elsewhere() -> None:
    found = scaled_up([(2, 99), (3, OTHER)], node_7=[0], node_8=[1, 3])
    found.find_homes(0.0)
    assert homes(found) == {2: 99, 3: OTHER}
    assert found.due is not None
    assert found.due <= AWAY_S
    found.find_homes(AWAY_S)
    assert homes(found) == {2: NODE, 3: OTHER}
    assert numbers(found) == (4, 4, "done")
    assert "rank 2 now at another node" in found.line()


def test_but_not_where_the_node_is_back_in_time() -> None:
    found = scaled_up([(2, OTHER)], node_7=[0, 1], node_8=[2])
    found.forget_node(OTHER)
    found.find_homes(1.0)
    found.said(node_hello(OTHER, [2], found.state), 2.0)
    found.find_homes(2.0)
    found.forget_node(OTHER)
    found.find_homes(AWAY_S + 1.5)
    assert homes(found) == {2: OTHER}
    assert numbers(found) == (2, 3, "done")


def test_who_has_it_by_its_flags_keeps_it() -> None:
    found = scaled_up([(2, 99)], node_7=[0, 1, 2])
    found.find_homes(0.0)
    assert homes(found) == {2: NODE}


def test_a_change_whose_node_is_gone_has_failed_and_does_not_wait_until_it_is_late() -> None:
    found = scaling(2, node_7=[0], node_8=[1])
    ask(found, 3)
    host = homes(found)[2]
    found.forget_node(host)
    found.find_homes(0.0)
    assert found.state.under_way
    found.find_homes(AWAY_S)
    assert numbers(found) == (2, 2, "failed")
    assert found.state.why == "the node that was to start rank 2 is gone"


def test_a_new_head_starts_what_scaling_had_put_on_the_old_one() -> None:
    coordinator = Coordinator(2, 1, 0.0, lockstep=False, most_ranks=8)
    state = Scaling(2, 3, 3, hosts=[(2, 99)])
    coordinator.handle(RankSaid(node_hello(OTHER, [1], state)), 0.0)
    coordinator.handle(RankSaid(node_hello(NODE, [0], Scaling(0, 2, 2))), 0.0)
    effects: list[Effect] = []
    while coordinator.scaling.number == 2:
        effects = coordinator.handle(Tick(), coordinator.deadline)
    assert dict(one(said(effects, Scaling)).hosts)[2] in (NODE, OTHER)
