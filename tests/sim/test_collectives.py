"""Collectives in virtual time: they block while a member is missing and end with their epoch."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paceline.core.messages import GroupMember
from paceline.net import group as group_seat
from paceline.sim import collectives
from paceline.sim.collectives import Group, Groups, Part
from paceline.sim.world import Violation, World

MEMBERS = [GroupMember(rank, 10 + rank, f"tcp://group-{rank}") for rank in range(3)]
LIVES = [(member.rank, member.incarnation) for member in MEMBERS]


class Told:
    """What each rank was told, and when."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.all: dict[int, tuple[Any, float]] = {}

    def part(self, rank: int, value: object, seconds: float = 0.1) -> Part:
        def tell(what: Any) -> None:
            assert rank not in self.all, f"rank {rank} is told twice"
            self.all[rank] = (what, self.world.now)

        return Part(value, seconds, tell, lambda: tell("ended"))


def test_all_get_all_values_once_the_last_and_the_slowest_is_done() -> None:
    world = World()
    group, told = Group(world, LIVES, None), Told(world)
    group.enter(0, told.part(0, "a"))
    world.run_for(5.0)
    group.enter(1, told.part(1, "b", seconds=0.7))
    world.run_for(5.0)
    assert told.all == {}
    group.enter(2, told.part(2, "c"))
    world.run_for(5.0)
    assert set(told.all) == {0, 1, 2}
    assert {tuple(values) for values, _ in told.all.values()} == {("a", "b", "c")}
    assert {when for _, when in told.all.values()} == {10.7}


def test_different_collectives_and_one_twice_are_violations() -> None:
    world = World()
    group, told = Group(world, LIVES, None), Told(world)
    group.enter(0, told.part(0, "a step"))
    with pytest.raises(Violation, match="ranks in different collectives") as caught:
        group.enter(1, told.part(1, 5))
    assert caught.value.processes == ("rank 1", "rank 0")
    with pytest.raises(Violation, match="in two collectives"):
        group.enter(0, told.part(0, "a step"))


def test_who_waits_is_told_of_the_end_and_who_comes_later_too() -> None:
    world = World()
    group, told = Group(world, LIVES, random.Random(1)), Told(world)
    group.enter(0, told.part(0, "a"))
    world.run_for(1.0)
    group.end()
    group.enter(1, told.part(1, "b"))
    world.run_for(1.0)
    assert [what for what, _ in told.all.values()] == ["ended", "ended"]
    assert all(1.0 <= when <= 1.0 + collectives.NOTICE_S for _, when in told.all.values())


def test_of_a_collective_that_was_completing_some_get_the_outcome() -> None:
    seen: set[tuple[bool, ...]] = set()
    for seed in range(60):
        world = World()
        group, told = Group(world, LIVES, random.Random(seed)), Told(world)
        for rank in range(3):
            group.enter(rank, told.part(rank, rank))
        world.at(0.1 + collectives.SCATTER_S / 2, group.end)
        world.run_for(1.0)
        seen.add(tuple(told.all[rank][0] == "ended" for rank in range(3)))
    # Ranks that leave early always have the outcome; of the others each may or may not.
    assert len(seen) >= 5
    assert (False, False, False) in seen


def form(groups: Groups, life: tuple[int, int], formed: list[Any], epoch: int = 1) -> None:
    groups.form(life, epoch, MEMBERS, lambda group: formed.append((life, group)), lambda: formed.append((life, None)))


def test_a_group_is_formed_when_all_have_come_and_given_up_in_time() -> None:
    world, formed = World(), []
    groups = Groups(world, None)
    form(groups, LIVES[0], formed)
    world.run_for(collectives.FORM_TIMEOUT_S / 2)
    form(groups, LIVES[1], formed)
    world.run_for(collectives.FORM_TIMEOUT_S * 0.75)
    assert formed == [(LIVES[0], None)]
    form(groups, LIVES[0], formed)
    form(groups, LIVES[2], formed)
    world.run_for(5.0)
    assert {life for life, group in formed[1:] if group is not None} == set(LIVES)
    assert len({id(group) for _, group in formed[1:]}) == 1


def test_leaving_ends_the_group_for_all() -> None:
    world, formed = World(), []
    groups = Groups(world, None)
    for life in LIVES:
        form(groups, life, formed)
    world.run_for(1.0)
    group = formed[0][1]
    assert not group.over
    form(groups, LIVES[1], formed, epoch=2)
    assert group.over


def test_ranks_wait_as_long_for_one_another_as_in_the_real_shell() -> None:
    assert collectives.FORM_TIMEOUT_S == group_seat.FORM_TIMEOUT_S
