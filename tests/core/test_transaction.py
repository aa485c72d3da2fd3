"""What pausing and scaling share, and a pause as one party knows it: the newest counts, calls are served once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from paceline.core.coordinator.pause import Pause
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.requests import SuspendMode
from paceline.core.transaction import ANSWERS_KEPT, MODES, PauseState, ServedCalls, Transaction, stops


@pytest.mark.parametrize("transaction", [Pause(), DeploymentScaling(2)], ids=["pause", "scaling"])
def test_a_higher_number_is_news_unless_nobody_can_have_counted_that_far(transaction: Transaction) -> None:
    assert transaction.number == 0
    assert not transaction.is_news(0)
    assert transaction.is_news(1)
    assert not transaction.is_news(2**60)
    assert transaction.due is None


def test_a_call_is_served_once_whatever_comes_between() -> None:
    served = ServedCalls()
    assert (served.number(7, 1), served.newest(7)) == (None, -1)
    served.serve(7, 1, 3)
    served.serve(8, 1, 4)
    served.serve(7, 5, 5)
    assert (served.number(7, 1), served.number(8, 1), served.newest(7)) == (3, 4, 5)
    served.serve(7, 2, 6)
    assert served.newest(7) == 5


def test_a_front_end_that_is_gone_is_forgotten_and_no_other() -> None:
    served = ServedCalls()
    served.serve(7, 1, 3)
    served.serve(8, 1, 4)
    served.forget_frontend(7)
    assert (served.number(7, 1), served.newest(7), served.number(8, 1)) == (None, -1, 4)


def test_what_is_kept_is_bounded() -> None:
    served = ServedCalls()
    for call in range(ANSWERS_KEPT + 10):
        served.serve(7, call, call)
    assert served.number(7, 9) is None
    assert served.number(7, 10) == 10


WORDS = st.tuples(st.integers(0, 9), st.sampled_from(MODES), st.booleans())


def standing(number: int, mode: SuspendMode = "keep", released: bool = False) -> PauseState:
    made = PauseState()
    made.learn(number, mode, released)
    return made


def test_work_may_be_started_at_first() -> None:
    fresh = PauseState()
    assert (fresh.number, fresh.paused, fresh.released, fresh.over) == (0, False, True, True)


@pytest.mark.parametrize(
    ("number", "released", "suspended", "free"),
    [(1, False, True, False), (1, True, True, False), (2, False, False, False), (2, True, False, True)],
)
def test_odd_is_paused_and_even_is_free_once_released(number: int, released: bool, suspended: bool, free: bool) -> None:
    found = standing(number, "wait", released)
    assert (found.paused, found.over, found.mode) == (suspended, free, "wait")


def test_a_release_of_the_number_that_is_known_is_news_once() -> None:
    found = standing(2)
    assert found.learn(2, "keep", True)
    assert found.over
    assert not found.learn(2, "keep", True)
    assert not found.learn(2, "keep", False)
    assert found.over


def test_a_pause_cannot_be_released() -> None:
    found = standing(3)
    assert not found.learn(3, "keep", True)
    assert found.learn(4, "keep", False)
    assert not found.over


def test_the_release_of_an_older_number_changes_nothing() -> None:
    found = standing(4)
    assert not found.learn(2, "keep", True)
    assert not found.over


def test_the_mode_belongs_to_its_number() -> None:
    found = standing(1, "wait")
    assert not found.learn(1, "abort", False)
    assert found.mode == "wait"
    assert found.learn(3, "abort", False)
    assert found.mode == "abort"


@given(words=st.lists(WORDS, min_size=1, max_size=6), order=st.randoms())
def test_number_and_freedom_do_not_depend_on_the_order_of_words(
    words: list[tuple[int, SuspendMode, bool]], order: object
) -> None:
    one, other = PauseState(), PauseState()
    shuffled = list(words)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for word in words:
        one.learn(*word)
    for word in shuffled:
        other.learn(*word)
    assert (one.number, one.over) == (other.number, other.over)


@given(words=st.lists(WORDS, max_size=12))
def test_the_number_never_goes_down_and_news_is_said_to_be_news(words: list[tuple[int, SuspendMode, bool]]) -> None:
    found = PauseState()
    for word in words:
        before = (found.number, found.mode, found.released)
        news = found.learn(*word)
        assert found.number >= before[0]
        assert news == (before != (found.number, found.mode, found.released))
        assert not (found.paused and found.over)


@given(number=st.integers(0, 2**48), mode=st.sampled_from(MODES))
def test_packed_says_number_and_mode(number: int, mode: SuspendMode) -> None:
    found = standing(number, mode)
    learned = PauseState()
    learned.learn_packed(found.packed)
    assert learned.number == number
    assert learned.mode == (mode if number else "keep")
    assert learned.over == (number == 0)


def test_the_largest_packed_is_the_newest() -> None:
    packed = [standing(number, mode).packed for number, mode in itertools.product(range(1, 6), MODES)]
    assert packed == sorted(set(packed))


def test_what_was_agreed_never_releases() -> None:
    found = standing(2)
    assert not found.learn_packed(standing(2, released=True).packed)
    assert not found.over


@pytest.mark.parametrize("mode", MODES)
def test_ranks_stop_at_once_but_to_wait(mode: SuspendMode) -> None:
    assert stops(standing(1, mode).packed) == (mode != "wait")
    assert not stops(standing(2, mode).packed)
    assert not stops(PauseState().packed)


def test_what_is_begun_may_be_finished_unless_it_had_been_stopped_already() -> None:
    free = PauseState()
    free.learn(1, "wait", False)
    assert free.draining
    free.learn(3, "wait", False)
    assert free.draining, "the same suspension under another number"
    stopped = PauseState()
    stopped.learn(1, "keep", False)
    stopped.learn(5, "wait", False)
    assert not stopped.draining, "it was resumed and suspended again without a word to this one"
    stopped.learn(6, "wait", True)
    stopped.learn(7, "wait", False)
    assert stopped.draining
