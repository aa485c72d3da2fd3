"""What users of the reference saw, one test each (DESIGN.md, section 3), on the real machines in virtual time.

Each takes the rules that are left out (`protocol/rules.py`), none by default; `test_without_its_rule_it_fails` leaves
out the one that the scenario rests on. `test_scenarios_suspended.py` has those about suspensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paceline.core.coordinator.load_table import PublishClock
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import LoadView, StartDPWave, WakeNotice, WaveComplete
from paceline.sim.deployment import Deployment, Shape
from paceline.sim.run import check_quiescence
from paceline.sim.world import Violation


def deploy(without: frozenset[str], **shape: Any) -> Deployment:
    deployment = Deployment(Shape(sync_interval=4, **shape), without=without).start().ready()
    deployment.world.run_for(0.5)
    return deployment


def waves(deployment: Deployment) -> set[int]:
    return {rank.machine.wave for rank in deployment.ranks.values()}


def running(deployment: Deployment) -> list[int]:
    return [number for number, rank in deployment.ranks.items() if rank.machine.running]


def run_a_wave(deployment: Deployment) -> None:
    deployment.frontends[0].submit()
    deployment.finish(limit_s=5.0)
    deployment.world.run_until(lambda: not running(deployment))
    deployment.world.run_for(0.2)


def test_a_cold_start_at_wave_0_wakes_headless_ranks(without: frozenset[str]) -> None:
    """vllm #51983, #54762: the first request carries wave 0 and the ranks are at wave 0, so nobody was told to
    wake the ranks of the nodes that have no front-end; the first request hung. Here even the front-end's notice
    is lost."""
    deployment = deploy(without, ranks=8)
    frontend = deployment.frontends[0]
    frontend.to_coordinator.lose(WakeNotice)
    request = frontend.submit(max_tokens=6, rank=0)
    deployment.finish(limit_s=1.0)
    assert frontend.answers[request].tokens == 6
    assert all(deployment.ranks[number].dummy_steps for number in range(1, 8))
    check_quiescence(deployment)
    assert waves(deployment) == {1}


def test_the_wake_lost_to_one_rank(without: frozenset[str]) -> None:
    """vllm #51476: the wake is a broadcast, and once sent, the ranks were called running. A rank whose connection
    was not up yet never heard it, and all others waited for it in their first collective."""
    deployment = deploy(without, ranks=4)
    deployment.ranks[3].broadcasts.lose(StartDPWave)
    deployment.frontends[0].submit(rank=1)
    took = deployment.finish(limit_s=5.0)
    assert took < 0.2
    check_quiescence(deployment)


def test_a_stale_wave_sender_is_not_left_out_of_its_own_wake(without: frozenset[str]) -> None:
    """A front-end that has missed a wave's end tells the coordinator of a request it sends, with the old number.
    The wake left out the rank named there, although it had paused; the request never reached it, and the others
    waited for ever."""
    deployment = deploy(without, ranks=3, frontends=2)
    stale = deployment.frontends[1]
    run_a_wave(deployment)
    stale.broadcasts.hold()
    run_a_wave(deployment)
    assert (stale.machine.wave, stale.machine.running) < (2, False)
    stale.to_ranks[1].close()
    stale.submit(rank=1)
    deployment.world.run_for(0.3)
    deployment.crash_frontend(1)
    deployment.start_frontend(1)
    deployment.ready()
    check_quiescence(deployment)
    assert waves(deployment) == {3}


def test_an_elastic_rank_that_joins_at_wave_0(without: frozenset[str]) -> None:
    """A rank that was added or started again began at wave 0 while the others were further, ignored the wakes it
    should have followed or followed those that it should not, and its collectives did not match."""
    deployment = deploy(without, ranks=3)
    for _ in range(3):
        run_a_wave(deployment)
    deployment.crash_rank(2)
    joiner = deployment.start_rank(2).machine
    deployment.world.run_until(lambda: joiner.statistics()["phase"] == "ready")
    assert joiner.wave == 3
    deployment.world.run_for(0.3)
    request = deployment.frontends[0].submit(rank=2)
    deployment.finish()
    assert deployment.frontends[0].answers[request].finish_reason == "length"
    check_quiescence(deployment)
    assert waves(deployment) == {4}


def test_two_ranks_report_a_start_at_once(without: frozenset[str]) -> None:
    """Two paused ranks each take a request in the same moment and each says that it started. The wake for the
    first must not leave the second without one, nor make two waves of it."""
    deployment = deploy(without, ranks=4, frontends=2)
    deployment.frontends[0].submit(rank=1)
    deployment.frontends[1].submit(rank=2)
    deployment.finish(limit_s=0.5)
    check_quiescence(deployment)
    assert waves(deployment) == {1}
    assert deployment.coordinator is not None
    assert deployment.coordinator.sent["StartDPWave"] == 1


def test_rank_0_dead_at_the_end_of_a_wave(without: frozenset[str]) -> None:
    """vllm #30112: rank 0 alone told of a wave's end. Where it died just then, everybody believed that the ranks
    ran, no wake was ever sent again, and all requests hung. Here its word is lost with it."""
    deployment = deploy(without, ranks=3)
    frontend = deployment.frontends[0]
    frontend.submit(rank=1)
    deployment.ranks[0].to_coordinator.lose(WaveComplete)
    deployment.world.run_until(lambda: deployment.ranks[0].machine.running)
    deployment.world.run_until(lambda: not running(deployment))
    deployment.ranks[0].to_coordinator.cut()
    deployment.crash_rank(0)
    deployment.world.run_for(0.02)
    assert (frontend.machine.wave, frontend.machine.running) == (1, False)
    deployment.start_rank(0)
    deployment.world.run_until(lambda: deployment.ranks[0].machine.epoch > 0)
    deployment.world.run_for(0.2)
    request = frontend.submit(rank=0)
    deployment.finish(limit_s=1.0)
    assert frontend.answers[request].finish_reason == "length"
    check_quiescence(deployment)
    assert waves(deployment) == {2}


def test_a_step_number_that_goes_back_after_a_wave(without: frozenset[str]) -> None:
    """vllm #52936: all ranks' steps were held against one step, and a rank that counted from 0 again was warned
    about and its loads dropped. Order is a matter of one life of one rank: of a new life every report counts."""
    deployment = deploy(without, ranks=2, lockstep=False)
    frontend = deployment.frontends[0]
    frontend.submit(rank=0, max_tokens=50)
    deployment.finish()
    assert deployment.ranks[0].machine.step >= 50
    deployment.crash_rank(0)
    deployment.start_rank(0)
    deployment.world.run_for(1.0)
    for _ in range(3):
        frontend.submit(rank=0, max_tokens=8)
    deployment.world.run_for(0.02)
    assert deployment.ranks[0].machine.step < 50
    deployment.world.run_for(0.15)
    assert frontend.machine.believed(0).finished == 3
    check_quiescence(deployment)


def test_steady_input_never_keeps_the_publisher_from_its_deadline(without: frozenset[str]) -> None:
    """The reference publishes loads when a poll finds nothing to read: under steady input front-ends route for
    seconds by a view from before. Here a view is never later than the interval."""
    deployment = deploy(without, ranks=4, frontends=2, lockstep=False)
    world, published = deployment.world, []
    assert deployment.coordinator is not None
    real = deployment.checks.broadcast
    deployment.checks.broadcast = lambda process, message: (  # type: ignore[method-assign]
        published.append(world.now) if isinstance(message, LoadView) else None, real(process, message))[1]  # fmt: skip
    begin = world.now
    for place in range(3000):
        world.at(begin + place / 1000, lambda place=place: deployment.frontends[place % 2].submit(max_tokens=1))  # type: ignore[misc]
    world.run_for(3.0)
    gaps = [after - before for before, after in zip([begin, *published], [*published, world.now], strict=True)]
    assert 25 < len(gaps) < 40
    assert max(gaps) < 0.1 + 0.001
    deployment.finish()


# Each can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "rule"),
    [
        (test_a_cold_start_at_wave_0_wakes_headless_ranks, "own-report"),
        (test_the_wake_lost_to_one_rank, "acknowledged-wakes"),
        (test_a_stale_wave_sender_is_not_left_out_of_its_own_wake, "stale-notice-leaves-nobody-out"),
        (test_an_elastic_rank_that_joins_at_wave_0, "joiner-told-the-wave"),
    ],
)
def test_without_its_rule_it_fails(scenario: Callable[[frozenset[str]], None], rule: str) -> None:
    with pytest.raises((Violation, AssertionError)):
        scenario(frozenset({rule}))


def only_rank_0_tells_of_the_end(patch: pytest.MonkeyPatch) -> None:
    real = Coordinator._on_rank

    def on_rank(self: Coordinator, message: Any, now: float, effects: Any) -> None:
        if isinstance(message, WaveComplete) and message.rank:
            return
        if not getattr(message, "running", True):
            return
        real(self, message, now, effects)

    patch.setattr(Coordinator, "_on_rank", on_rank)


def one_step_for_all(patch: pytest.MonkeyPatch) -> None:
    from paceline.core.coordinator.load_table import LoadTable

    real, highest = LoadTable.report, [0]

    def report(self: LoadTable, report: Any) -> bool:
        highest[0] = max(highest[0], report.step)
        return report.step >= highest[0] and real(self, report)

    patch.setattr(LoadTable, "report", report)


def published_when_quiet(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PublishClock, "changed", lambda self, now: setattr(self, "_changed_at", now + 0.005))


def a_wake_for_each_start(patch: pytest.MonkeyPatch) -> None:
    from paceline.core.coordinator.wave import GroupWave

    real = GroupWave.started

    def started(self: GroupWave, rank: int, wave: int, now: float) -> None:
        real(self, rank, wave, now)
        self._retry.start(now)

    patch.setattr(GroupWave, "started", started)


@pytest.mark.parametrize(
    ("scenario", "breakage"),
    [
        (test_rank_0_dead_at_the_end_of_a_wave, only_rank_0_tells_of_the_end),
        (test_a_step_number_that_goes_back_after_a_wave, one_step_for_all),
        (test_steady_input_never_keeps_the_publisher_from_its_deadline, published_when_quiet),
        (test_two_ranks_report_a_start_at_once, a_wake_for_each_start),
    ],
)
def test_broken_as_the_reference_it_fails(scenario: Any, breakage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    with pytest.raises((Violation, AssertionError)):
        scenario(frozenset())
