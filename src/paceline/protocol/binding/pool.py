"""One queue, for the front-ends that balance over the same ranks, and the rooms that must be looked at anew for it."""

from __future__ import annotations

from collections.abc import Set

from paceline.protocol.binding.broker import Broker
from paceline.protocol.binding.shares import ShareBook
from paceline.protocol.coordination.board import Board
from paceline.protocol.coordination.membership import Membership


class Pool:
    """The front-ends that balance over the same ranks, None for all, with their queue."""

    def __init__(self, ranks: frozenset[int] | None, without: Set[str]) -> None:
        self.ranks = ranks
        self.broker = Broker(without)
        self.shares = ShareBook()
        self.marked: set[int] = set()
        """Ranks whose rooms are to be reckoned when that is wanted."""
        self.recalled: float | None = None
        """Since when all shares have been recalled; None where they are not."""
        self.stale = False
        """Whether something may start since the queue was last looked through: a send alone makes no room."""

    def look(self, board: Board, membership: Membership) -> None:
        """Reckon the rooms of the ranks that are marked."""
        rooms = self.broker.rooms
        for rank in self.marked:
            report = board.reports.get(rank)
            if report is None or report.incarnation != membership.ready_life(rank):
                continue
            rooms.heard(rank, report.incarnation, report.load, board.on_the_wire(rank, report.incarnation))
        self.marked.clear()
