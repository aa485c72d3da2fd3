"""Who is waited for after a wake, and when that is said."""

from __future__ import annotations

from paceline.vllm.translation import Answers


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
