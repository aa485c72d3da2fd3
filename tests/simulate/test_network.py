"""Links: order, delay, loss to one receiver, holding and cutting."""

from __future__ import annotations

import random
from typing import Any

from paceline.core import codec
from paceline.core.messages import Admit, StartDPWave
from paceline.simulate.network import STEADY, Delays, Link
from paceline.simulate.world import World


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
    assert [entry.party for entry in world.journal.last(["a link"])] == ["a link"] * 2


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
