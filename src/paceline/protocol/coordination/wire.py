"""What is on the wire to one life of a rank: a ledger for each front-end, and the sum of all, kept beside them.

The sum is asked for with every report while somebody waits; with many front-ends, most of whom have nothing under way,
adding up would cost more than all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

from paceline.protocol.binding.rooms import Amount
from paceline.protocol.load import Ledger
from paceline.protocol.messages import Send


class Wire:
    """The sends to one life of a rank that its reports do not hold yet."""

    __slots__ = ("ledgers", "total")

    def __init__(self) -> None:
        self.ledgers: dict[int, Ledger] = {}
        """By front-end."""
        self.total = Amount()

    def sent(self, front_end: int, send: Send, taken: Mapping[int, int]) -> bool:
        """A front-end has sent something. `taken`: by the rank's latest report. Returns whether it is under way."""
        ledger = self.ledgers.get(front_end)
        if ledger is None:
            ledger = self.ledgers[front_end] = Ledger()
            ledger.reported(taken.get(front_end, 0))
        requests, tokens, kv = ledger.requests, ledger.tokens, ledger.kv
        ledger.sent(send.number, send.tokens, send.tokens + send.answer_tokens)
        self.total.add(ledger.requests - requests, ledger.tokens - tokens, ledger.kv - kv)
        return ledger.requests > requests

    def reported(self, taken: Mapping[int, int]) -> None:
        """The rank has taken in so many sends of each front-end."""
        ledgers = self.ledgers
        for front_end, number in taken.items():
            ledger = ledgers.get(front_end)
            if ledger is not None and number > ledger.taken:
                requests, tokens, kv = ledger.requests, ledger.tokens, ledger.kv
                ledger.reported(number)
                self.total.add(ledger.requests - requests, ledger.tokens - tokens, ledger.kv - kv)

    def forget(self, front_end: int) -> None:
        """The front-end is gone; what it had under way is no longer known."""
        ledger = self.ledgers.pop(front_end, None)
        if ledger is not None:
            self.total.add(-ledger.requests, -ledger.tokens, -ledger.kv)
