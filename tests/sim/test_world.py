"""Virtual time: order, waiting, the journal and the seeds' streams."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paceline.core import codec
from paceline.core.messages import Admit, StartDPWave
from paceline.sim.world import STEADY, Alarm, Delays, Journal, Link, Seeds, Violation, World


def test_actions_happen_in_order_of_time_and_then_of_asking() -> None:
    world, seen = World(), []
    for name, when in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        world.at(when, lambda name=name: seen.append((name, world.now)))  # type: ignore[misc]
    world.run_for(5.0)
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert world.now == 5.0


def test_what_is_past_happens_now() -> None:
    world, seen = World(), []
    world.run_for(3.0)
    world.at(1.0, lambda: seen.append(world.now))
    world.run_for(0.0)
    assert seen == [3.0]


def test_waiting_ends_with_the_condition_or_says_what_was_awaited() -> None:
    world, seen = World(), []
    world.after(2.0, lambda: seen.append(1))
    assert world.run_until(lambda: bool(seen)) == 2.0
    with pytest.raises(Violation, match="a second one does not hold"):
        world.run_until(lambda: len(seen) > 1, wanted="a second one")
    world.after(50.0, lambda: seen.append(2))
    with pytest.raises(Violation, match="after 30 s"):
        world.run_until(lambda: len(seen) > 1)


def test_after_each_is_called_once_an_action() -> None:
    world, calls = World(), []
    world.after_each = lambda: calls.append(world.now)
    world.at(1.0, lambda: None)
    world.at(2.0, lambda: None)
    world.run_for(5.0)
    assert calls == [1.0, 2.0]


def test_the_journal_shows_the_last_events_of_those_concerned() -> None:
    journal = Journal()
    for number in range(100):
        journal.record(float(number), f"rank {number % 3}", f"event {number}", ["an effect"])
    shown = journal.last(["rank 1", "rank 2"], count=4)
    assert [entry.what for entry in shown] == ["event 94", "event 95", "event 97", "event 98"]
    assert "an effect" in shown[0].text()
    assert [entry.number for entry in journal.last([], count=2)] == [99, 100]


def test_the_digest_depends_on_every_event_and_its_time() -> None:
    digests = set()
    for when, process, what in ((1.0, "rank 0", "a"), (1.5, "rank 0", "a"), (1.0, "rank 1", "a"), (1.0, "rank 0", "b")):
        journal = Journal()
        journal.record(when, process, what)
        digests.add(journal.digest())
    assert len(digests) == 4


def test_streams_depend_on_seed_and_purpose_only() -> None:
    seeds = Seeds(5)
    faults = [seeds.stream("faults").random() for _ in range(2)]
    assert faults[0] == faults[1] == Seeds(5).stream("faults").random()
    assert len({faults[0], seeds.stream("workload").random(), Seeds(6).stream("faults").random()}) == 3


# Ticks -----------------------------------------------------------------------------------------


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


# Links -----------------------------------------------------------------------------------------


def link_to(seen: list[Any], delays: Delays = STEADY, encode: bool = True) -> tuple[World, Link]:
    world = World()
    decoder = codec.to_rank() if encode else None
    return world, Link(world, "a link", decoder, lambda message: seen.append((world.now, message)), delays, stream())


def stream() -> random.Random:
    return random.Random(1)


def waves(seen: list[Any]) -> list[int]:
    return [message.wave for _, message in seen]


def test_messages_arrive_whole_and_in_order_however_unequal_their_delays() -> None:
    seen: list[Any] = []
    world, link = link_to(seen, Delays(0.001, 2.0, 0.02, 0.01))
    for wave in range(200):
        link.send(StartDPWave(wave, 1))
        world.run_for(0.001)
    world.run_for(60.0)
    assert [message for _, message in seen] == [StartDPWave(wave, 1) for wave in range(200)]
    assert len({when for when, _ in seen}) > 10


def test_delays_are_around_the_median_and_rarely_long() -> None:
    delays, drawn = Delays(0.001, 0.5, 0.01, 2.0), stream()
    values = sorted(delays.draw(drawn) for _ in range(20_000))
    assert 0.0009 < values[10_000] < 0.0011
    assert values[int(20_000 * 0.98)] < 0.005
    assert 0.5 < values[-1] <= 2.0
    assert STEADY.draw(drawn) == 0.0005


def test_one_link_loses_what_it_is_told_to_and_no_other() -> None:
    seen: list[Any] = []
    world, link = link_to(seen)
    link.lose(StartDPWave, times=2)
    for message in (Admit(1, 1, 0), StartDPWave(1), StartDPWave(2), StartDPWave(3)):
        link.send(message)
    world.run_for(1.0)
    assert [message for _, message in seen] == [Admit(1, 1, 0), StartDPWave(3)]
    assert link.lost == 2
    assert [entry.process for entry in world.journal.last(["a link"])] == ["a link"] * 2


def test_a_share_is_lost_until_it_is_no_more() -> None:
    seen: list[Any] = []
    world, link = link_to(seen, encode=False)
    link.loss = 0.25
    for wave in range(1000):
        link.send(StartDPWave(wave))
    world.run_for(1.0)
    assert 700 < len(seen) < 800
    link.lose_no_more()
    link.send(StartDPWave(5))
    world.run_for(1.0)
    assert seen[-1][1] == StartDPWave(5)


def test_what_is_held_arrives_in_order_on_release() -> None:
    seen: list[Any] = []
    world, link = link_to(seen)
    link.hold()
    for wave in range(3):
        link.send(StartDPWave(wave))
    world.run_for(1.0)
    assert seen == []
    link.release()
    assert waves(seen) == [0, 1, 2]


def test_a_cut_takes_what_is_on_the_wire_and_a_later_send_arrives_once() -> None:
    seen: list[Any] = []
    world, link = link_to(seen)
    link.hold()
    link.send(StartDPWave(0))
    world.run_for(1.0)
    link.send(StartDPWave(1))
    link.cut()
    link.send(StartDPWave(2))
    link.release()
    world.run_for(1.0)
    link.send(StartDPWave(3))
    world.run_for(1.0)
    assert waves(seen) == [2, 3]


def test_a_closed_link_delivers_nothing() -> None:
    seen: list[Any] = []
    world, link = link_to(seen)
    link.send(StartDPWave(0))
    link.close()
    link.send(StartDPWave(1))
    world.run_for(1.0)
    assert seen == []
