"""The coordinator's machine: what it publishes, and when; whom it admits; what it forgets."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paceline.core.coordinator.events import (
    Effect,
    FrontendGone,
    FrontendSaid,
    FrontendSubscribed,
    Note,
    RankSaid,
    RankSubscribed,
    Tick,
    ToFrontends,
    ToRanks,
)
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    FrontendHello,
    FrontendLeaving,
    Identify,
    LoadView,
    Member,
    Members,
    OnTheWire,
    RankHello,
    RankLeaving,
    RankReport,
    RankView,
    Send,
    SendNotice,
    StartDPWave,
    StartWave,
    Suspension,
    WakeNotice,
    WaveComplete,
)
from tests.core.harness import find, one, said

INTERVAL_S = 0.1
FRONTEND = 100


def hello(rank: int, ready: bool = True, wave: int = 0, running: bool = False, incarnation: int = 0) -> RankSaid:
    life = incarnation or 10 + rank
    return RankSaid(RankHello(PROTOCOL_VERSION, rank, life, f"address {rank}", ready, wave, running))


def report(
    rank: int, step: int, waiting: int = 0, taken: int = 0, incarnation: int = 0, wave: int = 0, running: bool = False
) -> RankSaid:
    by_frontend = {FRONTEND: taken} if taken else {}
    return RankSaid(RankReport(rank, incarnation or 10 + rank, step, wave, running, Load(waiting), by_frontend))


def sends(number: int, tokens: int = 10, rank: int = 0, frontend: int = FRONTEND) -> FrontendSaid:
    return FrontendSaid(SendNotice(frontend, [Send(rank, 10 + rank, number, tokens)]))


def started(ranks: int = 2, lockstep: bool = False, publish_loads: bool = True) -> Coordinator:
    """A coordinator whose ranks are ready and have reported step 1, quiet since second 0.3."""
    interval_s = INTERVAL_S if publish_loads else 0.0
    machine = Coordinator(ranks, 1, interval_s, lockstep=lockstep, publish_loads=publish_loads)
    for rank in range(ranks):
        machine.handle(hello(rank), 0.0)
        machine.handle(report(rank, 1), 0.0)
    machine.handle(Tick(), 0.2)
    machine.handle(Tick(), 0.3)
    return machine


def rank_view(effects: list[Effect], rank: int = 0) -> RankView:
    return one(find(one(said(effects, LoadView)).ranks, RankView, rank=rank))


def unacked(effects: list[Effect], rank: int = 0) -> list[OnTheWire]:
    return rank_view(effects, rank).on_the_wire


# Publishing -----------------------------------------------------------------------------------


def test_the_first_change_after_quiet_goes_out_at_once_and_the_next_after_the_interval() -> None:
    machine = started()
    assert rank_view(machine.handle(report(0, 2, waiting=5), 1.0)).load.waiting == 5
    assert machine.handle(report(0, 3, waiting=6), 1.01) == []
    assert machine.handle(report(1, 3, waiting=7), 1.02) == []
    assert machine.deadline == pytest.approx(1.1)
    effects = machine.handle(Tick(), machine.deadline)
    assert (rank_view(effects).load.waiting, rank_view(effects, 1).load.waiting) == (6, 7)
    assert machine.handle(Tick(), 1.3) == []


def test_views_are_numbered_and_signed() -> None:
    machine = started()
    first, second = (one(said(machine.handle(report(0, 2 + i), 1.0 + i), LoadView)) for i in range(2))
    assert second.number == first.number + 1
    assert first.coordinator == second.coordinator == 1


def test_the_heartbeat_comes_after_four_quiet_seconds_with_the_members() -> None:
    machine = started()
    machine.handle(report(0, 2), 1.0)
    assert machine.deadline == pytest.approx(5.0)
    assert machine.handle(Tick(), 4.99) == []
    effects = machine.handle(Tick(), 5.0)
    assert [member.rank for member in one(said(effects, Members)).members] == [0, 1]
    assert said(effects, LoadView)
    # Members first: a view of a rank that nobody knows would be lost.
    assert [type(effect.message) for effect in find(effects, ToFrontends)] == [Members, LoadView]


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_no_input_delays_publishing(seed: int, lockstep: bool) -> None:
    chance, machine = random.Random(seed), started(3, lockstep)
    now, published, changed, steps = 1.0, 0.0, None, [1, 1, 1]
    grace_s = 0.003 if lockstep else 0.0
    views = 0
    for _ in range(2_000):
        arrives = now + chance.expovariate(1000)
        if machine.deadline <= arrives:
            now, event = max(now, machine.deadline), Tick()
        else:
            rank, now = chance.randrange(3), arrives
            steps[rank] += chance.randrange(2)
            event = report(rank, steps[rank], waiting=chance.randrange(9))
            changed = now if changed is None else changed
        if said(machine.handle(event, now), LoadView):
            assert now - published >= INTERVAL_S - grace_s - 1e-9
            views += 1
            published, changed = now, None
        elif changed is not None:
            assert now <= max(changed, published + INTERVAL_S) + grace_s + 1e-9
    assert views <= (now - 1.0) / INTERVAL_S + 1, "one that comes early makes no later one earlier"


def test_order_is_per_rank() -> None:
    machine = started()
    machine.handle(report(0, 50, waiting=1), 1.0)
    void = machine.statistics()["void_messages"]
    machine.handle(report(0, 49, waiting=2), 1.01)
    assert machine.statistics()["void_messages"] == void + 1
    machine.handle(report(1, 2, waiting=3), 1.02)
    effects = machine.handle(Tick(), 1.2)
    assert (rank_view(effects).load.waiting, rank_view(effects, 1).load.waiting) == (1, 3)
    assert rank_view(machine.handle(report(0, 50, waiting=4), 2.0)).load.waiting == 4


def test_lockstep_holds_a_view_until_all_ranks_have_reported_the_same_step() -> None:
    machine = started(3, lockstep=True)
    assert machine.handle(report(0, 2, waiting=1), 1.0) == []
    assert machine.handle(report(2, 2, waiting=1), 1.001) == []
    assert machine.deadline == pytest.approx(1.003)
    effects = machine.handle(report(1, 2, waiting=1), 1.002)
    assert {(entry.step, entry.load.waiting) for entry in one(said(effects, LoadView)).ranks} == {(2, 1)}


def test_lockstep_publishes_what_there_is_after_three_milliseconds() -> None:
    machine = started(2, lockstep=True)
    assert machine.handle(report(0, 2, waiting=1), 1.0) == []
    assert machine.handle(report(0, 3, waiting=2), 1.002) == []
    assert machine.handle(Tick(), 1.0029) == []
    effects = machine.handle(Tick(), machine.deadline)
    assert rank_view(effects).load.waiting == 2


def test_a_change_of_the_wave_or_of_running_does_not_wait_for_the_interval() -> None:
    machine = started(2, lockstep=True)
    machine.handle(report(0, 2), 1.0)
    machine.handle(Tick(), 1.003)
    view = one(said(machine.handle(RankSaid(StartWave(0, 10, 0)), 1.004), LoadView))
    assert (view.wave, view.running) == (0, True)
    view = one(said(machine.handle(RankSaid(WaveComplete(0, 10, 0)), 1.005), LoadView))
    assert (view.wave, view.running) == (1, False)


def test_external_mode_publishes_no_loads_and_only_what_changes_of_the_wave() -> None:
    machine = started(2, lockstep=True, publish_loads=False)
    assert machine.handle(report(0, 2, waiting=5), 1.0) == []
    effects = machine.handle(RankSaid(StartWave(0, 10, 0)), 1.1)
    assert one(said(effects, LoadView)).ranks is None
    assert not said(machine.handle(report(0, 3, running=True), 1.2), LoadView)
    assert not said(machine.handle(report(1, 3, running=True), 1.3), LoadView)
    assert said(machine.handle(RankSaid(WaveComplete(1, 11, 0)), 1.4), LoadView, wave=1, running=False, ranks=None)
    assert machine.handle(RankSaid(WaveComplete(0, 10, 0)), 1.5) == []
    assert machine.handle(Tick(), 5.3) == []
    heartbeat = machine.handle(Tick(), 5.4)
    assert said(heartbeat, LoadView, ranks=None)
    assert said(heartbeat, Members)


@pytest.mark.parametrize("event", [FrontendGone(FRONTEND), sends(1)], ids=["gone", "sends"])
def test_external_mode_publishes_nothing_when_a_frontend_goes_or_sends(event: Any) -> None:
    machine = started(2, lockstep=True, publish_loads=False)
    assert machine.handle(event, 1.0) == []


# Ranks ----------------------------------------------------------------------------------------


def test_a_rank_is_told_the_wave_and_is_a_member_once_it_says_that_it_is_ready() -> None:
    machine = started(2, lockstep=True)
    for rank in (0, 1):
        machine.handle(hello(rank, wave=6), 1.0)
    machine.handle(RankSaid(RankLeaving(1, 11)), 1.1)
    effects = machine.handle(hello(1, ready=False, incarnation=77), 1.2)
    assert find(effects, ToRanks, message=Admit(1, 77, 6, Suspension(0, "keep", True)))
    assert [member.rank for member in one(said(effects, Members)).members] == [0]
    effects = machine.handle(hello(1, wave=6, incarnation=77), 1.3)
    members = one(said(effects, Members))
    assert find(members.members, Member, rank=1, incarnation=77, address="address 1")
    assert (members.wave, members.missing, members.ended) == (6, [], [])
    assert "rank 1 is ready" in one(find(effects, Note)).text


def test_members_name_who_is_missing_and_who_has_ended() -> None:
    machine = started(3)
    effects = machine.handle(RankSaid(RankLeaving(1, 11)), 1.0)
    members = one(said(effects, Members))
    assert ([member.rank for member in members.members], members.missing, members.ended) == ([0, 2], [1], [(1, 11)])
    assert find(effects, Note)
    assert [entry.rank for entry in one(said(effects, LoadView)).ranks] == [0, 2]


def test_a_rank_that_is_not_of_the_deployment_is_refused_with_a_note() -> None:
    machine = started(2)
    effects = machine.handle(hello(2, ready=False), 1.0)
    assert "rank 2 is not of this deployment of 2" in one(find(effects, Note)).text
    assert find(effects, ToRanks) == []
    assert machine.statistics()["void_messages"] == 1
    for moment in range(1, 10):
        assert find(machine.handle(hello(2, ready=False), 1.0 + moment / 10), Note) == []
    assert find(machine.handle(hello(2, ready=False), 2.0), Note)


@pytest.mark.parametrize(
    "late",
    [report(0, 99, waiting=9), RankSaid(StartWave(0, 10, 0)), RankSaid(WaveComplete(0, 10, 5)),
     RankSaid(RankLeaving(0, 10))],
    ids=lambda event: type(event.message).__name__,
)  # fmt: skip
def test_what_an_old_life_still_says_is_void(late: RankSaid) -> None:
    machine = started(2, lockstep=True)
    machine.handle(hello(0, incarnation=77), 1.0)
    machine.handle(report(0, 1, waiting=4, incarnation=77), 1.01)
    machine.handle(Tick(), 1.2)
    before = machine.statistics()
    assert machine.handle(late, 1.3) == []
    after = machine.statistics()
    assert after | {"void_messages": 0} == before | {"void_messages": 0}
    assert after["void_messages"] != before["void_messages"]
    assert rank_view(machine.handle(report(1, 2), 1.4) + machine.handle(Tick(), 1.41)).load.waiting == 4


def test_a_late_hello_of_an_old_life_is_void() -> None:
    machine = started(2, lockstep=True)
    machine.handle(hello(0, incarnation=77), 1.0)
    machine.handle(report(0, 1, waiting=4, incarnation=77, running=True), 1.01)
    machine.handle(Tick(), 1.2)
    assert not said(machine.handle(hello(0, incarnation=10), 1.3), Members)
    assert machine.statistics()["running"] is True
    assert rank_view(machine.handle(report(1, 2), 1.4) + machine.handle(Tick(), 1.41)).load.waiting == 4


def test_ranks_are_asked_who_they_are_when_one_subscribes() -> None:
    assert find(started().handle(RankSubscribed(), 1.0), ToRanks, message=Identify(PROTOCOL_VERSION, 1))


def test_without_lockstep_there_are_no_waves() -> None:
    machine = started(2, lockstep=False)
    for message in (StartWave(0, 10, 3), WaveComplete(0, 10, 3)):
        assert machine.handle(RankSaid(message), 1.0) == []
    machine.handle(report(0, 2, wave=3, running=True), 1.0)
    assert not said(machine.handle(FrontendSaid(WakeNotice(FRONTEND, 0, 0)), 1.0), StartDPWave)
    assert (machine.statistics()["wave"], machine.statistics()["running"]) == (0, False)


# Waves ----------------------------------------------------------------------------------------


def test_the_wake_is_in_the_answer_and_repeated_until_all_have_said_that_they_run() -> None:
    machine = started(3, lockstep=True)
    effects = machine.handle(RankSaid(StartWave(1, 11, 0)), 1.0)
    assert said(effects, StartDPWave, wave=0, exclude=1)
    assert machine.deadline == pytest.approx(1.05)
    assert said(machine.handle(Tick(), 1.06), StartDPWave, wave=0, exclude=None)
    assert machine.statistics()["lagging"] == [0, 2]
    machine.handle(hello(0, running=True), 1.07)
    machine.handle(report(2, 2, running=True), 1.08)
    assert machine.statistics()["lagging"] == []
    assert not said(machine.handle(Tick(), 3.0), StartDPWave)


def test_an_empty_coordinator_learns_the_wave_from_hellos_and_wakes_those_behind() -> None:
    machine = Coordinator(3, 2, INTERVAL_S)
    machine.handle(hello(0, wave=7), 0.0)
    effects = machine.handle(hello(1, wave=8, running=True), 0.1)
    assert said(effects, StartDPWave, wave=8)
    machine.handle(hello(2, wave=8, running=True), 0.11)
    statistics = machine.statistics()
    assert (statistics["wave"], statistics["running"], statistics["lagging"]) == (8, True, [0])


# Front-ends -----------------------------------------------------------------------------------


def test_who_subscribes_or_says_hello_is_answered_at_once() -> None:
    machine = started()
    machine.handle(report(0, 2), 1.0)
    for event in (FrontendSubscribed(), FrontendSaid(FrontendHello(PROTOCOL_VERSION, FRONTEND))):
        effects = machine.handle(event, 1.01)
        assert said(effects, Members, version=PROTOCOL_VERSION, coordinator=1)
        assert said(effects, LoadView)
    assert machine.statistics()["front_ends"] == 1


def test_sends_are_shown_unacked_until_the_rank_reports_that_it_took_them() -> None:
    machine = started()
    effects = machine.handle(sends(1, tokens=10), 1.0)
    assert find(unacked(effects), OnTheWire, frontend=FRONTEND, last=1, requests=1, tokens=10)
    machine.handle(sends(2, tokens=20), 1.01)
    assert find(unacked(machine.handle(report(0, 2, taken=1), 2.0)), OnTheWire, last=2, requests=1, tokens=20)
    assert unacked(machine.handle(report(0, 3, taken=2), 3.0)) == []


def test_a_view_says_up_to_which_send_of_each_frontend_it_knows() -> None:
    machine = started()
    for told, frontend in ((3, 100), (5, 200), (4, 200)):
        machine.handle(FrontendSaid(SendNotice(frontend, [Send(0, 10, 1, 4)], told)), 1.0)
    assert one(said(machine.handle(Tick(), 2.0), LoadView)).heard == {100: 3, 200: 5}
    assert one(said(machine.handle(FrontendGone(200), 3.0), LoadView)).heard == {100: 3}


def test_sends_to_a_life_that_is_over_are_not_shown() -> None:
    machine = started()
    machine.handle(hello(0, incarnation=77), 1.0)
    assert machine.handle(sends(1), 1.2) == []


@pytest.mark.parametrize("event", [FrontendGone(FRONTEND), FrontendSaid(FrontendLeaving(FRONTEND))])
def test_a_frontend_that_is_gone_has_nothing_unacked(event: Any) -> None:
    machine = started()
    machine.handle(FrontendSaid(FrontendHello(PROTOCOL_VERSION, FRONTEND)), 1.0)
    machine.handle(sends(1), 1.2)
    machine.handle(sends(1, frontend=200), 1.21)
    effects = machine.handle(event, 2.0)
    assert [entry.frontend for entry in unacked(effects)] == [200]
    assert machine.statistics()["front_ends"] == 0


def test_a_new_coordinator_shows_no_load_that_it_was_not_told() -> None:
    machine = Coordinator(1, 2, INTERVAL_S, lockstep=False)
    assert one(said(machine.handle(hello(0), 0.0), LoadView)).ranks == []
