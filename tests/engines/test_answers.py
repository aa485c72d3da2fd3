"""How long answers come to be, from those that have ended."""

from __future__ import annotations

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.text import AnswerLengths

FREE, TO_THE_LIMIT = SamplingParams(1000), SamplingParams(1000, ignore_eos=True)


def test_the_limit_is_expected_until_an_answer_has_ended_before_it() -> None:
    lengths = AnswerLengths()
    lengths.ended(FREE, 50, 50)
    assert lengths.left(FREE, 300) == 300


def test_answers_are_expected_to_be_as_long_as_those_before() -> None:
    lengths = AnswerLengths()
    for _ in range(100):
        lengths.ended(FREE, 20, 1000)
    assert lengths.left(FREE, 1000) == pytest.approx(20)
    assert lengths.left(FREE, 5) < 5, "never more than the limit"
    assert lengths.left(TO_THE_LIMIT, 300) == 300


def test_answers_cut_at_their_limit_would_have_gone_on() -> None:
    lengths = AnswerLengths()
    for _ in range(50):
        lengths.ended(FREE, 20, 1000)
        lengths.ended(FREE, 20, 20)
    assert lengths.left(FREE, 1000) == pytest.approx(40, rel=0.01)


def test_the_new_counts_for_more_than_the_old() -> None:
    lengths = AnswerLengths()
    for _ in range(1000):
        lengths.ended(FREE, 20, 1000)
    for _ in range(1000):
        lengths.ended(FREE, 200, 1000)
    assert 190 < lengths.left(FREE, 100_000) < 201
