"""A coordinator, ranks and front-ends in virtual time: what users are promised."""

from __future__ import annotations

import pytest
from hypothesis import Phase, example, given, settings, strategies as st

from paceline.core.messages import LoadView, StartDPWave, WakeNotice
from paceline.sim.deployment import Deployment
from paceline.sim.world import Delays
from tests.core.harness import find
from tests.pace import examples
from tests.sim.deployments import DELAY_S, deploy, placed, ready, rest, seen, tokens, waves


# Cold starts and waves ------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [StartDPWave, WakeNotice])
def test_one_request_after_a_cold_start_runs_all_ranks_and_pauses_them_again(lost: type) -> None:
    deployment = ready(ranks=4)
    frontend = deployment.frontends[0]
    frontend.to_coordinator.lose(lost)
    deployment.ranks[3].broadcasts.lose(lost)
    request = frontend.submit(max_tokens=6, rank=2)
    deployment.finish(limit_s=0.3)
    assert frontend.answers[request].tokens == 6
    assert all(rank.dummy_steps > 0 for number, rank in deployment.ranks.items() if number != 2)
    rest(deployment)
    assert waves(deployment) == {1}
    assert (frontend.machine.wave, frontend.machine.running) == (1, False)


def test_a_wake_lost_at_one_rank_four_times_is_made_up_for() -> None:
    deployment = ready(ranks=3)
    deployment.ranks[1].broadcasts.lose(StartDPWave, times=4)
    deployment.frontends[0].submit(rank=0)
    took = deployment.finish()
    # Sent at 0, and again after 50, 150, 350 and 750 ms.
    assert 0.75 <= took < 1.0
    rest(deployment)


def test_ranks_that_are_not_woken_are_named() -> None:
    deployment = ready(ranks=3)
    deployment.ranks[1].broadcasts.hold()
    deployment.frontends[0].submit(rank=0)
    deployment.world.run_for(3.0)
    assert deployment.coordinator is not None
    assert deployment.coordinator.machine.statistics()["lagging"] == [1]
    deployment.ranks[1].broadcasts.release()
    rest(deployment)
    assert deployment.coordinator.machine.statistics()["lagging"] == []


def test_requests_at_two_ranks_at_once_are_one_wave() -> None:
    deployment = ready(ranks=3, frontends=2)
    first, second = deployment.frontends.values()
    first.submit(rank=0)
    second.submit(rank=2)
    rest(deployment)
    assert waves(deployment) == {1}


def test_a_request_stamped_with_a_finished_wave_starts_the_next_one() -> None:
    deployment = ready(ranks=2, frontends=2)
    fast, slow = deployment.frontends.values()
    fast.submit(rank=0)
    slow.broadcasts.hold()
    deployment.world.run_for(2.0)
    assert slow.machine.wave == 0
    request = slow.submit(rank=1, max_tokens=3)
    deployment.world.run_for(2.0)
    assert slow.answers[request].tokens == 3
    slow.broadcasts.release()
    rest(deployment)
    assert waves(deployment) == {2}


def test_a_request_that_arrives_while_the_ranks_agree_to_pause_is_served() -> None:
    # The wave's last agreement lasts from step to step: the request is sent at every millisecond around it.
    for delay_ms in range(60):
        deployment = ready(ranks=2)
        frontend = deployment.frontends[0]
        frontend.submit(rank=0, max_tokens=2)
        deployment.world.run_for(delay_ms / 1000)
        request = frontend.submit(rank=1, max_tokens=3)
        rest(deployment)
        assert frontend.answers[request].tokens == 3


def test_ranks_that_come_up_late_are_taken_into_the_wave_that_waits_for_them() -> None:
    deployment = deploy(ranks=3)
    deployment.start_coordinator()
    deployment.start_frontend(0)
    deployment.start_rank(0)
    deployment.world.run_until(lambda: deployment.frontends[0].machine.ready_ranks() == [0])
    deployment.frontends[0].submit()
    deployment.world.run_for(1.0)
    assert not deployment.frontends[0].finished()
    deployment.start_rank(1)
    deployment.world.run_for(1.0)
    deployment.start_rank(2)
    deployment.finish(limit_s=1.0)
    rest(deployment)


def test_a_restarted_rank_joins_in_the_wave_of_the_others() -> None:
    deployment = ready(ranks=2)
    frontend = deployment.frontends[0]
    for _ in range(3):
        frontend.submit()
        rest(deployment)
    deployment.crash_rank(1)
    reborn = deployment.start_rank(1).machine
    deployment.world.run_until(lambda: reborn.wave == 3)
    deployment.world.run_for(1.0)
    request = frontend.submit(rank=1)
    rest(deployment)
    assert frontend.answers[request].tokens == 2
    assert waves(deployment) == {4}


# Deaths ---------------------------------------------------------------------------------------
def test_a_wave_goes_on_and_ends_without_a_coordinator() -> None:
    deployment = ready(ranks=2)
    frontend = deployment.frontends[0]
    frontend.submit(max_tokens=50)
    deployment.world.run_for(0.1)
    deployment.crash_coordinator()
    late = frontend.submit(max_tokens=5)
    deployment.finish()
    assert frontend.answers[late].tokens == 5
    deployment.start_coordinator()
    rest(deployment)
    assert (frontend.machine.wave, frontend.machine.running) == (1, False)


def test_a_request_sent_while_there_is_no_coordinator_is_served_when_a_new_one_is_up() -> None:
    deployment = ready(ranks=3)
    frontend = deployment.frontends[0]
    frontend.submit()
    rest(deployment)
    deployment.crash_coordinator()
    request = frontend.submit(rank=1)
    deployment.world.run_for(2.0)
    assert not frontend.finished()
    deployment.start_coordinator()
    deployment.finish(limit_s=1.0)
    assert frontend.answers[request].tokens == 2
    rest(deployment)


def test_a_rank_that_starts_again_is_not_admitted_before_a_new_coordinator_has_heard_the_others() -> None:
    deployment = ready(ranks=2)
    deployment.frontends[0].submit()
    rest(deployment)
    deployment.crash_rank(1)
    deployment.crash_coordinator()
    deployment.start_coordinator()
    # The connection is up, and nothing has been said on it.
    deployment.world.run_for(1.5 * DELAY_S)
    deployment.ranks[0].to_coordinator.hold()
    deployment.start_rank(1)
    newcomer = deployment.start_frontend(0)
    deployment.world.run_for(3.0)
    assert newcomer.machine.ready_ranks() == []
    deployment.ranks[0].to_coordinator.release()
    deployment.world.run_until(lambda: newcomer.machine.ready_ranks() == [0, 1])
    assert deployment.ranks[1].machine.wave == deployment.ranks[0].machine.wave == 1
    newcomer.submit()
    deployment.finish(limit_s=5.0)


def test_what_a_killed_rank_was_doing_goes_on_elsewhere_and_its_next_life_serves() -> None:
    deployment = ready(ranks=2, lockstep=False)
    frontend = deployment.frontends[0]
    doomed, safe = frontend.submit(rank=0, max_tokens=100), frontend.submit(rank=1, max_tokens=100)
    deployment.world.run_for(0.1)
    deployment.crash_rank(0)
    deployment.start_rank(0)
    deployment.finish()
    assert not any(one.refused for one in frontend.answers.values())
    assert frontend.answers[safe].tokens == 100
    assert frontend.answers[doomed].tokens == 100
    again = frontend.submit(rank=0)
    rest(deployment)
    assert frontend.answers[again].tokens == 2


def test_what_clients_abandon_leaves_the_engine() -> None:
    deployment = ready(ranks=2, lockstep=False)
    frontend = deployment.frontends[0]
    request = frontend.submit(rank=0, max_tokens=1000)
    deployment.world.run_for(0.1)
    frontend.abandon(request)
    deployment.world.run_for(0.1)
    assert not deployment.ranks[0].engine.has_work()
    rest(deployment)


@pytest.mark.parametrize("pause_s", [2.5, 0.1], ids=["quiet", "steady-load"])
def test_a_frontend_that_missed_the_members_hears_of_them_again(pause_s: float) -> None:
    deployment = deploy(ranks=1, frontends=2, lockstep=False).start()
    told, missed = deployment.frontends.values()
    missed.broadcasts.closed = True
    deployment.world.run_until(lambda: told.machine.ready_ranks() == [0])
    deployment.world.run_for(0.1)
    missed.broadcasts.closed = False
    assert missed.machine.ready_ranks() == []
    for _ in range(int(10 / pause_s)):
        told.submit()
        deployment.world.run_for(pause_s)
    # The quiet case has its heartbeat after the last of them.
    deployment.world.run_for(2.0)
    assert missed.machine.ready_ranks() == [0]


# Modes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [True, False])
def test_external_mode_serves_each_rank_by_its_own_frontend_and_publishes_no_load(lockstep: bool) -> None:
    deployment = ready(ranks=3, frontends=3, lockstep=lockstep, external=True)
    for number, frontend in deployment.frontends.items():
        frontend.submit()
        assert placed(frontend) == {1: number}
    rest(deployment)
    views = find(seen(deployment).broadcasts, LoadView)
    assert views
    assert all(view.ranks is None for view in views)


def test_in_external_mode_what_has_ended_does_not_wait() -> None:
    deployment = ready(ranks=1, frontends=1, lockstep=False, external=True)
    frontend = deployment.frontends[0]
    for _ in range(3):
        frontend.submit()
        deployment.finish()
    frontend.abandon(frontend.submit())
    assert frontend.machine.waiting() == 0
    assert frontend.machine.believed(0).waiting == 0
    kept = [frontend.submit(max_tokens=50) for _ in range(4)]
    assert frontend.machine.believed(0).waiting == len(kept)
    rest(deployment)


def schedules(*actions: str) -> st.SearchStrategy[list[tuple[float, str, int]]]:
    steps = st.tuples(st.floats(0.0, 0.3), st.sampled_from(["submit", "submit", *actions]), st.integers(0, 11))
    return st.lists(steps, max_size=25)


def run_schedule(deployment: Deployment, schedule: list[tuple[float, str, int]]) -> None:
    for pause_s, what, which in schedule:
        deployment.world.run_for(pause_s)
        frontend, rank = deployment.frontends[which % 2], deployment.ranks[which % 3]
        match what:
            case "submit":
                frontend.submit(tokens=1 + which, max_tokens=1 + which)
            case "lose":
                rank.broadcasts.lose(StartDPWave)
                frontend.broadcasts.lose(LoadView)
                frontend.to_coordinator.lose(WakeNotice)
            case "slow":
                rank.broadcasts.delays = frontend.broadcasts.delays = Delays(which / 100, 0.0, 0.0, 0.0)
            case "crash":
                deployment.crash_coordinator()
            case "restart":
                deployment.crash_coordinator()
                deployment.start_coordinator()
    deployment.lose_no_more()
    rest(deployment)
    # Whole, or abandoned: an answer of a wrong length had ended the run.
    assert 0 not in tokens(deployment.frontends.values())


@settings(max_examples=examples(60))
@given(schedules("lose", "slow"), st.booleans())
def test_whatever_is_lost_or_late_every_request_is_answered(
    schedule: list[tuple[float, str, int]], lockstep: bool
) -> None:
    run_schedule(ready(ranks=3, frontends=2, lockstep=lockstep), schedule)


@settings(max_examples=examples(60), phases=[Phase.explicit, Phase.generate])
@example([(0.0, "submit", 0), (0.25, "restart", 0)], False)
@example([(0.0, "crash", 0), (0.0, "submit", 0), (0.1, "lose", 0)], True)
@given(schedules("lose", "slow", "crash", "restart"), st.booleans())
def test_whatever_happens_to_the_coordinator_every_request_is_answered(
    schedule: list[tuple[float, str, int]], lockstep: bool
) -> None:
    deployment = ready(ranks=3, frontends=2, lockstep=lockstep)
    run_schedule(deployment, [*schedule, (0.0, "restart", 0)])
