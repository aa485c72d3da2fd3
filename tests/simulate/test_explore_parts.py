"""Interning: what is one state, what is another, and other numbers for the ranks."""

from __future__ import annotations

import pytest

from paceline.core.coordinator.events import RankSaid
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import RankHello, StartDPWave, StartWave
from paceline.simulate.explore_coordinator import Coordinators
from paceline.simulate.explore_parts import LATER, NOW, RankLabel, Register, freeze, renumber


def hello(rank: int) -> RankSaid:
    return RankSaid(RankHello(1, RankLabel(rank), 1, "rank", True))


def started(rank: int) -> Coordinator:
    """A coordinator that knows two ranks, one of which runs."""
    machine = Coordinator(2, 1, 0.0, publish_loads=False)
    for number in range(2):
        machine.handle(hello(number), NOW)
    machine.handle(RankSaid(StartWave(RankLabel(rank), 1, 0)), NOW)
    return machine


def swapped(rank: int) -> int:
    return 1 - rank


def test_equal_things_have_one_number() -> None:
    register: Register[object] = Register()
    wake = StartDPWave(1, RankLabel(0))
    assert register.number(wake) == register.number(StartDPWave(1, RankLabel(0))) == 0
    assert register.number(StartDPWave(1, RankLabel(1))) == 1
    assert register[0] is wake
    assert len(register) == 2


def test_a_counter_for_people_makes_no_state() -> None:
    machine, other = started(0), started(0)
    other._dropped += 1
    assert freeze(machine) == freeze(other)
    other._group.wave += 1
    assert freeze(machine) != freeze(other)


def test_other_numbers_make_the_state_of_the_other_rank() -> None:
    assert freeze(renumber(started(0))) != freeze(renumber(started(1)))
    assert freeze(renumber(started(0), swapped)) == freeze(renumber(started(1)))


def test_a_machine_does_the_same_by_other_numbers() -> None:
    # A rank's number that a machine keeps as a plain integer would be missed, and states merged that are not one.
    event = RankSaid(StartWave(RankLabel(1), 1, 0))
    before, after = started(0), renumber(started(0), swapped)
    effects = before.handle(event, NOW)
    others = after.handle(renumber(event, swapped), NOW)
    assert freeze(renumber(effects, swapped)) == freeze(others)
    assert freeze(renumber(before, swapped)) == freeze(renumber(after))


@pytest.mark.parametrize("identity", [1, 2])
def test_a_coordinator_hears_one_rank_as_it_hears_another(identity: int) -> None:
    coordinators = Coordinators(2)
    begin = coordinators.fresh(identity)
    first, second = (coordinators.said(begin, rank, hello(0).message, 0).state for rank in range(2))
    assert first != second
    assert coordinators.renumbered(first, (1, 0)) == second
    both = [coordinators.said(first, 1, hello(0).message, 0), coordinators.said(second, 0, hello(0).message, 0)]
    assert both[0].state == both[1].state
    assert coordinators[both[0].state]._introductions.acquainted(NOW)


def test_a_copy_is_a_copy() -> None:
    machine = started(0)
    copy = renumber(machine)
    copy.handle(RankSaid(StartWave(RankLabel(1), 1, 0)), NOW)
    assert freeze(copy) != freeze(machine)


def test_a_timer_that_is_set_is_due_later() -> None:
    machine = renumber(started(0))
    assert machine._group.wake_due == LATER
    assert renumber(Coordinator(2, 1, 0.0))._group.wake_due is None
