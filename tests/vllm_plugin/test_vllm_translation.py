"""What vLLM's ranks and front-ends say, as the coordinator's machine takes it, and what they hear."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from paceline.vllm import translation
from paceline.vllm.codec import Notice, RankMessage, RankStats, VllmDialect, read_frontend, read_rank
from paceline.vllm.translation import Answers, Memory, RankSubscribed, View, Wake
from tests.pace import examples
from tests.vllm_plugin import vllm_frames as frames
from tests.vllm_plugin.vllm_deployment import VllmDeployment, greetings, last_view, urgent_notes, views, wakes


# Greetings ----------------------------------------------------------------------------------------
def test_ranks_are_greeted_once_all_listen() -> None:
    deployment = VllmDeployment(3, listening=False)
    assert greetings(deployment.happen(translation.RankSubscribed())) == 0
    assert greetings(deployment.happen(translation.RankSubscribed())) == 0
    assert greetings(deployment.happen(translation.RankSubscribed())) == 1
    assert deployment.memory.greeted


@pytest.mark.parametrize(("greeting", "again"), [("each", 1), ("once", 0), ("none", 0)])
def test_a_later_listener_is_greeted_where_the_others_bear_it(greeting: str, again: int) -> None:
    deployment = VllmDeployment(dialect=VllmDialect(greeting=greeting))  # type: ignore[arg-type]
    assert greetings(deployment.sent) == (greeting != "none")
    assert greetings(deployment.happen(translation.RankSubscribed())) == again


def test_no_wake_before_the_greeting() -> None:
    # A rank takes the first thing that it hears for its greeting.
    deployment = VllmDeployment(listening=False)
    deployment.happen(translation.RankSubscribed())
    assert not wakes(deployment.notice(0, 0) + deployment.wait(0.2))
    effects = deployment.happen(translation.RankSubscribed()) + deployment.wait(1.0)
    assert greetings(effects) == 1
    assert wakes(effects)


# Waves --------------------------------------------------------------------------------------------
def test_a_notice_wakes_and_passes_on_whom_it_leaves_out() -> None:
    deployment = VllmDeployment()
    assert wakes(deployment.notice(1, 0)) == [translation.Wake(0, b"\x01\x00")]


def test_a_waves_first_wake_is_known_at_once() -> None:
    deployment = VllmDeployment()
    notice = Notice(b"\x01\x00", 1, 0)
    assert deployment.translation.wake_at_once(notice) == translation.Wake(0, b"\x01\x00")
    deployment.notice(1, 0)
    assert deployment.translation.wake_at_once(notice) is None, "it has been sent"
    deployment.start(0, 0)
    assert deployment.translation.wake_at_once(notice) is None, "they run"
    deployment.complete(0)
    assert deployment.translation.wake_at_once(notice) == translation.Wake(1, None)


def test_reports_of_running_ranks_may_wait() -> None:
    deployment = VllmDeployment(3)
    assert deployment.translation.ranks_may_wait_until(deployment.now) == deployment.now, "one may start a wave"
    deployment.report(1, running=1, step=1)
    assert deployment.translation.ranks_may_wait_until(deployment.now) > deployment.now
    deployment.complete(0)
    assert deployment.translation.ranks_may_wait_until(deployment.now) == deployment.now


def test_reports_of_independent_ranks_may_wait_for_the_interval() -> None:
    deployment = VllmDeployment(lockstep=False, interval_s=0.01)
    deployment.report(0, running=1)
    published = deployment.now
    deployment.now += 0.004
    assert deployment.translation.ranks_may_wait_until(deployment.now) == published + 0.01
    deployment.now += 1.0
    assert deployment.translation.ranks_may_wait_until(deployment.now) < deployment.now


def test_reports_that_come_together_are_one_view() -> None:
    for lockstep in (False, True):
        deployment = VllmDeployment(3, lockstep=lockstep)
        for rank in range(3):
            deployment.report(rank)
        deployment.wait(1.0)
        stats = [RankStats(rank, 1, 1) for rank in range(3)]
        together = [RankMessage(rank, scheduler_stats=each) for rank, each in enumerate(stats)]
        effects = deployment.happen(translation.RanksReported(together))
        assert views(effects)[-1].counts == [[0, 1, 0.0], [1, 1, 0.0], [2, 1, 0.0]]


def test_a_stale_notice_leaves_nobody_out() -> None:
    deployment = VllmDeployment()
    deployment.start(0, 0)
    deployment.complete(0)
    assert wakes(deployment.notice(1, 0)) == [translation.Wake(1, None)]


def test_a_notice_without_a_rank_leaves_nobody_out() -> None:
    deployment = VllmDeployment()
    assert wakes(deployment.happen(translation.FrontendSaid(Notice(None, None, 0)))) == [translation.Wake(0, None)]


def test_a_rank_that_starts_wakes_the_others() -> None:
    deployment = VllmDeployment(3)
    effects = deployment.start(2, 0)
    assert wakes(effects) == [translation.Wake(0, 2)]
    assert (views(effects)[-1].wave, views(effects)[-1].running) == (0, True)


def test_the_end_of_a_wave_is_said_for_all() -> None:
    deployment = VllmDeployment(3)
    deployment.start(0, 0)
    effects = deployment.complete(0)
    assert (last_view(deployment).wave, last_view(deployment).running) == (1, False)
    assert translation.Remember(translation.Memory(3, 1, False, True)) in effects
    assert not wakes(deployment.wait(5.0)), "nobody is owed a wake"


def test_the_end_of_a_wave_leaves_who_began_the_next() -> None:
    deployment = VllmDeployment(3)
    deployment.report(1, running=1, wave=0, step=4)
    # Rank 1 has finished wave 0 and got a request before rank 0's word of the end arrives.
    deployment.report(1, running=1, wave=1)
    deployment.complete(0)
    assert (last_view(deployment).wave, last_view(deployment).running) == (1, True)
    assert {wake.wave for wake in wakes(deployment.wait(2.0))} == {1}


def test_an_end_said_twice_is_one() -> None:
    deployment = VllmDeployment()
    deployment.start(0, 0)
    deployment.complete(0)
    deployment.complete(0)
    assert (last_view(deployment).wave, last_view(deployment).running) == (1, False)


def test_a_wake_is_repeated_until_there_is_a_sign_of_all() -> None:
    deployment = VllmDeployment(3)
    deployment.notice(1, 0)
    repeated = wakes(deployment.wait(1.0))
    assert len(repeated) >= 3
    assert set(repeated) == {translation.Wake(0, None)}
    # A step after the first all-reduce: all three run.
    deployment.report(1, running=1, step=1)
    assert not wakes(deployment.wait(5.0))


def test_an_older_versions_proof_is_a_later_step() -> None:
    deployment = VllmDeployment(3, dialect=VllmDialect(proof_step=32))
    deployment.report(1, running=1, step=31)
    assert wakes(deployment.wait(1.0))
    deployment.report(1, running=2, step=32)
    assert not wakes(deployment.wait(5.0))


def test_cold_start_of_headless_ranks_heals() -> None:
    # vllm #51983, #54762: a request of wave 0 in wave 0, and no notice: only the load report says so.
    deployment = VllmDeployment(4)
    effects = deployment.report(3, waiting=1)
    assert wakes(effects) == [translation.Wake(0, None)]
    assert last_view(deployment).running


def test_a_rank_without_requests_at_step_0_says_nothing_new() -> None:
    deployment = VllmDeployment()
    assert not wakes(deployment.report(1, wave=0))
    assert not last_view(deployment).running
    deployment.start(0, 0)
    deployment.report(0, wave=0)
    assert last_view(deployment).running


def test_independent_ranks_have_no_waves() -> None:
    deployment = VllmDeployment(lockstep=False)
    effects = deployment.notice(0, 0) + deployment.start(0, 0) + deployment.report(1, running=2)
    assert not wakes(effects + deployment.wait(2.0))
    assert all((view.wave, view.running) == (0, False) for view in views(deployment.sent))
    assert last_view(deployment).counts == [[0, 0, 0.0], [0, 2, 0.0]]


# Loads --------------------------------------------------------------------------------------------
def test_counts_stand_in_order_of_the_ranks() -> None:
    deployment = VllmDeployment(3)
    deployment.report(2, waiting=3, running=16, kv=0.25)
    deployment.wait(0.1)
    assert last_view(deployment).counts == [[0, 0, 0.0], [0, 0, 0.0], [3, 16, 0.25]]


def test_two_fields_where_the_version_has_two() -> None:
    deployment = VllmDeployment(dialect=VllmDialect(count_fields=2))
    deployment.report(0, waiting=3, running=16, kv=0.25)
    deployment.wait(0.1)
    assert last_view(deployment).counts == [[3, 16], [0, 0]]


def test_no_counts_in_external_mode() -> None:
    deployment = VllmDeployment(publish_loads=False)
    deployment.start(0, 0)
    assert views(deployment.sent)
    assert all(view.counts is None for view in views(deployment.sent))


def test_a_ranks_steps_are_in_order_within_its_waves() -> None:
    deployment = VllmDeployment()
    deployment.report(0, running=5, wave=1, step=30)
    deployment.report(0, running=6, wave=2, step=0)
    deployment.report(0, running=7, wave=1, step=31)
    deployment.wait(0.1)
    assert last_view(deployment).counts == [[0, 6, 0.0], [0, 0, 0.0]]


def test_a_frontend_that_comes_is_told_at_once() -> None:
    deployment = VllmDeployment()
    deployment.report(0, running=5)
    deployment.wait(1.0)
    assert views(deployment.frontend())[-1].counts == [[0, 5, 0.0], [0, 0, 0.0]]


# As recorded --------------------------------------------------------------------------------------
def test_a_recorded_wave() -> None:
    deployment = VllmDeployment()
    assert wakes(deployment.happen(translation.FrontendSaid(read_frontend(frames.NOTICE_OF_RANK_1)))) == [
        translation.Wake(0, b"\x01\x00")
    ]
    for frame in (frames.RANK_1_WAITS, frames.RANK_1_RUNS, frames.RANK_0_STARTS):
        deployment.happen(translation.RankSaid(read_rank(frame)))
    deployment.wait(0.02)
    assert last_view(deployment) == translation.View([[0, 0, 0.0], [0, 1, pytest.approx(3.05e-5, rel=0.01)]], 0, True)
    for frame in (frames.RANK_1_IS_DONE, frames.RANK_0_COMPLETES):
        deployment.happen(translation.RankSaid(read_rank(frame)))
    deployment.wait(0.02)
    assert last_view(deployment) == translation.View([[0, 0, 0.0], [0, 0, 0.0]], 1, False)
    assert not wakes(deployment.wait(5.0))


# Whatever they say --------------------------------------------------------------------------------

ranks = st.integers(0, 4)
waves = st.integers(0, 5)
words = st.one_of(
    st.tuples(st.just("report"), ranks, st.integers(0, 3), st.integers(0, 3), waves, st.integers(0, 40)),
    st.tuples(st.just("start"), ranks, waves), st.tuples(st.just("complete"), waves),
    st.tuples(st.just("notice"), ranks, waves), st.tuples(st.just("scale"), st.integers(1, 5)),
    st.tuples(st.just("wait"), st.floats(0, 2)), st.tuples(st.just("restart")),
)  # fmt: skip


@settings(max_examples=examples(200))
@given(st.lists(words, max_size=40), st.booleans())
def test_whatever_is_said_the_wave_never_goes_back(said: list[tuple[object, ...]], lockstep: bool) -> None:
    deployment = VllmDeployment(3, lockstep=lockstep)
    wave = 0
    for word, *arguments in said:
        match word, arguments:
            case "report", [rank, waiting, running, at, step]:
                stats = RankStats(waiting, running, step, at)
                deployment.happen(translation.RankSaid(RankMessage(rank, scheduler_stats=stats)))  # type: ignore[arg-type]
            case "restart", _:
                deployment.restart()
                deployment.all_subscribe()
            case _:
                getattr(deployment, str(word))(*arguments)
        for effect in deployment.sent:
            if isinstance(effect, translation.View | translation.Wake):
                assert effect.wave >= wave
                wave = effect.wave
                assert isinstance(effect, translation.Wake) or effect.counts is None or len(effect.counts) <= 5
        deployment.sent.clear()
    deployment.frontend()
    counts = last_view(deployment).counts
    assert counts is None or len(counts) == deployment.memory.size


def test_absurd_waves_are_nobodys_and_what_follows_the_largest_is_heard() -> None:
    deployment = VllmDeployment(2)
    deployment.start(1, 2**53 - 1)
    deployment.complete(2**53 - 1)
    deployment.report(1, 1, wave=2**53 - 1, step=4)
    assert deployment.memory.wave == 0
    # Of what can just be, the next one can be said too.
    deployment.complete(2**48 - 1)
    deployment.wait(1.0)
    deployment.complete(2**48)
    deployment.wait(1.0)
    assert deployment.memory.wave == 2**48 + 1


class Ranks:
    """Which ranks have given no sign, whatever the wave."""

    def __init__(self, *silent: int) -> None:
        self.silent = list(silent)

    def __call__(self, wave: int) -> list[int]:
        return self.silent


def test_who_does_not_answer_in_time_is_named_once() -> None:
    answers = Answers(10.0, Ranks(0, 2))
    answers.woken(3, 5.0)
    assert answers.deadline == 15.0
    assert not answers.settle(14.9)
    assert answers.settle(15.0)
    assert answers.stalled == [0, 2]
    assert not answers.settle(99.0)
    assert answers.deadline == float("inf")
    answers.all_came(3)
    assert answers.settle(100.0)
    assert not answers.stalled


def test_signs_of_all_are_an_answer() -> None:
    ranks = Ranks(0, 2)
    answers = Answers(10.0, ranks)
    answers.woken(3, 5.0)
    ranks.silent = []
    assert not answers.settle(15.0)
    assert answers.deadline == float("inf")


def test_a_repeat_does_not_begin_anew() -> None:
    answers = Answers(10.0, Ranks(1))
    answers.woken(3, 5.0)
    answers.woken(3, 12.0)
    assert answers.settle(15.0)


def test_a_later_wave_does() -> None:
    answers = Answers(10.0, Ranks(0, 1))
    answers.woken(3, 5.0)
    answers.woken(4, 12.0)
    answers.all_came(3)
    assert answers.awaited() == [0, 1], "that was of an older wave"
    assert not answers.settle(15.0)
    assert answers.settle(22.0)


def test_who_has_come_is_not_waited_for_again_in_the_same_wave() -> None:
    answers = Answers(10.0, Ranks(1))
    answers.woken(3, 5.0)
    answers.all_came(3)
    assert not answers.settle(6.0)
    answers.woken(3, 7.0)
    assert not answers.awaited()
    assert answers.deadline == float("inf")


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
