"""What users of the reference saw when they suspended a deployment, as trainers do before each update of the weights.

As in `test_scenarios.py`, each takes the rules that are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paceline.core.coordinator.pause import Pause
from paceline.core.messages import StartDPWave
from paceline.sim.deployment import Deployment
from paceline.sim.processes import Call, FrontendProcess
from paceline.sim.run import check_quiescence
from paceline.sim.world import Violation
from tests.sim.test_scenarios import deploy, run_a_wave, running, waves


def control(deployment: Deployment, frontend: FrontendProcess, action: Any, limit_s: float = 2.0) -> Call:
    call = frontend.calls[frontend.control(action)]
    deployment.world.run_until(lambda: call.over, limit_s, f"that {action} is answered")
    return call


def steps(deployment: Deployment) -> list[int]:
    return [rank.machine.step for rank in deployment.ranks.values()]


def test_a_late_wake_after_a_pause(without: frozenset[str]) -> None:
    """vllm #36594: a wake that was under way when the ranks were paused reached one of them afterwards; it began
    to step alone and blocked in a collective for 600 s, until the process group was given up."""
    deployment = deploy(without, ranks=4)
    run_a_wave(deployment)
    assert control(deployment, deployment.frontends[0], "keep").number == 1
    before = steps(deployment)
    deployment.ranks[2].hear(StartDPWave(0, None))
    deployment.world.run_for(5.0)
    assert steps(deployment) == before
    assert not running(deployment)
    control(deployment, deployment.frontends[0], "resume")
    run_a_wave(deployment)
    check_quiescence(deployment)


def test_a_pause_that_reaches_one_of_32_idle_ranks_late(without: frozenset[str]) -> None:
    """A trainer suspends by a call to each rank. The ranks that knew stepped on in search of an agreement with
    the one that did not, which was idle and never came. Here idle ranks do not step at all, and the call waits
    for the last one."""
    deployment = deploy(without, ranks=32)
    frontend, late = deployment.frontends[0], deployment.ranks[31]
    late.broadcasts.hold()
    call = frontend.calls[frontend.control("keep")]
    deployment.world.run_for(0.7)
    assert not call.over
    assert frontend.machine.suspension.waiting_for == [31]
    late.broadcasts.release()
    deployment.world.run_until(lambda: call.over, 0.1)
    assert steps(deployment) == [0] * 32
    frontend.submit()
    deployment.world.run_for(1.0)
    assert steps(deployment) == [0] * 32
    control(deployment, frontend, "resume")
    deployment.finish(limit_s=1.0)
    check_quiescence(deployment)
    assert waves(deployment) == {1}


@pytest.mark.slow
def test_a_pause_that_reaches_one_of_32_ranks_late_in_mid_wave(without: frozenset[str]) -> None:
    """The same while all run: the rank that has not heard stops with the others, at the same step, since what
    they know travels with their agreement."""
    deployment = deploy(without, ranks=32)
    frontend, late = deployment.frontends[0], deployment.ranks[31]
    for number in range(32):
        frontend.submit(rank=number, max_tokens=200)
    deployment.world.run_for(0.2)
    assert len(running(deployment)) == 32
    late.broadcasts.hold()
    control(deployment, frontend, "keep", limit_s=0.2)
    assert not running(deployment)
    assert len(set(steps(deployment))) == 1
    before = steps(deployment)
    deployment.world.run_for(1.0)
    late.broadcasts.release()
    deployment.world.run_for(1.0)
    assert steps(deployment) == before
    control(deployment, frontend, "resume")
    deployment.finish()
    assert all(answer.tokens == 200 for answer in frontend.answers.values())
    check_quiescence(deployment)
    assert waves(deployment) == {2}


def test_two_resumes_around_a_new_wave(without: frozenset[str]) -> None:
    """vllm #55229: two parts of a trainer each resume. The first resume starts a wave with the requests that had
    waited; the second found the ranks running, started a wave of its own at some of them, and all blocked for
    ever."""
    deployment = deploy(without, ranks=4, frontends=2)
    one, other = deployment.frontends.values()
    control(deployment, one, "keep")
    for number in range(4):
        one.submit(rank=number, max_tokens=30)
    deployment.world.run_for(0.5)
    first = one.calls[one.control("resume")]
    deployment.world.run_until(lambda: len(running(deployment)) == 4)
    second = control(deployment, other, "resume")
    assert len(running(deployment)) == 4
    deployment.finish()
    assert first.over
    assert (first.number, second.number) == (2, 2)
    assert {rank.machine.pause.number for rank in deployment.ranks.values()} == {2}
    check_quiescence(deployment)
    assert waves(deployment) == {1}


def test_a_pause_right_after_a_resume_does_not_count_words_from_before(without: frozenset[str]) -> None:
    """A trainer resumes and, for the next update, suspends at once. A rank to which the resumption comes late has
    last said that it is held, but of the suspension before: it is about to step when the call returns."""
    deployment = deploy(without, ranks=4)
    frontend, late = deployment.frontends[0], deployment.ranks[3]
    control(deployment, frontend, "keep")
    frontend.submit(rank=3, max_tokens=20)
    frontend.control("resume")
    deployment.world.run_until(lambda: late.machine.pause.number == 2)
    late.broadcasts.hold()
    deployment.world.run_until(lambda: all(rank.machine.pause.released for rank in list(deployment.ranks.values())[:3]))
    call = frontend.calls[frontend.control("keep")]
    deployment.world.run_for(0.4)
    assert not call.over
    late.broadcasts.release()
    deployment.world.run_until(lambda: call.over, 2.0)
    assert not running(deployment)
    before = steps(deployment)
    deployment.world.run_for(2.0)
    assert steps(deployment) == before
    control(deployment, frontend, "resume")
    deployment.finish()
    check_quiescence(deployment)


# Each can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "rule"),
    [
        (test_a_late_wake_after_a_pause, "finished-waves-ignored"),
        (test_a_pause_right_after_a_resume_does_not_count_words_from_before, "suspension-number"),
    ],
)
def test_without_its_rule_it_fails(scenario: Callable[[frozenset[str]], None], rule: str) -> None:
    with pytest.raises((Violation, AssertionError)):
        scenario(frozenset({rule}))


def settled_when_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pause, "_lacks", lambda self, rank: False)


def each_resume_counts(patch: pytest.MonkeyPatch) -> None:
    real = Pause.ask

    def ask(self: Pause, action: Any, now: float) -> int:
        if action == "resume" and not self.pause.paused:
            self._begin(self.pause.number + 2, "keep", now)
        return real(self, action, now)

    patch.setattr(Pause, "ask", ask)


def agreements_without_the_suspension(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("paceline.core.rank.machine.stops", lambda suspension: False)


@pytest.mark.parametrize(
    ("scenario", "breakage"),
    [
        (test_a_pause_that_reaches_one_of_32_idle_ranks_late, settled_when_told),
        (test_a_pause_that_reaches_one_of_32_ranks_late_in_mid_wave, agreements_without_the_suspension),
        (test_two_resumes_around_a_new_wave, each_resume_counts),
    ],
)
def test_broken_it_fails(scenario: Any, breakage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    with pytest.raises((Violation, AssertionError)):
        scenario(frozenset())
