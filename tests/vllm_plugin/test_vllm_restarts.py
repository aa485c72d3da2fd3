"""What a coordinator under vLLM knows after scaling and after a restart, and whom it names."""

from __future__ import annotations

import pytest

from paceline.vllm.codec import VllmDialect
from paceline.vllm.translation import Memory, RankSubscribed, View, Wake
from tests.vllm_plugin.vllm_deployment import VllmDeployment, greetings, last_view, urgent_notes, views, wakes

# Scaling ------------------------------------------------------------------------------------------


def test_scaling_keeps_the_wave_and_the_loads() -> None:
    deployment = VllmDeployment()
    deployment.start(0, 0)
    deployment.complete(0)
    deployment.report(1, running=2, wave=1, step=3)
    deployment.scale(4)
    view = last_view(deployment)
    assert (view.counts, view.wave, view.running) == ([[0, 0, 0.0], [0, 2, 0.0], [0, 0, 0.0], [0, 0, 0.0]], 1, True)
    assert deployment.memory == Memory(4, 1, True, True)
    assert {wake.wave for wake in wakes(deployment.wait(0.2))} == {1}, "the new ranks are woken"
    deployment.scale(1)
    assert last_view(deployment).counts == [[0, 0, 0.0]]


def test_a_rank_beyond_the_size_is_void() -> None:
    deployment = VllmDeployment()
    deployment.report(2, running=5)
    assert deployment.translation.statistics()["void_messages"] == 1


# Restarts -----------------------------------------------------------------------------------------


def test_a_new_coordinator_knows_the_wave_and_tells_no_empty_loads() -> None:
    deployment = VllmDeployment()
    deployment.report(0, running=5, wave=0, step=1)
    deployment.complete(0)
    deployment.restart()
    deployment.frontend()
    assert views(deployment.sent)[-1] == View(None, 1, False)
    deployment.report(0, running=5, wave=1, step=1)
    assert last_view(deployment).counts is None, "rank 1 has not reported"
    deployment.wait(5.0)
    assert last_view(deployment).counts == [[0, 5, 0.0], [0, 0, 0.0]], "it may have nothing to report"


def test_a_new_coordinator_tells_loads_once_all_have_reported() -> None:
    deployment = VllmDeployment(memory=Memory(2, 3, False, True))
    deployment.report(0, running=5, wave=3, step=1)
    deployment.report(1, running=6, wave=3, step=1)
    deployment.wait(0.1)
    assert last_view(deployment).counts == [[0, 5, 0.0], [0, 6, 0.0]]


def test_ranks_are_woken_once_when_they_listen_again() -> None:
    deployment = VllmDeployment(memory=Memory(2, 3, False, True), listening=False)
    assert not wakes(deployment.wait(1.0))
    deployment.all_subscribe()
    assert wakes(deployment.sent) == [Wake(3, None)]
    deployment.start(0, 3)
    deployment.complete(3)
    assert not wakes(deployment.wait(5.0))
    assert last_view(deployment).wave == 4


@pytest.mark.parametrize(("running", "woken"), [(True, True), (False, False)])
def test_where_a_wake_is_not_safe_only_a_wave_that_ran_is_woken(running: bool, woken: bool) -> None:
    dialect = VllmDialect(wake_is_safe=False)
    deployment = VllmDeployment(memory=Memory(2, 3, running, True), dialect=dialect)
    assert bool(wakes(deployment.sent + deployment.wait(1.0))) == woken


def test_a_notice_lost_with_a_coordinator_heals() -> None:
    deployment = VllmDeployment(4)
    deployment.restart()
    deployment.all_subscribe()
    deployment.start(0, 0)
    deployment.complete(0)
    # The front-end's notice was lost; rank 2's report of its request came through.
    assert wakes(deployment.report(2, waiting=1, wave=1)) == [Wake(1, None)]


def test_restarted_before_the_greeting() -> None:
    deployment = VllmDeployment(listening=False)
    deployment.happen(RankSubscribed())
    deployment.restart()
    deployment.all_subscribe()
    assert greetings(deployment.sent) == 1


# Watching -----------------------------------------------------------------------------------------


def test_a_rank_that_does_not_come_is_named() -> None:
    deployment = VllmDeployment(3)
    deployment.report(1, waiting=1)
    assert not urgent_notes(deployment.wait(29.0))
    assert urgent_notes(deployment.wait(2.0)) == [
        "rank 0 was woken for wave 0 and has given no sign of it",
        "rank 2 was woken for wave 0 and has given no sign of it",
    ]
    assert deployment.translation.statistics()["stalls"]
    assert not urgent_notes(deployment.wait(60.0)), "once"
    deployment.report(1, running=1, step=1)
    assert urgent_notes(deployment.sent)[-1] == "no rank is waited for any more"
    assert not deployment.translation.statistics()["stalls"]


def test_a_long_quiet_wave_is_no_stall() -> None:
    deployment = VllmDeployment(3)
    deployment.notice(1, 0)
    deployment.report(1, running=1)
    deployment.start(0, 0)
    assert not urgent_notes(deployment.wait(600.0))


def test_where_silence_means_nothing_nobody_is_named() -> None:
    deployment = VllmDeployment(3, dialect=VllmDialect(says_started=False, proof_step=32))
    deployment.report(1, waiting=1)
    assert not urgent_notes(deployment.wait(600.0))
