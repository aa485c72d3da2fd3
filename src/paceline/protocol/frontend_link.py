"""One rank as a front-end knows it: its report, what is on the wire, and how routing is told of both."""

from __future__ import annotations

from paceline.protocol.load import Ledger, believed
from paceline.protocol.messages import Load, RankView
from paceline.protocol.routing import Candidate


class RankLink:
    """One life of one rank, as this front-end knows it."""

    __slots__ = (
        "in_flight",
        "incarnation",
        "ledger",
        "load",
        "rank",
        "step",
        "unheard",
        "wire_requests",
        "wire_tokens",
    )  # fmt: skip

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.load = Load()
        self.step = -1
        self.ledger = Ledger()
        self.in_flight: set[int] = set()
        # What the other front-ends have on the wire, by the latest view.
        self.wire_requests = 0
        self.wire_tokens = 0
        # This front-end's sends that the coordinator had not been told of when it made the latest view.
        self.unheard = Ledger()

    def believed(self) -> Load:
        """What the rank has, plus what is on the wire from this front-end."""
        return believed(self.load, self.ledger.requests, self.ledger.tokens)

    def candidate(self) -> Candidate:
        load, ledger = self.load, self.ledger
        return Candidate(
            self.rank,
            load.waiting + load.running + ledger.requests + self.wire_requests,
            load.prefill_tokens + ledger.tokens + self.wire_tokens,
            len(self.in_flight),
            self.unheard.requests,
            self.unheard.tokens,
            load.finished,
        )

    def take_view(self, entry: RankView, front_end: int) -> None:
        """Take in what a view says of this rank; `front_end`: whose link this is. An older step changes nothing."""
        if entry.step < self.step:
            return
        self.step = entry.step
        self.load = entry.load
        self.ledger.reported(entry.taken.get(front_end, 0))
        self.wire_requests = sum(wire.requests for wire in entry.on_the_wire if wire.front_end != front_end)
        self.wire_tokens = sum(wire.tokens for wire in entry.on_the_wire if wire.front_end != front_end)
