"""The timer that repeats: soon at first, ever later, and not at all once it is answered."""

from __future__ import annotations

import pytest

from paceline.core.retry import Retry


def test_nothing_is_owed_before_it_is_started() -> None:
    retry = Retry()
    assert retry.due is None
    assert not retry.is_due(1e9)


def test_each_wait_is_twice_the_one_before_up_to_the_longest() -> None:
    retry = Retry(first_s=0.1, longest_s=0.5)
    retry.start(10.0)
    said = []
    for _ in range(5):
        assert retry.due is not None
        assert not retry.is_due(retry.due - 0.001)
        said.append(retry.due)
        retry.said(retry.due)
    assert said == pytest.approx([10.0, 10.1, 10.3, 10.7, 11.2])


def test_an_answer_ends_it_and_the_next_start_is_soon_again() -> None:
    retry = Retry(first_s=0.1, longest_s=0.5)
    retry.start(1.0)
    for _ in range(4):
        retry.said(1.0)
    retry.stop()
    assert retry.due is None
    retry.start(5.0)
    retry.said(5.0)
    assert retry.due == pytest.approx(5.1)
