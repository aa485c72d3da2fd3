"""Who is waited for after a wake, and when that is said."""

from __future__ import annotations

from paceline.integrations.vllm_answers import Answers


def test_who_does_not_answer_in_time_is_named_once() -> None:
    answers = Answers(10.0)
    answers.woken(3, [0, 1, 2], 5.0)
    answers.sign(1, 3)
    assert answers.deadline == 15.0
    assert not answers.settle(14.9)
    assert answers.settle(15.0)
    assert answers.stalled == [0, 2]
    assert not answers.settle(99.0)
    assert answers.deadline == float("inf")
    answers.all_came(3)
    assert answers.settle(100.0)
    assert not answers.stalled


def test_a_repeat_does_not_begin_anew() -> None:
    answers = Answers(10.0)
    answers.woken(3, [1], 5.0)
    answers.woken(3, [1], 12.0)
    assert answers.settle(15.0)


def test_a_later_wave_does() -> None:
    answers = Answers(10.0)
    answers.woken(3, [1], 5.0)
    answers.woken(4, [0, 1], 12.0)
    answers.sign(0, 3)
    assert answers.awaited == {0, 1}, "that was a sign of an older wave"
    assert not answers.settle(15.0)


def test_who_has_come_is_not_waited_for_again_in_the_same_wave() -> None:
    answers = Answers(10.0)
    answers.woken(3, [1], 5.0)
    answers.all_came(3)
    answers.settle(6.0)
    answers.woken(3, [1], 7.0)
    assert not answers.awaited
