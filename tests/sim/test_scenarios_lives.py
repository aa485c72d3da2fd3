"""Lives that end at the worst moment: each was found by a seed of `paceline simulate` and is told here on its own."""

from __future__ import annotations

from paceline.core.messages import Form, StartDPWave, Suspension
from paceline.sim.deployment import Deployment
from paceline.sim.run import check_quiescence
from tests.sim.test_scenarios import deploy, run_a_wave, running, waves
from tests.sim.test_scenarios_suspended import control, steps

NONE: frozenset[str] = frozenset()


def all_formed(deployment: Deployment) -> bool:
    return len({rank.machine.epoch for rank in deployment.ranks.values()} - {0}) == 1 and all(
        rank.machine.epoch for rank in deployment.ranks.values()
    )


def test_a_coordinator_that_dies_while_an_epoch_is_formed_is_followed_by_a_higher_number() -> None:
    """The new coordinator counted from 1, below what ranks had been told; they ignored it for 10 s a number."""
    deployment = deploy(NONE, ranks=4)
    for _ in range(3):
        deployment.crash_rank(2)
        deployment.start_rank(2)
        deployment.world.run_until(lambda: all_formed(deployment))
    deployment.crash_rank(2)
    deployment.start_rank(2)
    deployment.ranks[3].broadcasts.lose(Form, times=100)
    deployment.world.run_for(0.1)
    deployment.crash_coordinator()
    deployment.ranks[3].broadcasts.lose_no_more()
    deployment.start_coordinator()
    took = deployment.world.run_until(lambda: all_formed(deployment), limit_s=10.0)
    assert took < 5.0
    run_a_wave(deployment)
    check_quiescence(deployment)


def test_survivors_do_not_wait_for_the_dead_life_of_a_rank() -> None:
    """The survivors of a death in mid-wave were told to form an epoch with the dead life, and waited for it."""
    deployment = deploy(NONE, ranks=4)
    frontend = deployment.frontends[0]
    requests = [frontend.submit(rank=number, max_tokens=100) for number in (0, 1, 3)]
    deployment.world.run_for(0.1)
    deployment.crash_rank(2)
    deployment.world.run_for(0.1)
    deployment.start_rank(2)
    assert deployment.world.run_until(lambda: all_formed(deployment), limit_s=10.0) < 0.5
    deployment.finish(limit_s=3.0)
    assert [frontend.answers[request].tokens for request in requests] == [100] * 3
    check_quiescence(deployment)


def test_a_new_coordinator_does_not_settle_a_pause_before_it_has_heard_all() -> None:
    """Independent ranks: those that the new coordinator knew were held, so the call returned while another stepped."""
    deployment = deploy(NONE, ranks=3, lockstep=False)
    frontend, unheard = deployment.frontends[0], deployment.ranks[2]
    frontend.submit(rank=2, max_tokens=200)
    deployment.world.run_for(0.1)
    deployment.crash_coordinator()
    deployment.start_coordinator()
    unheard.broadcasts.hold()
    call = frontend.calls[frontend.control("keep")]
    deployment.world.run_for(0.5)
    assert not call.over
    unheard.broadcasts.release()
    deployment.world.run_until(lambda: call.over, 3.0)
    before = steps(deployment)
    deployment.world.run_for(1.0)
    assert steps(deployment) == before
    control(deployment, frontend, "resume")
    deployment.finish()
    check_quiescence(deployment)


def test_a_wake_and_a_pause_that_reach_a_rank_together_leave_it_held() -> None:
    """In the order of their sending: first the wake, then the suspension, and nobody else runs."""
    deployment = deploy(NONE, ranks=3)
    frontend, late = deployment.frontends[0], deployment.ranks[1]
    late.broadcasts.hold()
    frontend.to_ranks[0].close()
    frontend.submit(rank=0)
    deployment.world.run_for(0.02)
    call = frontend.calls[frontend.control("keep")]
    deployment.world.run_for(0.2)
    assert not call.over
    late.broadcasts.release()
    deployment.world.run_until(lambda: call.over, 3.0)
    assert not running(deployment)
    before = steps(deployment)
    late.hear(Suspension(1, "keep", False))
    late.hear(StartDPWave(0, None))
    deployment.world.run_for(2.0)
    assert steps(deployment) == before


def test_survivors_go_on_without_a_rank_that_stays_away_and_it_joins_them_later() -> None:
    """Rank 0 like any other. What the dead rank had is not spoken of here."""
    deployment = deploy(NONE, ranks=4)
    frontend = deployment.frontends[0]
    requests = [frontend.submit(rank=number, max_tokens=100) for number in (1, 2, 3)]
    deployment.world.run_for(0.1)
    deployment.crash_rank(0)
    survivors = [deployment.ranks[number] for number in (1, 2, 3)]
    formed = lambda: {rank.machine.epoch for rank in survivors} == {2}  # noqa: E731
    assert deployment.world.run_until(formed, limit_s=10.0) < 0.3
    deployment.finish(limit_s=3.0)
    assert [frontend.answers[request].tokens for request in requests] == [100] * 3
    # A wave and a suspension need nobody who is not there.
    frontend.submit(rank=1)
    deployment.finish(limit_s=1.0)
    control(deployment, frontend, "keep")
    control(deployment, frontend, "resume")
    deployment.start_rank(0)
    frontend.submit(rank=2, max_tokens=100)
    assert deployment.world.run_until(lambda: all_formed(deployment), limit_s=10.0) < 0.3
    deployment.finish()
    run_a_wave(deployment)
    check_quiescence(deployment)


def test_a_new_coordinator_lets_survivors_go_on_without_a_rank_that_died_meanwhile() -> None:
    deployment = deploy(NONE, ranks=3)
    frontend = deployment.frontends[0]
    request = frontend.submit(rank=1, max_tokens=100)
    deployment.world.run_for(0.1)
    deployment.crash_coordinator()
    deployment.crash_rank(0)
    deployment.world.run_for(0.1)
    deployment.start_coordinator()
    deployment.finish(limit_s=5.0)
    assert frontend.answers[request].tokens == 100
    deployment.start_rank(0)
    deployment.world.run_until(lambda: all_formed(deployment), limit_s=10.0)
    run_a_wave(deployment)
    check_quiescence(deployment)


def test_a_wave_that_survivors_finish_while_another_rejoins_is_told_to_it() -> None:
    """The survivors paused just before they were told to form an epoch with the next life, which was told the wave
    that they had finished: at rest it stayed a wave behind, until the next wake."""
    deployment = deploy(NONE, ranks=3)
    survivors = [deployment.ranks[number] for number in (0, 1)]
    deployment.frontends[0].submit(rank=0, max_tokens=40)
    deployment.world.run_for(0.1)
    deployment.crash_rank(2)
    deployment.world.run_until(lambda: {rank.machine.epoch for rank in survivors} == {2})
    for rank in survivors:
        rank.broadcasts.lose(Form, times=100)
    joiner = deployment.start_rank(2)
    deployment.world.run_until(lambda: joiner.machine.told == 3)
    assert len(running(deployment)) == 2
    deployment.world.run_until(lambda: not running(deployment))
    for rank in survivors:
        rank.broadcasts.lose_no_more()
    deployment.world.run_until(lambda: all_formed(deployment))
    assert deployment.world.run_until(lambda: waves(deployment) == {1}, limit_s=2.0) < 0.5
    deployment.world.run_for(0.5)
    check_quiescence(deployment)


def test_survivors_of_a_rank_that_fell_silent_in_mid_wave_come_to_rest() -> None:
    """It was believed to run in the wave that they finished without it, so they were woken again and again for it."""
    deployment = deploy(NONE, ranks=3)
    silent, frontend = deployment.ranks[0], deployment.frontends[0]
    request = frontend.submit(rank=1, max_tokens=50)
    deployment.world.run_until(lambda: all(rank.machine.running for rank in deployment.ranks.values()))
    deployment.world.run_for(0.05)
    # As one that is stopped: nobody hears of it, and its peers lose it in the end.
    silent.to_coordinator.hold()
    silent.broadcasts.hold()
    deployment.groups.leave((0, silent.machine.incarnation))
    survivors = [deployment.ranks[number] for number in (1, 2)]
    deployment.world.run_until(lambda: {rank.machine.epoch for rank in survivors} == {2}, limit_s=10.0)
    deployment.finish(limit_s=3.0)
    assert frontend.answers[request].tokens == 50
    deployment.world.run_for(1.0)
    before = [rank.machine.wave for rank in survivors]
    deployment.world.run_for(10.0)
    assert [rank.machine.wave for rank in survivors] == before
    assert deployment.coordinator is not None
    assert deployment.coordinator.machine.statistics()["lagging"] == []
    silent.to_coordinator.release()
    silent.broadcasts.release()
    deployment.world.run_until(lambda: all_formed(deployment), limit_s=10.0)
    run_a_wave(deployment)
    check_quiescence(deployment)
