"""Epochs: which lives form one group, when the next one is due; and who holds the group up, by whom each waits for."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from paceline.core.coordinator.epoch import FORM_TIMEOUT_S, LOST_S, SILENT_S, Epochs, Position, Stalls, describe
from paceline.core.messages import GroupMember, StallReport
from paceline.core.retry import FIRST_S


def hear(found: Epochs, rank: int, epoch: int = 0, life: int | None = None, now: float = 0.0, told: int = 0) -> None:
    life = 10 + rank if life is None else life
    found.heard(rank, Position(life, f"group {life}", epoch, max(told, epoch)), now)


def formed(number: int = 1, size: int = 2) -> Epochs:
    found = Epochs(size)
    for rank in range(size):
        hear(found, rank, number)
    return found


def hear_once(found: Epochs, rank: int, life: int, now: float, epoch: int = 0, told: int = 0) -> None:
    found.heard(rank, Position(life, f"group {life}", epoch, max(told, epoch), once=True), now)


def test_ranks_that_join_once_are_all_of_them_or_none() -> None:
    found = Epochs(3)
    for rank in range(3):
        hear_once(found, rank, 10 + rank, 0.0)
    assert found.form(0.0) is not None
    # It loads for minutes, and is told of it all the while.
    assert found.form(500.0) is not None
    assert found.forming
    for rank in range(3):
        hear_once(found, rank, 10 + rank, 500.0, epoch=1)
    assert not found.forming
    found.forget(1, 600.0)
    for rank in (0, 2):
        hear_once(found, rank, 10 + rank, 600.0, told=1)
    for later in (LOST_S, SILENT_S, 100.0):
        assert found.form(600.0 + later) is None, "nobody goes on without it"
    hear_once(found, 1, 21, 800.0)
    formed_now = found.form(800.0)
    assert formed_now is not None
    assert formed_now[0] == 2
    # The others end their lives on that, and come anew.
    hear_once(found, 0, 20, 801.0)
    hear_once(found, 2, 22, 801.5)
    hear_once(found, 1, 21, 801.5, told=2)
    last = found.form(801.5)
    assert last is not None
    assert (last[0], [member.incarnation for member in last[1]]) == (3, [20, 21, 22])


def tells(found: Epochs, now: float) -> tuple[int, list[int]]:
    """The epoch that is told now, and its ranks."""
    told = found.form(now)
    assert told is not None
    return told[0], [member.rank for member in told[1]]


def test_nothing_is_formed_before_every_rank_is_known() -> None:
    found = Epochs(3)
    hear(found, 0)
    hear(found, 2)
    assert (found.number, found.due, found.form(0.0)) == (0, None, None)
    hear(found, 1)
    assert found.form(0.0) == (1, [GroupMember(rank, 10 + rank, f"group {10 + rank}") for rank in range(3)])


def test_it_is_told_again_until_every_member_has_said_that_it_is_one() -> None:
    found = Epochs(2)
    hear(found, 0)
    hear(found, 1)
    assert found.form(0.0) is not None
    assert found.form(FIRST_S / 2) is None
    hear(found, 0, 1)
    assert found.form(FIRST_S) is not None
    hear(found, 1, 1)
    assert found.due is None
    assert found.form(99.0) is None


def test_a_new_life_makes_the_next_epoch_once_the_others_have_spoken() -> None:
    found = formed()
    assert (found.number, found.due) == (1, None)
    found.asks = False
    hear(found, 1, life=21, now=5.0)
    assert found.asks
    assert not found.forming
    # The one that stayed still names the generation before until it has formed the new one.
    hear(found, 0, 1, now=5.1)
    assert found.form(5.1) == (2, [GroupMember(0, 10, "group 10"), GroupMember(1, 21, "group 21")])
    hear(found, 0, 1, now=5.1)
    assert found.number == 2


def test_while_a_rank_is_away_for_a_moment_nothing_is_formed() -> None:
    found = formed()
    found.forget(1, 5.0)
    hear(found, 0, 0, now=5.0)
    assert found.due == 5.0 + LOST_S
    assert found.form(5.05) is None
    hear(found, 1, life=21, now=5.06)
    assert (found.number, found.due) == (2, 5.06)


def test_the_others_go_on_without_a_rank_that_is_lost() -> None:
    found = formed(size=3)
    found.forget(1, 5.0)
    hear(found, 0, 0, told=1, now=5.0)
    # The third is paused and has not noticed: it answers that it is a member.
    hear(found, 2, 1, now=5.01)
    assert found.form(5.0 + LOST_S) == (2, [GroupMember(0, 10, "group 10"), GroupMember(2, 12, "group 12")])
    for rank in (0, 2):
        hear(found, rank, 2, now=5.2)
    assert (found.number, found.due, found.absent) == (2, None, {1})


def test_a_survivor_that_is_slow_to_answer_is_waited_for_longer_than_one_that_is_lost() -> None:
    found = formed(size=3)
    found.forget(1, 5.0)
    hear(found, 0, 0, told=1, now=5.0)
    assert found.form(5.0 + LOST_S) is None
    hear(found, 2, 1, now=5.9)
    assert found.form(5.9) == (2, [GroupMember(0, 10, "group 10"), GroupMember(2, 12, "group 12")])


def test_who_says_nothing_is_left_out_in_the_end_and_comes_back_when_it_speaks() -> None:
    found = formed(size=3)
    for rank in (0, 1):
        hear(found, rank, 0, told=1, now=5.0)
    assert found.due == 5.0 + SILENT_S
    assert tells(found, 5.0 + SILENT_S)[1] == [0, 1]
    for rank in (0, 1):
        hear(found, rank, 2, now=7.5)
    assert found.absent == {2}
    hear(found, 2, 0, told=1, now=8.0)
    assert found.absent == set()
    for rank in (0, 1):
        hear(found, rank, 2, now=8.0)
    assert tells(found, 8.0) == (3, [0, 1, 2])


def test_before_the_first_epoch_nobody_is_left_out() -> None:
    found = Epochs(3)
    for rank in (0, 1):
        hear(found, rank)
    found.forget(1, 1.0)
    assert found.form(1000.0) is None
    assert found.absent == set()


def test_a_new_coordinator_goes_on_with_those_that_answer() -> None:
    found = Epochs(3)
    for rank in (0, 2):
        hear(found, rank, 4, now=1.0)
    assert (found.ended, found.due) == (True, 1.0 + SILENT_S)
    # Not the one that they name: who says nothing may be a member of that.
    assert tells(found, 1.0 + SILENT_S) == (5, [0, 2])


def test_the_last_survivor_goes_on_alone() -> None:
    found = formed()
    found.forget(0, 1.0)
    hear(found, 1, 0, told=1, now=1.0)
    assert found.form(1.0 + LOST_S) == (2, [GroupMember(1, 11, "group 11")])


def test_a_forming_ends_with_a_member_that_goes() -> None:
    found = Epochs(2)
    hear(found, 0)
    hear(found, 1)
    found.form(0.0)
    found.forget(1, 1.0)
    assert not found.forming
    hear(found, 1, life=21, now=1.01)
    hear(found, 0, told=1, now=1.02)
    assert found.form(1.02) == (2, [GroupMember(0, 10, "group 10"), GroupMember(1, 21, "group 21")])


def test_members_that_fall_out_make_one_next_epoch_when_all_have_spoken() -> None:
    found = formed(size=3)
    for rank in range(2):
        hear(found, rank, 0, told=1, now=1.0)
        hear(found, rank, 0, told=1, now=1.0)
        assert not found.forming, "the third may be the one that has died"
    hear(found, 2, 1, now=1.0)
    assert (found.number, found.due) == (2, 1.0)
    for rank in range(3):
        hear(found, rank, 2, now=1.0)
    assert (found.number, found.due) == (2, None)


def test_who_is_asked_while_it_forms_has_not_fallen_out() -> None:
    found = formed()
    hear(found, 0, 0, life=99, now=1.0)
    hear(found, 1, 1, now=1.0)
    assert found.number == 2
    hear(found, 1, 0, told=2, now=1.0)
    assert not found.ended, "it has left the one before, as it was told"
    hear(found, 1, 2, now=1.0)
    hear(found, 1, 0, told=2, now=1.0)
    assert found.ended, "it has left the new one"


def test_a_forming_that_takes_too_long_gives_way_to_the_next() -> None:
    found = Epochs(2)
    hear(found, 0)
    hear(found, 1)
    now = 0.0
    while now < FORM_TIMEOUT_S:
        assert tells(found, now)[0] == 1
        assert found.due is not None
        now = found.due
    found.asks = False
    assert found.form(now) is None
    assert found.asks
    hear(found, 0, 1, now=now)
    hear(found, 1, 0, told=1, now=now)
    assert tells(found, now)[0] == 2


def test_a_forming_that_all_have_done_at_last_is_not_given_up() -> None:
    found = Epochs(2)
    hear(found, 0)
    hear(found, 1)
    found.form(0.0)
    assert found.form(FORM_TIMEOUT_S) is None
    hear(found, 0, 1, now=FORM_TIMEOUT_S)
    hear(found, 1, 1, now=FORM_TIMEOUT_S)
    assert (found.number, found.due) == (1, None)


def test_a_number_that_a_rank_was_told_is_not_given_again() -> None:
    found = Epochs(2)
    hear(found, 0, told=8)
    hear(found, 1, told=3)
    assert tells(found, 0.0)[0] == 9


def test_a_new_coordinator_that_hears_one_epoch_has_nothing_to_do() -> None:
    found = formed(number=7)
    assert (found.number, found.due, found.asks) == (7, None, False)


@pytest.mark.parametrize("named", [(7, 0), (0, 7), (7, 6), (0, 0)])
def test_a_new_coordinator_that_hears_different_ones_makes_the_next(named: tuple[int, int]) -> None:
    found = Epochs(2)
    for rank, epoch in enumerate(named):
        hear(found, rank, epoch, now=1.0)
    assert tells(found, 1.0)[0] == max(named) + 1


LIVES = st.tuples(st.integers(0, 2), st.sampled_from(["new life", "falls out", "forms", "says again", "goes"]))


@given(steps=st.lists(LIVES, max_size=25))
def test_the_number_only_grows_and_all_come_together_in_the_end(steps: list[tuple[int, str]]) -> None:
    found, lives, member_of = Epochs(3), [10, 11, 12], [0, 0, 0]
    known: set[int] = set()
    last = 0
    for index, (rank, what) in enumerate(steps):
        match what:
            case "new life":
                lives[rank], member_of[rank] = 100 + index, 0
            case "falls out":
                member_of[rank] = 0
            case "forms" if found.number and found.forming:
                member_of[rank] = found.number
            case "goes":
                found.forget(rank, float(index))
                lives[rank], member_of[rank] = 100 + index, 0
                known.discard(rank)
                continue
        hear(found, rank, member_of[rank], lives[rank], now=float(index))
        known.add(rank)
        assert found.number >= last
        last = found.number
        assert not found.forming or len(known) == 3
    for now in range(1000, 1005):
        for rank in range(3):
            hear(found, rank, member_of[rank], lives[rank], now)
        told = found.form(now)
        if told is not None:
            number, members = told
            assert [member.incarnation for member in members] == lives
            member_of = [number] * 3
    assert found.due is None
    assert set(member_of) == {found.number}


def test_the_first_hello_of_a_rank_makes_nobody_speak_again() -> None:
    found = Epochs(2)
    for rank in (0, 1):
        # The coordinator forgets what it knows of a rank when a life of it comes that it does not know.
        found.forget(rank, 5.0)
        hear(found, rank)
    assert not found.asks
    assert found.form(0.0) is not None


# Scaling -------------------------------------------------------------------------------------------
def test_those_that_are_left_form_the_next_one_at_once() -> None:
    found = formed(size=4)
    found.resize(2, 1.0)
    number, members = found.form(1.0) or (0, [])
    assert (number, [member.rank for member in members]) == (2, [0, 1])
    # They may still say that they are members of the one before.
    hear(found, 0, 1, now=1.0)
    assert found.forming
    for rank in (0, 1):
        hear(found, rank, 2, now=1.0)
    assert found.due is None


def test_new_ranks_are_members_of_the_next_one_once_all_have_spoken() -> None:
    found = formed(size=2)
    found.resize(3, 1.0)
    assert found.due is None
    hear(found, 2, now=1.0)
    assert found.asks
    hear(found, 0, 1, now=1.0)
    assert found.form(1.0) is None
    hear(found, 1, 1, now=1.0)
    assert tells(found, 1.0)[1] == [0, 1, 2]


def test_who_was_left_out_or_waited_for_and_leaves_is_not_waited_for() -> None:
    found = formed(size=3)
    found.forget(2, 1.0)
    hear(found, 0, 0, now=1.0)
    hear(found, 1, 0, now=1.0)
    assert found.form(1.0) is None
    found.resize(2, 1.01)
    assert [member.rank for member in (found.form(1.01) or (0, []))[1]] == [0, 1]
    assert found.form(1.0 + LOST_S) is not None or found.due is not None


def waits(rank: int, *ranks: int, seconds: float = 2.0) -> StallReport:
    return StallReport(rank, 10 + rank, 18, list(ranks), 7, "all_reduce", seconds)


@pytest.mark.parametrize(
    ("reports", "culprits"),
    [
        ([], []),
        # Through the first member: it alone knows who is late, the others know only it.
        ([waits(1, 0), waits(3, 0), waits(0, 2)], [2]),
        ([waits(0, 1, 2), waits(3, 0)], [1, 2]),
        ([waits(1, 0), waits(2, 0)], [0]),
        # Not of one moment: everybody waits for somebody, and all who are named are shown.
        ([waits(0, 1), waits(1, 0)], [0, 1]),
    ],
)
def test_the_culprits_are_those_who_wait_for_nobody(reports: list[StallReport], culprits: list[int]) -> None:
    stalls = Stalls()
    for report in reports:
        stalls.report(report)
    assert [stall.rank for stall in stalls.found] == culprits


def test_only_other_names_are_news() -> None:
    stalls = Stalls()
    assert stalls.report(waits(0, 2))
    assert not stalls.report(waits(0, 2, seconds=4.0))
    assert not stalls.report(waits(1, 2))
    assert stalls.report(waits(0, 1, 2)) is False
    assert not stalls.report(waits(0))
    assert stalls.report(waits(1))
    assert stalls.found == []


def test_who_is_gone_waits_no_more() -> None:
    stalls = Stalls()
    stalls.report(waits(0, 2))
    assert stalls.forget(0)
    assert not stalls.forget(0)


def test_it_says_which_rank_step_and_collective_for_how_long_and_who_waits() -> None:
    stalls = Stalls()
    stalls.report(waits(0, 2, seconds=3.0))
    stalls.report(waits(1, 2, seconds=2.5))
    (stall,) = stalls.found
    assert describe(stall) == "rank 2 holds the group up: all_reduce 7 in step 18, for 3.0 s; waiting: rank 0, 1"


def test_a_rank_that_hangs_in_its_own_step_is_the_one_whoever_waits_for_whom() -> None:
    stalls = Stalls()
    assert stalls.report(StallReport(2, 1, 5, [2], 5, "step", 31.0))
    assert stalls.lines() == ["rank 2 hangs: step 5 has not returned for 31.0 s"]
    # The reduction goes through rank 0, which all others name.
    assert not stalls.report(StallReport(0, 1, 5, [2], 9, "all_reduce", 32.0))
    assert not stalls.report(StallReport(1, 1, 5, [0], 9, "all_reduce", 32.0))
    assert [(stall.rank, stall.hangs) for stall in stalls.found] == [(2, True)]
    assert stalls.report(StallReport(3, 1, 5, [3], 5, "step", 31.0))
    assert [stall.rank for stall in stalls.found] == [2, 3]
    for rank in (1, 0):
        assert not stalls.report(StallReport(rank, 1, 6))
    assert stalls.report(StallReport(2, 1, 6))
    assert "rank 2 goes on" in stalls.lines()
