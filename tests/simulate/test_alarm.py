"""The tick of a machine whose deadline moves."""

from __future__ import annotations

from paceline.simulate.alarm import Alarm
from paceline.simulate.world import World


class Machine:
    deadline = 1.0


def set_up() -> tuple[World, Machine, list[float], Alarm]:
    world, machine = World(), Machine()
    rung: list[float] = []

    def tick() -> None:
        rung.append(world.now)
        machine.deadline = float("inf")

    return world, machine, rung, Alarm(world, machine, tick, lambda: True)


def test_it_rings_once_at_the_deadline() -> None:
    world, _, rung, alarm = set_up()
    for _ in range(3):
        alarm.set()
    world.run_for(5.0)
    assert rung == [1.0]


def test_a_deadline_that_comes_nearer_rings_sooner_and_one_that_moves_away_later() -> None:
    world, machine, rung, alarm = set_up()
    alarm.set()
    machine.deadline = 0.5
    alarm.set()
    machine.deadline = 2.0
    world.run_for(5.0)
    assert rung == [2.0]


def test_for_who_is_dead_nothing_is_arranged_any_more() -> None:
    world, machine, rung, _ = set_up()
    alarm = Alarm(world, machine, lambda: rung.append(world.now), lambda: False)
    alarm.set()
    machine.deadline = 3.0
    world.run_for(5.0)
    assert rung == []
