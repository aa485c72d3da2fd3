"""What a rank says it holds arrives whole, whatever is lost on the way."""

from __future__ import annotations

import random

import pytest

from paceline.core.blocks import unpacked
from paceline.core.dispatch.held import HeldNumbers
from paceline.core.load import Load
from paceline.core.messages import MAX_NAMES, Admit, KvAsk, KvDelta
from paceline.core.rank.events import CoordinatorSaid, KvChange, Loaded, ToCoordinator, Turn
from paceline.core.rank.kv import KvTeller
from paceline.core.rank.machine import Rank


class Listener:
    """Believes what applies; `asks` are answered as the test likes."""

    def __init__(self) -> None:
        self.numbers = HeldNumbers()
        self.held: set[int] = set()

    def hear(self, delta: KvDelta, now: float) -> None:
        if self.numbers.take(delta, now):
            self.held = set() if delta.whole else self.held
            self.held |= set(unpacked(delta.stored))
            self.held -= set(unpacked(delta.removed))


@pytest.mark.parametrize("seed", range(20))
def test_after_any_loss_the_listener_knows_what_is_held(seed: int) -> None:
    chance, teller, listener = random.Random(seed), KvTeller(3, 30), Listener()
    held: set[int] = set()
    now = 0.0
    for step in range(300):
        now += 0.1
        last = step >= 280
        new = {chance.randrange(1000) for _ in range(chance.randrange(4))} - held
        gone = {one for one in held if chance.random() < 0.02}
        held = (held | new) - gone
        if new or gone:
            teller.changed(KvChange(sorted(new), sorted(gone)))
        if not last and chance.random() < 0.02:
            listener = Listener()
            listener.numbers.hello(3, 30, teller.number, now)
        for delta in teller.deltas():
            if last or chance.random() < 0.8:
                listener.hear(delta, now)
        for ask in listener.numbers.asks(now):
            assert (ask.rank, ask.incarnation) == (3, 30)
            if last or chance.random() < 0.5:
                teller.ask()
        if step == 280:
            # The last that was lost may have been the last that there was: a hello says its number.
            listener.numbers.hello(3, 30, teller.number, now)
    assert listener.held == held
    assert listener.numbers.due is None


def test_what_is_too_much_for_one_message_comes_in_several() -> None:
    teller, listener = KvTeller(0, 1), Listener()
    names = range(3 * MAX_NAMES - 1)
    teller.changed(KvChange(names))
    deltas = list(teller.deltas())
    assert [(one.number, one.whole, len(unpacked(one.stored))) for one in deltas] == [
        (1, True, MAX_NAMES), (2, False, MAX_NAMES), (3, False, MAX_NAMES - 1),
    ]  # fmt: skip
    for one in deltas:
        listener.hear(one, 0.0)
    assert listener.held == set(names)


def test_another_life_holds_what_it_says_and_no_more() -> None:
    listener = Listener()
    for delta in (KvDelta(0, 1, 1, b"a" * 8), KvDelta(0, 2, 1, b"b" * 8, whole=True)):
        listener.hear(delta, 0.0)
    assert listener.held == set(unpacked(b"b" * 8))


def test_a_rank_says_what_it_holds_once_it_is_ready_and_all_of_it_when_it_is_asked() -> None:
    rank = Rank(0, 1, "tcp://a:1")
    rank.handle(Loaded(), 0.0)
    assert not said(rank, Turn(Load(), False, KvChange([5])))
    rank.handle(CoordinatorSaid(Admit(0, 1, 0)), 0.0)
    assert [(one.number, list(unpacked(one.stored))) for one in said(rank, Turn(Load(), False))] == [(1, [5])]
    assert not said(rank, Turn(Load(), False))
    rank.handle(CoordinatorSaid(KvAsk(0, 2)), 0.0)
    assert not said(rank, Turn(Load(), False)), "another life is asked"
    (delta,) = said(rank, Turn(Load(), False, KvChange([6], [5])))
    assert (list(unpacked(delta.stored)), list(unpacked(delta.removed)), delta.whole) == ([6], [5], False)
    rank.handle(CoordinatorSaid(KvAsk(0, 1)), 0.0)
    (delta,) = said(rank, Turn(Load(), False))
    assert (delta.number, list(unpacked(delta.stored)), delta.whole) == (3, [6], True)


def said(rank: Rank, event: Turn) -> list[KvDelta]:
    effects = rank.handle(event, 0.0)
    return [
        one.message for one in effects if isinstance(one, ToCoordinator) and isinstance(one.message, KvDelta)
    ]  # fmt: skip
