"""Generations: which lives form one group, when the next one is due, and what a new coordinator takes up."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.generation import FORM_TIMEOUT_S, Generations
from paceline.protocol.messages import GroupMember
from paceline.protocol.wave import FIRST_REPEAT_S, LONGEST_REPEAT_S


def hear(found: Generations, rank: int, generation: int = 0, life: int | None = None, now: float = 0.0) -> None:
    life = 10 + rank if life is None else life
    found.heard(rank, life, f"group {life}", generation, now)


def formed(number: int = 1, size: int = 2) -> Generations:
    """All ranks have said that they are members."""
    found = Generations(size)
    for rank in range(size):
        hear(found, rank, number)
    return found


def test_nothing_is_formed_before_every_rank_is_known() -> None:
    found = Generations(3)
    hear(found, 0)
    hear(found, 2)
    assert (found.number, found.due, found.form(0.0)) == (0, None, None)
    hear(found, 1)
    assert found.form(0.0) == (1, [GroupMember(rank, 10 + rank, f"group {10 + rank}") for rank in range(3)])


def test_it_is_told_again_until_every_member_has_said_that_it_is_one() -> None:
    found = Generations(2)
    hear(found, 0)
    hear(found, 1)
    assert found.form(0.0) is not None
    assert found.form(FIRST_REPEAT_S / 2) is None
    hear(found, 0, 1)
    assert found.form(FIRST_REPEAT_S) is not None
    hear(found, 1, 1)
    assert found.due is None
    assert found.form(99.0) is None


def test_repeats_become_rarer() -> None:
    found = Generations(1)
    hear(found, 0)
    now, gaps = 0.0, []
    while now < 5.0:
        found.form(now)
        assert found.due is not None
        gaps.append(found.due - now)
        now = found.due
    assert gaps[0] == pytest.approx(FIRST_REPEAT_S)
    assert gaps[-1] == pytest.approx(LONGEST_REPEAT_S)


def test_a_new_life_makes_the_next_generation() -> None:
    found = formed()
    assert (found.number, found.due) == (1, None)
    hear(found, 1, life=21, now=5.0)
    assert found.form(5.0) == (2, [GroupMember(0, 10, "group 10"), GroupMember(1, 21, "group 21")])
    # The one that stayed still names the generation before until it has formed the new one.
    hear(found, 0, 1, now=5.0)
    assert found.number == 2


def test_while_a_rank_is_away_nothing_is_formed() -> None:
    found = formed()
    found.forget(1)
    hear(found, 0, 0, now=5.0)
    assert found.due is None
    hear(found, 1, life=21, now=6.0)
    assert found.number == 2
    assert found.due == 6.0


def test_a_forming_ends_with_a_member_that_goes() -> None:
    found = Generations(2)
    hear(found, 0)
    hear(found, 1)
    found.form(0.0)
    found.forget(1)
    assert found.due is None
    hear(found, 1, life=21, now=1.0)
    assert found.form(1.0) == (2, [GroupMember(0, 10, "group 10"), GroupMember(1, 21, "group 21")])


def test_members_that_fall_out_make_one_next_generation() -> None:
    found = formed(size=3)
    for rank in range(3):
        hear(found, rank, 0, now=1.0)
    assert found.number == 2
    for rank in range(3):
        hear(found, rank, 2, now=1.0)
    assert (found.number, found.due) == (2, None)


def test_a_member_that_is_no_member_any_more_makes_the_next() -> None:
    found = formed()
    hear(found, 0, 0, now=3.0)
    assert (found.number, found.due) == (2, 3.0)
    hear(found, 0, 0, now=3.1)
    assert found.number == 2, "it has fallen out once"


def test_a_forming_that_takes_too_long_gives_way_to_the_next() -> None:
    found = Generations(2)
    hear(found, 0)
    hear(found, 1)
    now = 0.0
    while now < FORM_TIMEOUT_S:
        told = found.form(now)
        assert told is not None
        assert told[0] == 1
        assert found.due is not None
        now = found.due
    told = found.form(now)
    assert told is not None
    assert told[0] == 2
    hear(found, 0, 1, now=now)
    hear(found, 1, 1, now=now)
    assert found.due is not None, "too late: the number is not the one that is to be formed"


def test_a_new_coordinator_that_hears_one_generation_has_nothing_to_do() -> None:
    found = formed(number=7)
    assert (found.number, found.due) == (7, None)


@pytest.mark.parametrize("named", [(7, 0), (0, 7), (7, 6), (0, 0)])
def test_a_new_coordinator_that_hears_different_ones_makes_the_next(named: tuple[int, int]) -> None:
    found = Generations(2)
    for rank, generation in enumerate(named):
        hear(found, rank, generation, now=1.0)
    told = found.form(1.0)
    assert told is not None
    assert told[0] == max(named) + 1


LIVES = st.tuples(st.integers(0, 2), st.sampled_from(["new life", "falls out", "forms", "says again", "goes"]))


@given(steps=st.lists(LIVES, max_size=25))
def test_the_number_only_grows_and_all_come_together_in_the_end(steps: list[tuple[int, str]]) -> None:
    found, lives, member_of = Generations(3), [10, 11, 12], [0, 0, 0]
    known, last = set(), 0
    for index, (rank, what) in enumerate(steps):
        match what:
            case "new life":
                lives[rank], member_of[rank] = 100 + index, 0
            case "falls out":
                member_of[rank] = 0
            case "forms" if found.number and found.due is not None:
                member_of[rank] = found.number
            case "goes":
                found.forget(rank)
                lives[rank], member_of[rank] = 100 + index, 0
                known.discard(rank)
                continue
        hear(found, rank, member_of[rank], lives[rank], now=float(index))
        known.add(rank)
        assert found.number >= last
        last = found.number
        assert found.due is None or len(known) == 3
    now = 1000.0
    for rank in range(3):
        hear(found, rank, member_of[rank], lives[rank], now)
    for turn, rank in itertools.product(range(3), range(3)):
        told = found.form(now + 2 * turn)
        if told is not None:
            number, members = told
            assert [member.incarnation for member in members] == lives
            member_of = [number] * 3
        hear(found, rank, member_of[rank], lives[rank], now + 2 * turn)
    assert found.due is None
    assert set(member_of) == {found.number}
