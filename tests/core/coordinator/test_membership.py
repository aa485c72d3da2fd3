"""Which ranks there are, in the coordinator's eyes: whom it asks, which hello it answers, whom it counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from paceline.core.coordinator.membership import (
    ADMIT_AGAIN_S,
    FIRST_AGAIN_S,
    GATHER_S,
    LONGEST_AGAIN_S,
    LOST_S,
    RETIRED_KEPT,
    TRANSITIONS,
    Membership,
    RankState,
    RollCall,
    Said,
)


def ready(*lives: tuple[int, int], size: int = 4) -> Membership:
    membership = Membership(size)
    for rank, incarnation in lives:
        assert membership.hello(rank, incarnation, f"address {incarnation}", ready=True)
    return membership


def test_a_rank_is_a_member_when_it_says_that_it_is_ready() -> None:
    membership = Membership(2)
    assert membership.missing() == [0, 1]
    assert membership.hello(1, 7, "there", ready=False)
    assert membership.is_current(1, 7)
    assert not membership.is_ready(1)
    assert membership.members() == []
    assert membership.hello(1, 7, "there", ready=True)
    assert [(m.rank, m.incarnation, m.address) for m in membership.members()] == [(1, 7, "there")]
    assert membership.missing() == [0]


def test_members_are_in_order_of_their_numbers() -> None:
    membership = ready((3, 1), (0, 2), (2, 3))
    assert [member.rank for member in membership.members()] == [0, 2, 3]


def test_a_hello_from_before_it_was_ready_takes_nothing_away() -> None:
    membership = ready((0, 7))
    assert membership.hello(0, 7, "address 7", ready=False)
    assert membership.is_ready(0)


def test_a_hello_may_bring_a_new_address() -> None:
    membership = ready((0, 7))
    membership.hello(0, 7, "elsewhere", ready=True)
    assert [member.address for member in membership.members()] == ["elsewhere"]


def test_a_new_life_takes_the_place_of_the_old_one_whose_late_words_are_void() -> None:
    # Incarnations are compared for equality only: the newer one may well be the smaller number.
    membership = ready((0, 7))
    assert membership.hello(0, 3, "new", ready=False)
    assert membership.is_current(0, 3)
    assert not membership.is_current(0, 7)
    assert membership.members() == []
    assert not membership.hello(0, 7, "old", ready=True)
    assert not membership.leave(0, 7)
    assert membership.is_current(0, 3)
    # Until the new one is ready, front-ends are told that the old one is over.
    assert membership.ended() == [(0, 7)]
    membership.hello(0, 3, "new", ready=True)
    assert membership.ended() == []


def test_a_life_that_has_left_is_over_until_there_is_another() -> None:
    membership = ready((0, 7), (1, 8))
    assert membership.leave(0, 7)
    assert not membership.is_current(0, 7)
    assert membership.ended() == [(0, 7)]
    assert membership.missing() == [0, 2, 3]
    assert not membership.leave(0, 7)
    assert not membership.hello(0, 7, "late", ready=True)
    assert membership.hello(0, 9, "new", ready=True)
    assert membership.ended() == []
    assert membership.is_ready(0)


def test_a_rank_whose_connection_ended_is_missing_until_it_is_back() -> None:
    membership = ready((0, 7), (1, 8))
    assert membership.lose(0, 7, 5.0)
    assert not membership.lose(0, 7, 5.1)
    assert [member.rank for member in membership.members()] == [1]
    # It is no life that is over, and what is still on its way from it does not count.
    assert membership.ended() == []
    assert not membership.is_retired(0, 7)
    assert not membership.hello(0, 7, "late", ready=True)
    assert membership.gone(5.0) == set()
    assert membership.gone(5.0 + LOST_S) == {0}
    membership.connected(0, 7)
    assert membership.hello(0, 7, "address 7", ready=True)
    assert membership.missing() == [2, 3]
    assert membership.gone(99.0) == set()


def test_the_next_life_of_a_lost_rank_ends_it() -> None:
    membership = ready((0, 7))
    membership.lose(0, 7, 5.0)
    assert membership.hello(0, 9, "new", ready=True)
    membership.connected(0, 7)
    assert not membership.hello(0, 7, "old", ready=True)
    assert membership.is_ready(0)


def test_a_late_hello_of_the_dead_does_not_take_the_place_of_who_is_connected() -> None:
    membership = Membership(1)
    membership.connected(0, 9)
    membership.hello(0, 9, "new", ready=True)
    assert not membership.hello(0, 7, "dead", ready=True)
    assert membership.is_current(0, 9)
    # The next life: its connection is known first, or it says hello again.
    assert not membership.hello(0, 11, "next", ready=False)
    membership.connected(0, 11)
    assert membership.hello(0, 11, "next", ready=False)


def test_the_last_lives_are_remembered_and_older_ones_forgotten() -> None:
    membership = Membership(1)
    for incarnation in range(RETIRED_KEPT + 1):
        assert membership.hello(0, incarnation, "", ready=True)
    for incarnation in range(RETIRED_KEPT):
        assert not membership.hello(0, incarnation, "", ready=True)
    # One more pushes the first one out.
    assert membership.hello(0, 99, "", ready=True)
    assert membership.hello(0, 0, "", ready=True)


def test_every_state_that_a_rank_can_be_in_has_an_answer_to_all_that_it_may_say() -> None:
    # Who is absent is made present by its hello; leaving is void where there is nobody to leave, or to lose.
    void = {(RankState.ABSENT, Said.LEAVING), (RankState.GONE, Said.LEAVING)}
    void |= {(state, Said.LOST) for state in (RankState.ABSENT, RankState.GONE, RankState.LOST)}
    assert set(TRANSITIONS) == {(state, said) for state in RankState for said in Said} - void
    assert RankState.ABSENT not in TRANSITIONS.values()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.sampled_from(Said)), max_size=40))
def test_at_all_times_a_rank_is_a_member_or_missing_and_nobody_comes_back(words: list[tuple[int, int, Said]]) -> None:
    membership, over, lost = Membership(3), set(), set()
    current: dict[int, int] = {}
    for rank, incarnation, said in words:
        if said is Said.LOST:
            is_lost = membership.lose(rank, incarnation, 1.0)
            assert is_lost == (current.get(rank) == incarnation and (rank, incarnation) not in lost)
            lost |= {(rank, incarnation)} if is_lost else set()
        elif said is Said.LEAVING:
            assert membership.leave(rank, incarnation) == (current.get(rank) == incarnation)
            if current.get(rank) == incarnation:
                over.add((rank, current.pop(rank)))
        elif (rank, incarnation) in over or (rank, incarnation) in lost:
            assert not membership.hello(rank, incarnation, "", said is Said.HELLO_READY)
        else:
            assert membership.hello(rank, incarnation, "", said is Said.HELLO_READY)
            if current.get(rank, incarnation) != incarnation:
                over.add((rank, current[rank]))
            current[rank] = incarnation
        members = {member.rank: member.incarnation for member in membership.members()}
        assert sorted([*members, *membership.missing()]) == [0, 1, 2]
        assert members.items() <= current.items()
        assert set(membership.ended()) <= over
        assert all(membership.is_current(*life) == (life not in lost) for life in current.items())


def test_ranks_beyond_the_size_are_heard_up_to_the_limit_and_not_missing() -> None:
    membership = ready((0, 1), size=1)
    assert membership.resize(1, 3) == []
    assert membership.hello(2, 5, "new", ready=False)
    assert membership.is_current(2, 5)
    assert membership.missing() == []
    membership.resize(3, 3)
    assert membership.missing() == [1, 2]


def test_ranks_beyond_the_limit_are_gone_with_the_lives_that_they_had() -> None:
    membership = ready((0, 1), (1, 2), (2, 3), size=3)
    assert membership.resize(1, 1) == [1, 2]
    assert [member.rank for member in membership.members()] == [0]
    assert membership.ended() == [(1, 2), (2, 3)]
    assert membership.is_retired(2, 3)
    assert membership.is_retired(2, 99)
    membership.resize(3, 3)
    assert not membership.hello(2, 3, "late", ready=True)
    assert membership.hello(2, 4, "new", ready=True)


def test_an_invented_life_has_no_place_where_ranks_show_their_presence() -> None:
    """It would be a member for ever: no connection of it ends."""
    membership = Membership(2)
    membership.connected(0, 7)
    assert membership.hello(0, 7, "", True)
    assert not membership.hello(1, 666, "tcp://nowhere", True)
    membership.lose(0, 7, 1.0)
    assert not membership.hello(0, 666, "tcp://nowhere", True)
    assert membership.members() == []
    membership.connected(1, 8)
    assert membership.hello(1, 8, "", True)
    assert [member.rank for member in membership.members()] == [1]


def test_a_rank_may_be_connected_before_it_is_known_to_be_of_the_deployment() -> None:
    membership = Membership(1)
    membership.connected(0, 7)
    membership.connected(1, 8)
    membership.resize(2, 2)
    assert membership.hello(1, 8, "", True)


def test_who_knows_that_ranks_show_their_presence_believes_no_stranger_from_the_start() -> None:
    membership = Membership(1, presence=True)
    assert not membership.hello(0, 666, "tcp://nowhere", True)
    membership.connected(0, 7)
    assert membership.hello(0, 7, "", True)


# When the coordinator asks the ranks who they are, and which hello it answers -----------------------
def roll_call(fresh: bool = True, patience_s: float | None = 1.0, **more: Any) -> RollCall:
    return RollCall(2, fresh=fresh, patience_s=patience_s, **more)


def some() -> list[int]:
    return [3]


def none() -> list[int]:
    return []


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
