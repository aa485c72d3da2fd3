"""The coordinator's part in waves, rule by rule (section 4 of the design): who is owed a wake, and when it goes out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.coordinator.wave import GroupWave
from paceline.core.messages import StartDPWave
from paceline.core.retry import FIRST_S, LONGEST_S
from tests.pace import examples


def paused(ranks: int = 3, wave: int = 0) -> GroupWave:
    """A group of paused ranks, all of which have said so."""
    group = GroupWave()
    for rank in range(ranks):
        group.observe(rank, wave, False, 0.0)
    return group


def answer(group: GroupWave, wave: int, *ranks: int, now: float = 1.0) -> None:
    for rank in ranks:
        group.observe(rank, wave, True, now)


def test_paused_ranks_are_owed_nothing() -> None:
    group = paused(wave=3)
    assert (group.wave, group.running, group.lagging(), group.wake_due) == (3, False, [], None)
    assert group.wake(100.0) is None


@pytest.mark.parametrize("wave", [0, 7])
def test_a_rank_that_starts_wakes_the_others_and_is_left_out_once(wave: int) -> None:
    group = paused(wave=wave)
    group.started(1, wave, 1.0)
    assert group.running
    assert group.lagging() == [0, 2]
    assert group.wake(1.0) == StartDPWave(wave, exclude=1)
    # A repeat leaves nobody out.
    assert group.wake(1.0 + FIRST_S) == StartDPWave(wave, exclude=None)


def test_a_wake_is_repeated_ever_more_slowly_until_all_have_answered() -> None:
    group = paused()
    group.started(0, 0, 1.0)
    sent, now = [], 1.0
    while len(sent) < 9:
        assert group.wake_due is not None
        assert group.wake(group.wake_due - 0.001) is None
        now = group.wake_due
        assert group.wake(now) is not None
        sent.append(now)
    gaps = [round(after - before, 6) for before, after in itertools.pairwise(sent)]
    assert gaps == [0.05, 0.1, 0.2, 0.4, 0.8, LONGEST_S, LONGEST_S, LONGEST_S]
    answer(group, 0, 1, now=now)
    assert group.lagging() == [2]
    assert group.wake_due is not None
    answer(group, 0, 2, now=now)
    assert (group.lagging(), group.wake_due) == ([], None)
    assert group.wake(now + 10) is None


def test_the_next_wave_is_repeated_quickly_again() -> None:
    group = paused(2)
    group.started(0, 0, 1.0)
    for now in (1.0, 1.1, 1.3):
        assert group.wake(now) is not None
    answer(group, 0, 1)
    for rank in (0, 1):
        group.observe(rank, 1, False, 2.0)
    group.started(0, 1, 3.0)
    assert group.wake(3.0) == StartDPWave(1, 0)
    assert group.wake(3.05) == StartDPWave(1)


def test_who_is_in_a_later_wave_has_answered_too() -> None:
    group = paused(2)
    group.started(0, 0, 1.0)
    group.wake(1.0)
    # Rank 1 has run and finished wave 0 meanwhile, and says so: nobody runs in the current wave any more.
    group.observe(1, 1, False, 1.01)
    assert (group.wave, group.running) == (1, False)
    assert group.wake(1.02) is None
    group.observe(0, 1, False, 1.03)
    assert group.wake_due is None


def test_a_plain_report_that_a_rank_runs_wakes_the_others_as_well() -> None:
    group = paused()
    group.observe(2, 0, True, 1.0)
    assert group.wake(1.0) == StartDPWave(0, None)
    assert group.lagging() == [0, 1]


def test_a_fresh_notice_leaves_out_the_rank_that_has_the_request() -> None:
    group = paused(wave=4)
    group.noticed(2, 4, 1.0)
    assert not group.running
    assert group.wake(1.0) == StartDPWave(4, exclude=2)
    assert group.wake(1.05) == StartDPWave(4, exclude=None)


def test_a_stale_notice_wakes_all_and_leaves_nobody_out() -> None:
    group = paused(wave=4)
    group.noticed(2, 3, 1.0)
    assert group.wake(1.0) == StartDPWave(4, exclude=None)


def test_a_notice_while_the_ranks_run_changes_nothing() -> None:
    group = paused(2)
    answer(group, 0, 0, 1, now=1.0)
    group.noticed(0, 0, 2.0)
    assert group.wake(2.0) is None
    for rank in (0, 1):
        group.observe(rank, 1, False, 3.0)
    assert (group.wake_due, group.lagging()) == (None, [])


def test_a_notice_is_served_once_all_have_run() -> None:
    group = paused(2)
    group.noticed(0, 0, 1.0)
    group.wake(1.0)
    answer(group, 0, 0, 1)
    for rank in (0, 1):
        group.observe(rank, 1, False, 2.0)
    assert (group.wave, group.running, group.wake_due) == (1, False, None)


def test_a_notice_of_a_wave_that_no_rank_has_named_does_not_move_it() -> None:
    group = paused(2, wave=3)
    group.noticed(0, 5_000, 1.0)
    assert group.wave == 3
    assert group.wake(1.0) == StartDPWave(3, exclude=0)


def test_two_ranks_that_start_at_once_are_one_wave() -> None:
    group = paused(3)
    group.started(0, 0, 1.0)
    assert group.wake(1.0) == StartDPWave(0, 0)
    group.started(2, 0, 1.001)
    assert group.wake(1.001) is None
    assert group.lagging() == [1]


def test_a_rank_that_starts_in_a_finished_wave_has_the_others_woken_to_this_one() -> None:
    group = paused(3, wave=5)
    group.forget(2, 1.0)
    group.observe(2, 0, False, 1.0)
    group.started(2, 3, 2.0)
    assert (group.wave, group.running) == (5, False)
    assert group.wake(2.0) == StartDPWave(5, None)
    answer(group, 5, 0, 1, 2, now=2.1)
    assert group.wake_due is None


def test_a_word_of_a_past_wave_does_not_count() -> None:
    group = paused(2, wave=5)
    group.observe(0, 4, True, 1.0)
    assert (group.wave, group.running, group.wake_due) == (5, False, None)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_any_rank_may_be_the_first_to_say_that_the_wave_is_over(order: tuple[int, int, int]) -> None:
    group = paused(3)
    answer(group, 0, 0, 1, 2)
    for rank in order:
        group.observe(rank, 1, False, 2.0)
        assert (group.wave, group.running) == (1, False)
        assert group.wake(2.0) is None
    assert group.lagging() == []
    # The word of a rank that still ran then is late; it starts nothing.
    group.observe(order[2], 0, True, 2.1)
    assert not group.running


def test_a_rank_that_joins_while_the_others_run_is_woken() -> None:
    group = paused(2)
    answer(group, 0, 0, 1)
    group.observe(2, 0, False, 2.0)
    assert group.lagging() == [2]
    assert group.wake(2.0) == StartDPWave(0, None)
    answer(group, 0, 2, now=2.1)
    assert group.wake_due is None


def test_a_rank_that_joins_at_wave_0_takes_the_group_no_step_back() -> None:
    group = paused(2, wave=6)
    group.observe(2, 0, False, 1.0)
    group.observe(2, 0, False, 1.0)
    assert (group.wave, group.running, group.wake_due) == (6, False, None)
    group.started(2, 6, 2.0)
    assert group.wake(2.0) == StartDPWave(6, 2)


def test_a_rank_that_rests_a_wave_behind_is_late_until_it_knows() -> None:
    group = paused(2, wave=5)
    group.observe(2, 5, False, 0.0)
    for rank in (0, 1):
        group.observe(rank, 6, False, 1.0)
    assert group.late() == [2]
    group.observe(2, 6, False, 1.2)
    assert group.late() == []


def test_a_rank_that_rests_while_the_others_run_is_woken_and_not_late() -> None:
    group = paused(2, wave=5)
    answer(group, 5, 0, 1)
    group.observe(2, 0, False, 1.0)
    assert (group.lagging(), group.late()) == ([2], [])


def test_nothing_is_owed_to_or_by_a_rank_that_is_gone() -> None:
    group = paused(3)
    group.started(0, 0, 1.0)
    group.wake(1.0)
    answer(group, 0, 1)
    group.forget(2, 1.1)
    assert (group.lagging(), group.wake_due) == ([], None)
    group.observe(2, 0, False, 1.2)
    assert group.lagging() == [2]
    group.forget(2, 1.3)
    for rank in (0, 1):
        group.forget(rank, 1.4)
    assert (group.running, group.wake_due, group.wave) == (False, None, 0)


def test_a_new_coordinator_takes_the_highest_wave_and_wakes_those_behind() -> None:
    group = GroupWave()
    for rank, wave, running in ((0, 3, False), (1, 4, True), (2, 4, False)):
        group.observe(rank, wave, running, 1.0)
    assert (group.wave, group.running, group.lagging()) == (4, True, [0, 2])
    assert group.wake(1.0) == StartDPWave(4, None)


def test_a_rank_that_stays_behind_in_an_old_wave_has_the_others_woken() -> None:
    group = GroupWave()
    group.observe(1, 0, False, 0.0)
    group.started(1, 0, 0.0)
    group.observe(0, 0, False, 0.1)
    group.observe(0, 5, False, 0.1)
    wakes = [group.wake(now / 100) for now in range(10, 100)]
    assert StartDPWave(5, None) in wakes


words = st.tuples(
    st.sampled_from(["observe", "started", "noticed", "forget", "wake"]),
    st.integers(0, 3), st.integers(0, 5), st.booleans(), st.floats(0, 0.2),
)  # fmt: skip


@settings(max_examples=examples(300))
@given(st.lists(words, max_size=60))
def test_whatever_is_said_the_wave_grows_and_a_wake_is_due_while_one_is_owed(
    said: list[tuple[str, int, int, bool, float]],
) -> None:
    group, now, wave = GroupWave(), 0.0, 0
    last: dict[int, tuple[int, bool]] = {}
    for what, rank, number, running, pause_s in said:
        now += pause_s
        if what == "wake":
            wake = group.wake(now)
            assert wake is None or wake.wave == group.wave
        elif what == "forget":
            group.forget(rank, now)
            last.pop(rank, None)
        elif what == "noticed":
            group.noticed(rank, number, now)
        else:
            running = running or what == "started"
            arguments = (rank, number, now) if what == "started" else (rank, number, running, now)
            getattr(group, what)(*arguments)
            if number >= last.get(rank, (0, False))[0]:
                last[rank] = (number, running)
        assert group.wave >= wave
        wave = group.wave
        runs = {rank for rank, state in last.items() if state == (wave, True)}
        assert group.running == bool(runs)
        if runs:
            assert group.lagging() == sorted(last.keys() - runs)
        assert (group.wake_due is not None) == bool(group.lagging())
        assert group.wake_due is None or group.wake_due <= now + LONGEST_S
