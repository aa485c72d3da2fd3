"""The coordinator's machine: what it publishes, and when; whom it admits; what it forgets; reports taken together."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from paceline.core import binding, messages
from paceline.core.coordinator import events
from paceline.core.coordinator.events import Effect, RankSaid, RanksReported, Tick, ToFrontends
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, RankHello, RankReport
from paceline.core.requests import Refused
from tests.core.harness import find, one, said

INTERVAL_S = 0.1
FRONTEND = 100


def hello(rank: int, ready: bool = True, wave: int = 0, running: bool = False, incarnation: int = 0) -> events.RankSaid:
    life = incarnation or 10 + rank
    return events.RankSaid(
        messages.RankHello(messages.PROTOCOL_VERSION, rank, life, f"address {rank}", ready, wave, running)
    )


def report(
    rank: int, step: int, waiting: int = 0, taken: int = 0, incarnation: int = 0, wave: int = 0, running: bool = False
) -> events.RankSaid:
    by_frontend = {FRONTEND: taken} if taken else {}
    return events.RankSaid(
        messages.RankReport(rank, incarnation or 10 + rank, step, wave, running, Load(waiting), by_frontend)
    )


def sends(number: int, tokens: int = 10, rank: int = 0, frontend: int = FRONTEND) -> events.FrontendSaid:
    return events.FrontendSaid(binding.SendNotice(frontend, [binding.Send(rank, 10 + rank, number, tokens)]))


def started(ranks: int = 2, lockstep: bool = False, publish_loads: bool = True) -> Coordinator:
    """A coordinator whose ranks are ready and have reported step 1, quiet since second 0.3."""
    interval_s = INTERVAL_S if publish_loads else 0.0
    machine = Coordinator(ranks, 1, interval_s, lockstep=lockstep, publish_loads=publish_loads)
    for rank in range(ranks):
        machine.handle(hello(rank), 0.0)
        machine.handle(report(rank, 1), 0.0)
    machine.handle(events.Tick(), 0.2)
    machine.handle(events.Tick(), 0.3)
    return machine


def rank_view(effects: list[events.Effect], rank: int = 0) -> messages.RankView:
    return one(find(one(said(effects, messages.LoadView)).ranks, messages.RankView, rank=rank))


def unacked(effects: list[events.Effect], rank: int = 0) -> list[messages.OnTheWire]:
    return rank_view(effects, rank).on_the_wire


# Publishing -----------------------------------------------------------------------------------
def test_the_first_change_after_quiet_goes_out_at_once_and_the_next_after_the_interval() -> None:
    machine = started()
    assert rank_view(machine.handle(report(0, 2, waiting=5), 1.0)).load.waiting == 5
    assert machine.handle(report(0, 3, waiting=6), 1.01) == []
    assert machine.handle(report(1, 3, waiting=7), 1.02) == []
    assert machine.deadline == pytest.approx(1.1)
    effects = machine.handle(events.Tick(), machine.deadline)
    assert (rank_view(effects).load.waiting, rank_view(effects, 1).load.waiting) == (6, 7)
    assert machine.handle(events.Tick(), 1.3) == []


def test_views_are_numbered_and_signed() -> None:
    machine = started()
    first, second = (one(said(machine.handle(report(0, 2 + i), 1.0 + i), messages.LoadView)) for i in range(2))
    assert second.number == first.number + 1
    assert first.coordinator == second.coordinator == 1


def test_the_heartbeat_comes_after_four_quiet_seconds_with_the_members() -> None:
    machine = started()
    machine.handle(report(0, 2), 1.0)
    assert machine.deadline == pytest.approx(5.0)
    assert machine.handle(events.Tick(), 4.99) == []
    effects = machine.handle(events.Tick(), 5.0)
    assert [member.rank for member in one(said(effects, messages.Members)).members] == [0, 1]
    assert said(effects, messages.LoadView)
    # Members first: a view of a rank that nobody knows would be lost.
    assert [type(effect.message) for effect in find(effects, events.ToFrontends)] == [
        messages.Members,
        messages.LoadView,
    ]


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
            now, event = max(now, machine.deadline), events.Tick()
        else:
            rank, now = chance.randrange(3), arrives
            steps[rank] += chance.randrange(2)
            event = report(rank, steps[rank], waiting=chance.randrange(9))
            changed = now if changed is None else changed
        if said(machine.handle(event, now), messages.LoadView):
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
    effects = machine.handle(events.Tick(), 1.2)
    assert (rank_view(effects).load.waiting, rank_view(effects, 1).load.waiting) == (1, 3)
    assert rank_view(machine.handle(report(0, 50, waiting=4), 2.0)).load.waiting == 4


def test_lockstep_holds_a_view_until_all_ranks_have_reported_the_same_step() -> None:
    machine = started(3, lockstep=True)
    assert machine.handle(report(0, 2, waiting=1), 1.0) == []
    assert machine.handle(report(2, 2, waiting=1), 1.001) == []
    assert machine.deadline == pytest.approx(1.003)
    effects = machine.handle(report(1, 2, waiting=1), 1.002)
    assert {(entry.step, entry.load.waiting) for entry in one(said(effects, messages.LoadView)).ranks} == {(2, 1)}


def test_lockstep_publishes_what_there_is_after_three_milliseconds() -> None:
    machine = started(2, lockstep=True)
    assert machine.handle(report(0, 2, waiting=1), 1.0) == []
    assert machine.handle(report(0, 3, waiting=2), 1.002) == []
    assert machine.handle(events.Tick(), 1.0029) == []
    effects = machine.handle(events.Tick(), machine.deadline)
    assert rank_view(effects).load.waiting == 2


def test_a_change_of_the_wave_or_of_running_does_not_wait_for_the_interval() -> None:
    machine = started(2, lockstep=True)
    machine.handle(report(0, 2), 1.0)
    machine.handle(events.Tick(), 1.003)
    view = one(said(machine.handle(events.RankSaid(messages.StartWave(0, 10, 0)), 1.004), messages.LoadView))
    assert (view.wave, view.running) == (0, True)
    view = one(said(machine.handle(events.RankSaid(messages.WaveComplete(0, 10, 0)), 1.005), messages.LoadView))
    assert (view.wave, view.running) == (1, False)


def test_external_mode_publishes_no_loads_and_only_what_changes_of_the_wave() -> None:
    machine = started(2, lockstep=True, publish_loads=False)
    assert machine.handle(report(0, 2, waiting=5), 1.0) == []
    effects = machine.handle(events.RankSaid(messages.StartWave(0, 10, 0)), 1.1)
    assert one(said(effects, messages.LoadView)).ranks is None
    assert not said(machine.handle(report(0, 3, running=True), 1.2), messages.LoadView)
    assert not said(machine.handle(report(1, 3, running=True), 1.3), messages.LoadView)
    assert said(
        machine.handle(events.RankSaid(messages.WaveComplete(1, 11, 0)), 1.4),
        messages.LoadView,
        wave=1,
        running=False,
        ranks=None,
    )
    assert machine.handle(events.RankSaid(messages.WaveComplete(0, 10, 0)), 1.5) == []
    assert machine.handle(events.Tick(), 5.3) == []
    heartbeat = machine.handle(events.Tick(), 5.4)
    assert said(heartbeat, messages.LoadView, ranks=None)
    assert said(heartbeat, messages.Members)


@pytest.mark.parametrize("event", [events.FrontendGone(FRONTEND), sends(1)], ids=["gone", "sends"])
def test_external_mode_publishes_nothing_when_a_frontend_goes_or_sends(event: Any) -> None:
    machine = started(2, lockstep=True, publish_loads=False)
    assert machine.handle(event, 1.0) == []


# Ranks ----------------------------------------------------------------------------------------
def test_a_rank_is_told_the_wave_and_is_a_member_once_it_says_that_it_is_ready() -> None:
    machine = started(2, lockstep=True)
    for rank in (0, 1):
        machine.handle(hello(rank, wave=6), 1.0)
    machine.handle(events.RankSaid(messages.RankLeaving(1, 11)), 1.1)
    effects = machine.handle(hello(1, ready=False, incarnation=77), 1.2)
    assert find(effects, events.ToRanks, message=messages.Admit(1, 77, 6, messages.Suspension(0, "keep", True)))
    assert [member.rank for member in one(said(effects, messages.Members)).members] == [0]
    effects = machine.handle(hello(1, wave=6, incarnation=77), 1.3)
    members = one(said(effects, messages.Members))
    assert find(members.members, messages.Member, rank=1, incarnation=77, address="address 1")
    assert (members.wave, members.missing, members.ended) == (6, [], [])
    assert "rank 1 is back" in one(find(effects, events.Note)).text


def test_members_name_who_is_missing_and_who_has_ended() -> None:
    machine = started(3)
    effects = machine.handle(events.RankSaid(messages.RankLeaving(1, 11)), 1.0)
    members = one(said(effects, messages.Members))
    assert ([member.rank for member in members.members], members.missing, members.ended) == ([0, 2], [1], [(1, 11)])
    assert find(effects, events.Note)
    assert [entry.rank for entry in one(said(effects, messages.LoadView)).ranks] == [0, 2]


def test_a_rank_that_is_not_of_the_deployment_is_refused_with_a_note() -> None:
    machine = started(2)
    effects = machine.handle(hello(2, ready=False), 1.0)
    assert "rank 2 is not of this deployment of 2" in one(find(effects, events.Note)).text
    assert one(said(effects, Refused)).holder == ""
    assert machine.statistics()["void_messages"] == 1
    for moment in range(1, 10):
        assert find(machine.handle(hello(2, ready=False), 1.0 + moment / 10), events.Note) == []
    assert find(machine.handle(hello(2, ready=False), 61.0), events.Note)


def test_a_rank_number_has_one_holder_until_that_is_lost() -> None:
    machine = started(2)
    machine.handle(events.RankSubscribed(0, 10), 0.0)
    machine.handle(events.RankSubscribed(0, 77), 1.0)
    claim = events.RankSaid(messages.RankHello(messages.PROTOCOL_VERSION, 0, 77, "elsewhere", False))
    effects = machine.handle(claim, 1.0)
    refused = one(said(effects, Refused))
    assert (refused.rank, refused.incarnation) == (0, 77)
    assert "elsewhere, which claims it too, is refused" in one(find(effects, events.Note, urgent=True)).text
    assert not said(machine.handle(claim, 1.1), Refused)
    assert machine.lives()[0] == 10
    assert said(machine.handle(events.RankGone(0, 10), 2.0), messages.Identify) or machine.deadline <= 2.1
    assert not said(machine.handle(claim, 2.2), Refused)
    assert machine.epoch() is not None
    assert not machine.is_retired(0, 77)


@pytest.mark.parametrize(
    "late",
    [report(0, 99, waiting=9), events.RankSaid(messages.StartWave(0, 10, 0)),
     events.RankSaid(messages.WaveComplete(0, 10, 5)), events.RankSaid(messages.RankLeaving(0, 10))],
    ids=lambda event: type(event.message).__name__,
)  # fmt: skip
def test_what_an_old_life_still_says_is_void(late: events.RankSaid) -> None:
    machine = started(2, lockstep=True)
    machine.handle(hello(0, incarnation=77), 1.0)
    machine.handle(report(0, 1, waiting=4, incarnation=77), 1.01)
    machine.handle(events.Tick(), 1.2)
    before = machine.statistics()
    assert machine.handle(late, 1.3) == []
    after = machine.statistics()
    assert after | {"void_messages": 0} == before | {"void_messages": 0}
    assert after["void_messages"] != before["void_messages"]
    assert rank_view(machine.handle(report(1, 2), 1.4) + machine.handle(events.Tick(), 1.41)).load.waiting == 4


def test_a_late_hello_of_an_old_life_is_void() -> None:
    machine = started(2, lockstep=True)
    machine.handle(hello(0, incarnation=77), 1.0)
    machine.handle(report(0, 1, waiting=4, incarnation=77, running=True), 1.01)
    machine.handle(events.Tick(), 1.2)
    assert not said(machine.handle(hello(0, incarnation=10), 1.3), messages.Members)
    assert machine.statistics()["running"] is True
    assert rank_view(machine.handle(report(1, 2), 1.4) + machine.handle(events.Tick(), 1.41)).load.waiting == 4


def test_ranks_are_asked_who_they_are_when_one_subscribes() -> None:
    assert find(
        started().handle(events.RankSubscribed(), 1.0),
        events.ToRanks,
        message=messages.Identify(messages.PROTOCOL_VERSION, 1),
    )


def test_without_lockstep_there_are_no_waves() -> None:
    machine = started(2, lockstep=False)
    for message in (messages.StartWave(0, 10, 3), messages.WaveComplete(0, 10, 3)):
        assert machine.handle(events.RankSaid(message), 1.0) == []
    machine.handle(report(0, 2, wave=3, running=True), 1.0)
    assert not said(machine.handle(events.FrontendSaid(messages.WakeNotice(FRONTEND, 0, 0)), 1.0), messages.StartDPWave)
    assert (machine.statistics()["wave"], machine.statistics()["running"]) == (0, False)


# Waves ----------------------------------------------------------------------------------------
def test_the_wake_is_in_the_answer_and_repeated_until_all_have_said_that_they_run() -> None:
    machine = started(3, lockstep=True)
    effects = machine.handle(events.RankSaid(messages.StartWave(1, 11, 0)), 1.0)
    assert said(effects, messages.StartDPWave, wave=0, exclude=1)
    assert machine.deadline == pytest.approx(1.05)
    assert said(machine.handle(events.Tick(), 1.06), messages.StartDPWave, wave=0, exclude=None)
    assert machine.statistics()["lagging"] == [0, 2]
    machine.handle(hello(0, running=True), 1.07)
    machine.handle(report(2, 2, running=True), 1.08)
    assert machine.statistics()["lagging"] == []
    assert not said(machine.handle(events.Tick(), 3.0), messages.StartDPWave)


def test_an_empty_coordinator_learns_the_wave_from_hellos_and_wakes_those_behind() -> None:
    machine = Coordinator(3, 2, INTERVAL_S)
    machine.handle(hello(0, wave=7), 0.0)
    effects = machine.handle(hello(1, wave=8, running=True), 0.1)
    assert said(effects, messages.StartDPWave, wave=8)
    machine.handle(hello(2, wave=8, running=True), 0.11)
    statistics = machine.statistics()
    assert (statistics["wave"], statistics["running"], statistics["lagging"]) == (8, True, [0])


# Front-ends -----------------------------------------------------------------------------------
def test_who_subscribes_or_says_hello_is_answered_at_once() -> None:
    machine = started()
    machine.handle(report(0, 2), 1.0)
    for event in (
        events.FrontendSubscribed(),
        events.FrontendSaid(messages.FrontendHello(messages.PROTOCOL_VERSION, FRONTEND)),
    ):
        effects = machine.handle(event, 1.01)
        assert said(effects, messages.Members, version=messages.PROTOCOL_VERSION, coordinator=1)
        assert said(effects, messages.LoadView)
    assert machine.statistics()["front_ends"] == 1


def test_sends_are_shown_unacked_until_the_rank_reports_that_it_took_them() -> None:
    machine = started()
    effects = machine.handle(sends(1, tokens=10), 1.0)
    assert find(unacked(effects), messages.OnTheWire, frontend=FRONTEND, last=1, requests=1, tokens=10)
    machine.handle(sends(2, tokens=20), 1.01)
    assert find(unacked(machine.handle(report(0, 2, taken=1), 2.0)), messages.OnTheWire, last=2, requests=1, tokens=20)
    assert unacked(machine.handle(report(0, 3, taken=2), 3.0)) == []


def test_a_view_says_up_to_which_send_of_each_frontend_it_knows() -> None:
    machine = started()
    for told, frontend in ((3, 100), (5, 200), (4, 200)):
        machine.handle(events.FrontendSaid(binding.SendNotice(frontend, [binding.Send(0, 10, 1, 4)], told)), 1.0)
    assert one(said(machine.handle(events.Tick(), 2.0), messages.LoadView)).heard == {100: 3, 200: 5}
    assert one(said(machine.handle(events.FrontendGone(200), 3.0), messages.LoadView)).heard == {100: 3}


def test_sends_to_a_life_that_is_over_are_not_shown() -> None:
    machine = started()
    machine.handle(hello(0, incarnation=77), 1.0)
    assert machine.handle(sends(1), 1.2) == []


@pytest.mark.parametrize(
    "event", [events.FrontendGone(FRONTEND), events.FrontendSaid(messages.FrontendLeaving(FRONTEND))]
)
def test_a_frontend_that_is_gone_has_nothing_unacked(event: Any) -> None:
    machine = started()
    machine.handle(events.FrontendSaid(messages.FrontendHello(messages.PROTOCOL_VERSION, FRONTEND)), 1.0)
    machine.handle(sends(1), 1.2)
    machine.handle(sends(1, frontend=200), 1.21)
    effects = machine.handle(event, 2.0)
    assert [entry.frontend for entry in unacked(effects)] == [200]
    assert machine.statistics()["front_ends"] == 0


def test_a_new_coordinator_shows_no_load_that_it_was_not_told() -> None:
    machine = Coordinator(1, 2, INTERVAL_S, lockstep=False)
    assert one(said(machine.handle(hello(0), 0.0), messages.LoadView)).ranks == []


RANKS = 3
LIFE = 7

reports = st.lists(
    st.builds(
        RankReport, rank=st.integers(0, RANKS), incarnation=st.sampled_from([LIFE, LIFE, LIFE, LIFE + 1]),
        step=st.integers(0, 4), wave=st.integers(0, 2), running=st.booleans(),
        load=st.builds(Load, waiting=st.integers(0, 3)),
    ),
    max_size=20,
)  # fmt: skip


def ready_coordinator(lockstep: bool) -> Coordinator:
    coordinator = Coordinator(RANKS, 1, 0.1, lockstep=lockstep)
    for rank in range(RANKS):
        hello = RankHello(PROTOCOL_VERSION, rank, LIFE, f"ipc:///rank-{rank}", ready=True)
        coordinator.handle(RankSaid(hello), 0.0)
    coordinator.handle(Tick(), 10.0)
    return coordinator


def last_view(effects: list[Effect]) -> LoadView | None:
    views = [
        effect.message for effect in effects if isinstance(effect, ToFrontends) and isinstance(effect.message, LoadView)
    ]
    return views[-1] if views else None


def heartbeat(coordinator: Coordinator) -> LoadView | None:
    # The first Tick may begin to wait for half a step.
    return last_view([*coordinator.handle(Tick(), 30.0), *coordinator.handle(Tick(), 31.0)])


@given(reports, st.booleans())
def test_the_state_is_the_same(said: list[RankReport], lockstep: bool) -> None:
    together, apart = ready_coordinator(lockstep), ready_coordinator(lockstep)
    together.handle(RanksReported(said), 10.01)
    for report in said:
        apart.handle(RankSaid(report), 10.01)
    together_view, apart_view = heartbeat(together), heartbeat(apart)
    assert together_view is not None
    assert apart_view is not None
    assert (together_view.ranks, together_view.wave, together_view.running) == (
        apart_view.ranks, apart_view.wave, apart_view.running,
    )  # fmt: skip
    assert together.statistics()["void_messages"] == apart.statistics()["void_messages"]


def stepped(rank: int, step: int) -> RankReport:
    return RankReport(rank, LIFE, step, 0, True, Load(waiting=step))


def test_a_view_that_waits_for_one_step_goes_out_before_the_next_one_begins() -> None:
    coordinator = ready_coordinator(lockstep=True)
    # All have said step 1, and one already step 2: the view that was due shows step 1.
    said = [*(stepped(rank, 1) for rank in range(RANKS)), stepped(0, 2)]
    view = last_view(coordinator.handle(RanksReported(said), 10.2))
    assert view is not None
    assert view.ranks is not None
    assert {entry.step for entry in view.ranks} == {1}


def test_no_report_at_all_changes_nothing() -> None:
    coordinator = ready_coordinator(lockstep=False)
    assert coordinator.handle(RanksReported([]), 10.01) == []
