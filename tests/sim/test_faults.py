"""Faults and operators' calls: drawn from the seed, and what they do to a deployment."""

from __future__ import annotations

import itertools
import random

from paceline.sim.deployment import Deployment, Shape
from paceline.sim.faults import (
    MAX_ANSWER_TOKENS,
    MAX_PROMPT_TOKENS,
    Fault,
    FaultKind,
    Faults,
    Period,
    draw_arrivals,
    draw_calls,
    draw_faults,
    draw_steady,
)
from paceline.sim.run import Options, check_quiescence, simulate


def faults(ranks_may_die: bool = True) -> list[Fault]:
    return draw_faults(random.Random(1), 100, 100, Period(5.0, 10.0, 4, 2), ranks_may_die)


def test_faults_of_every_kind_are_drawn_within_the_time() -> None:
    drawn = faults()
    assert len(drawn) == 200
    assert {fault.kind for fault in drawn} == set(FaultKind.__args__)  # type: ignore[attr-defined]
    assert all(5.0 <= fault.at <= 15.0 for fault in drawn)
    assert [fault.at for fault in drawn] == sorted(fault.at for fault in drawn)
    assert "rank-crash" not in {fault.kind for fault in faults(ranks_may_die=False)}


def test_drawn_arrivals_are_in_order_within_bounds_and_come_in_bursts() -> None:
    arrivals = draw_arrivals(random.Random(1), 500, Period(0.0, 10.0, 4, 3))
    assert len(arrivals) == 500
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert all(
        1 <= a.prompt_tokens <= MAX_PROMPT_TOKENS and 1 <= a.answer_tokens <= MAX_ANSWER_TOKENS for a in arrivals
    )
    assert {a.frontend for a in arrivals} == {0, 1, 2}
    assert {a.rank for a in arrivals} == {None, 0, 1, 2, 3}
    assert any(a.patience_s is not None for a in arrivals)
    gaps = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    assert sum(gap < 0.003 for gap in gaps) > 100
    assert max(gaps) > 0.1


def test_every_pause_has_a_resume_and_some_cross() -> None:
    calls = draw_calls(random.Random(1), 50, Period(0.0, 10.0, 2, 3))
    actions = [call.what for call in calls]
    assert set(actions) == {"keep", "wait", "abort", "resume"}
    assert actions.count("resume") >= 50
    suspended, crossed = 0, 0
    for action in actions:
        suspended += -1 if action == "resume" else 1
        crossed += suspended > 1
    assert crossed


def test_steady_faults_come_so_often_and_of_every_kind() -> None:
    period = Period(5.0, 100.0, 4, 2)
    drawn, calls = draw_steady(random.Random(1), 2.0, period, lockstep=True)
    suspensions = sum(call.what != "resume" for call in calls)
    assert 160 < len(drawn) + suspensions < 260
    assert {fault.kind for fault in drawn} == set(FaultKind.__args__)  # type: ignore[attr-defined]
    assert all(5.0 <= fault.at <= 105.0 for fault in drawn)
    independent, _ = draw_steady(random.Random(1), 2.0, period, lockstep=False)
    assert "lost-wake" not in {fault.kind for fault in independent}


def test_an_aimed_crash_is_one_of_a_rank_that_has_requests() -> None:
    deployment = Deployment(Shape(ranks=3)).start().ready()
    deployment.frontends[0].submit(max_tokens=100, rank=1)
    deployment.world.run_for(0.02)
    faults = Faults(deployment)
    faults.schedule([Fault(deployment.world.now, "rank-crash", 2, 0.5, aimed=True)])
    deployment.world.run_for(0.1)
    assert [number for number, rank in deployment.ranks.items() if not rank.alive] == [1]
    deployment.finish()
    assert deployment.frontends[0].answers.moved == 1


def struck(kind: FaultKind) -> tuple[Deployment, Faults]:
    deployment = Deployment(Shape(ranks=2, frontends=2)).start().ready()
    faults = Faults(deployment)
    faults.schedule([Fault(deployment.world.now, kind, 1, 0.5, 4.0)])
    deployment.world.run_for(0.1)
    return deployment, faults


def recovered(deployment: Deployment, faults: Faults) -> None:
    deployment.world.run_until(faults.over)
    deployment.world.run_for(2.0)
    deployment.ready()
    deployment.frontends[1].submit(rank=1)
    deployment.finish()
    check_quiescence(deployment)


def test_the_coordinator_crashes_and_returns_empty() -> None:
    deployment, faults = struck("coordinator-crash")
    assert deployment.coordinator is None
    recovered(deployment, faults)
    assert len(deployment.coordinators) == 2


def test_a_rank_crashes_and_returns_as_another_life() -> None:
    deployment, faults = struck("rank-crash")
    before = deployment.ranks[1]
    assert not before.alive
    recovered(deployment, faults)
    assert deployment.ranks[1].machine.incarnation > before.machine.incarnation


def test_a_frontend_crashes_and_its_clients_are_counted_as_gone() -> None:
    deployment = Deployment(Shape(ranks=2, frontends=2)).start().ready()
    request = deployment.frontends[1].submit(max_tokens=100)
    faults = Faults(deployment)
    faults.schedule([Fault(deployment.world.now, "front-end-crash", 1, 0.5)])
    deployment.world.run_for(0.1)
    assert deployment.retired[0].answers[request].abandoned
    assert deployment.living_frontend(1) is deployment.frontends[0]
    recovered(deployment, faults)


def test_a_slow_rank_slows_all_and_recovers() -> None:
    deployment, faults = struck("slow-rank")
    deployment.frontends[0].submit(rank=0, max_tokens=5)
    slow = deployment.finish()
    deployment.world.run_until(faults.over)
    deployment.world.run_for(1.0)
    deployment.frontends[0].submit(rank=0, max_tokens=5)
    assert slow > 2 * deployment.finish()
    recovered(deployment, faults)


def test_a_rank_that_is_cut_off_hears_everything_later() -> None:
    deployment, faults = struck("cut-off")
    deployment.frontends[0].submit(rank=0)
    assert deployment.finish() > 0.3
    recovered(deployment, faults)


def test_a_rank_that_is_heard_late_is_woken_for_nothing_and_no_more() -> None:
    deployment, faults = struck("unheard")
    deployment.frontends[0].submit(rank=0)
    assert deployment.finish() < 0.3
    recovered(deployment, faults)


def test_two_crashes_of_one_process_at_once_are_one() -> None:
    deployment = Deployment(Shape(ranks=2)).start().ready()
    faults = Faults(deployment)
    faults.schedule([Fault(deployment.world.now, "rank-crash", 1, 0.5)] * 3)
    deployment.world.run_for(0.1)
    assert faults.happened == {"rank-crash": 1}


def test_a_run_counts_what_happened() -> None:
    outcome = simulate(Options(3, ranks=4, crashes=5, suspensions=4, lockstep=False, duration=4.0))
    assert outcome.ok, outcome.verdict
    assert outcome.faults["resume"] >= 4
    assert sum(count for kind, count in outcome.faults.items() if kind.endswith("crash")) >= 3
