"""One rank as a front-end knows it: its report, what is on the wire, and how routing is told of both."""

from __future__ import annotations

from paceline.protocol.load import Ledger, believed
from paceline.protocol.messages import Load, RankView
from paceline.protocol.routing.candidates import Candidate


class RankLink:
    """One life of one rank, as this front-end knows it.

    `candidate`, and `waiting`, how many requests wait for a slot there, are as of the last `refresh`.
    """

    __slots__ = (
        "candidate",
        "in_flight",
        "incarnation",
        "ledger",
        "left",
        "load",
        "rank",
        "step",
        "unheard",
        "waiting",
        "wire_requests",
        "wire_tokens",
    )  # fmt: skip

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.load = Load()
        self.step = -1
        self.ledger = Ledger()
        # By the ids that the rank knows: those that are under way, and those that went elsewhere while it was away.
        self.in_flight: set[int] = set()
        self.left: list[int] = []
        # What the other front-ends have on the wire, by the latest view.
        self.wire_requests = 0
        self.wire_tokens = 0
        # This front-end's sends that the coordinator had not been told of when it made the latest view.
        self.unheard = Ledger()
        self.candidate = Candidate(rank, 0, 0, 0, 0, 0, 0, incarnation)
        self.waiting = 0

    def believed(self) -> Load:
        """What the rank has, plus what is on the wire from this front-end."""
        return believed(self.load, self.ledger.requests, self.ledger.tokens)

    def refresh(self) -> int:
        """Bring `candidate` and `waiting` up to date; returns by how much `waiting` grew."""
        load, ledger, candidate = self.load, self.ledger, self.candidate
        candidate.requests = load.waiting + load.running + ledger.requests + self.wire_requests
        candidate.prefill_tokens = load.prefill_tokens + ledger.tokens + self.wire_tokens
        candidate.in_flight = len(self.in_flight)
        candidate.since_view_requests = self.unheard.requests
        candidate.since_view_tokens = self.unheard.tokens
        candidate.finished = load.finished
        # As `waiting_for_a_slot(self.believed())`, without making a Load of it.
        free = load.slots - load.running
        waiting = load.waiting + ledger.requests - (free if free > 0 else 0)
        before, self.waiting = self.waiting, waiting if waiting > 0 else 0
        return self.waiting - before

    def take_view(self, entry: RankView, front_end: int) -> None:
        """Take in what a view says of this rank; `front_end`: whose link this is. An older step changes nothing."""
        if entry.step < self.step:
            return
        self.step = entry.step
        self.load = entry.load
        self.ledger.reported(entry.taken.get(front_end, 0))
        self.wire_requests = sum(wire.requests for wire in entry.on_the_wire if wire.front_end != front_end)
        self.wire_tokens = sum(wire.tokens for wire in entry.on_the_wire if wire.front_end != front_end)
