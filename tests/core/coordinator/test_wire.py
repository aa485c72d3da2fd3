"""What is on the wire to a rank: the sum is the sum of the ledgers, whatever is told in whatever order."""

from __future__ import annotations

import random

from paceline.core.coordinator.load_table import Wire
from paceline.core.dispatch.capacity import Amount
from paceline.core.messages import Send


def test_a_send_is_on_the_wire_until_it_is_reported() -> None:
    wire = Wire()
    assert wire.sent(100, Send(0, 10, 1, 5, 7), {})
    assert wire.total == Amount(1, 5, 12)
    wire.reported({100: 1})
    assert wire.total == Amount()
    assert not wire.sent(100, Send(0, 10, 1, 5, 7), {100: 1})


def test_what_the_rank_had_taken_in_before_anything_was_told_is_not() -> None:
    wire = Wire()
    assert not wire.sent(100, Send(0, 10, 3, 5, 7), {100: 3})
    assert wire.sent(100, Send(0, 10, 4, 5, 7), {100: 3})
    assert wire.total == Amount(1, 5, 12)


def test_the_sum_is_the_sum_of_the_ledgers() -> None:
    chance = random.Random(3)
    wire, numbers = Wire(), dict.fromkeys(range(5), 0)
    for _ in range(3000):
        front_end = chance.randrange(5)
        what = chance.random()
        if what < 0.5:
            numbers[front_end] += chance.choice([0, 1, 1, 2])
            wire.sent(front_end, Send(0, 10, numbers[front_end], chance.randrange(9), chance.randrange(9)), {})
        elif what < 0.97:
            wire.reported({one: chance.randint(0, number) for one, number in numbers.items()})
        else:
            wire.forget(front_end)
        ledgers = wire.ledgers.values()
        assert wire.total == Amount(
            sum(one.requests for one in ledgers), sum(one.tokens for one in ledgers), sum(one.kv for one in ledgers)
        )
