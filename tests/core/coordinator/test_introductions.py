"""When the coordinator asks the ranks who they are, and which hello it answers."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core.coordinator.membership import ADMIT_AGAIN_S, FIRST_AGAIN_S, GATHER_S, LONGEST_AGAIN_S, RollCall


def roll_call(fresh: bool = True, patience_s: float | None = 1.0, **more: Any) -> RollCall:
    return RollCall(2, fresh=fresh, patience_s=patience_s, **more)


def some() -> list[int]:
    return [3]


def none() -> list[int]:
    return []


def test_nothing_is_asked_before_anybody_is_there() -> None:
    found = roll_call()
    assert found.due is None
    assert not found.ask(5.0, some)


def test_the_first_question_goes_out_at_once() -> None:
    found = roll_call()
    found.wanted(0.0)
    assert found.due == 0.0
    assert found.ask(0.0, some)


def test_those_who_come_within_a_moment_share_a_question() -> None:
    found, asked = roll_call(), 0
    for index in range(100):
        now = index * GATHER_S / 100
        found.wanted(now)
        asked += found.ask(now, some)
    assert asked == 1
    assert found.due == pytest.approx(GATHER_S)
    assert found.ask(GATHER_S, none)
    assert found.due is None


def test_a_storm_of_wishes_does_not_put_the_question_off() -> None:
    found, times = roll_call(), []
    for index in range(1000):
        now = index / 1000
        found.wanted(now)
        if found.ask(now, some):
            times.append(now)
    assert len(times) == pytest.approx(100, abs=2)


def test_it_is_asked_again_while_ranks_are_missing_and_ever_more_rarely() -> None:
    found, now, gaps = roll_call(), 0.0, []
    found.wanted(0.0)
    for _ in range(9):
        assert found.ask(now, some)
        assert found.due is not None
        gaps.append(found.due - now)
        assert not found.ask(found.due - 0.001, some)
        now = found.due
    assert gaps[:3] == pytest.approx([FIRST_AGAIN_S, 2 * FIRST_AGAIN_S, 4 * FIRST_AGAIN_S])
    assert gaps[-1] == LONGEST_AGAIN_S
    assert found.ask(now, none)
    assert found.due is None


def test_somebody_new_is_asked_soon_however_rare_the_repeats_have_become() -> None:
    found, now = roll_call(), 0.0
    found.wanted(0.0)
    for _ in range(9):
        found.ask(now, some)
        now = found.due or 0.0
    asked_at = now - LONGEST_AGAIN_S
    found.wanted(asked_at + 1.0)
    assert found.due == asked_at + 1.0
    assert found.ask(asked_at + 1.0, some)
    assert found.due == pytest.approx(asked_at + 1.0 + FIRST_AGAIN_S)


def test_without_its_rule_nobody_is_asked() -> None:
    found = roll_call(without={"new-coordinator-asks"})
    found.wanted(0.0)
    assert found.due is None
    assert not found.ask(1.0, some)


def test_one_answer_serves_the_hellos_of_a_moment() -> None:
    found = roll_call()
    assert found.admits(0, 10, 0.0)
    assert not found.admits(0, 10, ADMIT_AGAIN_S / 2)
    assert found.admits(0, 10, ADMIT_AGAIN_S)
    assert not found.admits(0, 10, 1.9 * ADMIT_AGAIN_S)


def test_another_rank_or_another_life_is_answered_at_once() -> None:
    found = roll_call()
    assert found.admits(0, 10, 0.0)
    assert found.admits(1, 10, 0.0)
    assert found.admits(0, 11, 0.0)


def test_the_first_coordinator_of_all_has_nothing_to_learn() -> None:
    assert roll_call(fresh=True).acquainted(0.0)


def test_a_later_one_is_acquainted_when_all_were_heard() -> None:
    found = roll_call(fresh=False)
    assert not found.acquainted(5.0)
    found.heard(1)
    assert not found.acquainted(5.9)
    found.heard(0)
    assert found.acquainted(5.9)


def test_who_says_nothing_is_waited_for_as_long_as_patience_lasts() -> None:
    found = roll_call(fresh=False)
    assert not found.acquainted(5.0)
    assert found.due == 6.0
    assert not found.acquainted(5.99)
    assert found.acquainted(6.0)
    assert found.due is None
    endless = roll_call(fresh=False, patience_s=None)
    assert not endless.acquainted(5.0)
    assert endless.due is None
    assert not endless.acquainted(1e9)
