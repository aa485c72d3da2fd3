"""What is on the wire to a rank: the sum is the sum of the ledgers, whatever is told in whatever order."""

from __future__ import annotations

import random

from paceline.core.coordinator.load_table import UnackedSends
from paceline.core.dispatch.capacity import Amount
from paceline.core.messages import Send


def test_a_send_is_on_the_wire_until_it_is_reported() -> None:
    unacked = UnackedSends()
    assert unacked.sent(100, Send(0, 10, 1, 5, 7), {})
    assert unacked.total == Amount(1, 5, 12)
    unacked.reported({100: 1})
    assert unacked.total == Amount()
    assert not unacked.sent(100, Send(0, 10, 1, 5, 7), {100: 1})


def test_what_the_rank_had_taken_in_before_anything_was_told_is_not() -> None:
    unacked = UnackedSends()
    assert not unacked.sent(100, Send(0, 10, 3, 5, 7), {100: 3})
    assert unacked.sent(100, Send(0, 10, 4, 5, 7), {100: 3})
    assert unacked.total == Amount(1, 5, 12)


def test_the_sum_is_the_sum_of_the_ledgers() -> None:
    chance = random.Random(3)
    unacked, numbers = UnackedSends(), dict.fromkeys(range(5), 0)
    for _ in range(3000):
        frontend = chance.randrange(5)
        what = chance.random()
        if what < 0.5:
            numbers[frontend] += chance.choice([0, 1, 1, 2])
            unacked.sent(frontend, Send(0, 10, numbers[frontend], chance.randrange(9), chance.randrange(9)), {})
        elif what < 0.97:
            unacked.reported({one: chance.randint(0, number) for one, number in numbers.items()})
        else:
            unacked.forget(frontend)
        accountings = unacked.accountings.values()
        assert unacked.total == Amount(
            sum(one.requests for one in accountings),
            sum(one.tokens for one in accountings),
            sum(one.kv for one in accountings),
        )
