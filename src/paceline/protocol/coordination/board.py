"""The coordinator's board of loads, and when to publish it.

Publishing has a deadline that no input delays: the first change after a quiet time goes out at once,
later ones one interval after the last view, and without any change a view goes out every few seconds.
In lockstep a view waits a few milliseconds at most for the ranks that have not reported the same step
yet, so that it holds one step's loads: the ranks report within microseconds of one another, and a view
of half a step shows differences between ranks that are not there. A rank reports what has changed, so one that was
waited for in vain, or was behind in an urgent view, is not waited for again until it reports.
"""

from __future__ import annotations

from paceline.protocol.binding.rooms import ANY, Amount
from paceline.protocol.load import Ledger
from paceline.protocol.messages import Load, Member, OnTheWire, RankReport, RankView, Send

HEARTBEAT_S = 4.0
STEP_WAIT_S = 0.003


class Board:
    """The latest report of every rank, and the sends that no report holds yet."""

    def __init__(self) -> None:
        self._reports: dict[int, RankReport] = {}
        self._ledgers: dict[tuple[int, int], dict[int, Ledger]] = {}
        # Ranks by the step of their reports: those that a view waits for. The question comes with every message
        # while a view is held, so it must not cost more with more ranks.
        self._at_step: dict[int, set[int]] = {}
        self._counted: list[Member] | None = None
        self._counted_ranks: set[int] = set()
        self.heard: dict[int, int] = {}
        """Per front-end, how many of its sends it has told of."""

    def report(self, report: RankReport) -> bool:
        """Take in a report. Returns whether it counts: a rank's step never goes back."""
        before = self._reports.get(report.rank)
        if before is not None and before.incarnation == report.incarnation and report.step < before.step:
            return False
        self._reports[report.rank] = report
        if before is None or before.incarnation != report.incarnation:
            self._counted = None
        elif self._counted is not None and report.rank in self._counted_ranks:
            self._count(report.rank, before.step, report.step)
        ledgers = self._ledgers.get((report.rank, report.incarnation))
        if ledgers:
            for front_end, taken in report.taken.items():
                ledger = ledgers.get(front_end)
                if ledger is not None:
                    ledger.reported(taken)
        return True

    def sent(self, front_end: int, send: Send) -> bool:
        """A front-end said that it sent a request to a rank. Returns whether it is on the wire: not reported yet."""
        ledgers = self._ledgers.setdefault((send.rank, send.incarnation), {})
        ledger = ledgers.get(front_end)
        if ledger is None:
            ledger = ledgers[front_end] = Ledger()
            report = self._reports.get(send.rank)
            if report is not None and report.incarnation == send.incarnation:
                ledger.reported(report.taken.get(front_end, 0))
        before = ledger.requests
        ledger.sent(send.number, send.tokens, send.tokens + send.answer_tokens)
        return ledger.requests > before

    def known(self, rank: int, incarnation: int) -> tuple[Load, Amount] | None:
        """The latest report of this life of a rank, and what is on the wire to it; None where it has not reported."""
        report = self._reports.get(rank)
        if report is None or report.incarnation != incarnation:
            return None
        wire = Amount()
        for ledger in self._ledgers.get((rank, incarnation), {}).values():
            if ledger.requests:
                wire.add(ledger.requests, ledger.tokens, ledger.kv)
        return report.load, wire

    def idle(self, rank: int, incarnation: int | None) -> bool:
        """Whether this life of a rank has said that it has nothing to do, and nothing is on the wire to it. None is."""
        if incarnation is None:
            return True
        known = self.known(rank, incarnation)
        return known is not None and not known[0].waiting + known[0].running + known[1].requests

    def forget_rank(self, rank: int) -> None:
        """The rank is gone or has begun a new life."""
        self._reports.pop(rank, None)
        self._counted = None
        self._ledgers = {life: ledgers for life, ledgers in self._ledgers.items() if life[0] != rank}

    def forget_front_end(self, front_end: int) -> None:
        """The front-end is gone; what it had on the wire is no longer known."""
        for ledgers in self._ledgers.values():
            ledgers.pop(front_end, None)
        self.heard.pop(front_end, None)

    def views(self, members: list[Member]) -> list[RankView]:
        """The published view of the ready ranks that have reported, in order of their numbers.

        A rank that has not, to this coordinator, is left out: an empty load in its place would make front-ends
        forget what the coordinator before had told them.
        """
        on_the_wire: dict[int, list[OnTheWire]] = {}
        for (rank, _), ledgers in self._ledgers.items():
            for front_end, ledger in ledgers.items():
                if ledger.requests:
                    entry = OnTheWire(front_end, ledger.last, ledger.requests, min(ledger.tokens, ANY))
                    on_the_wire.setdefault(rank, []).append(entry)
        views: list[RankView] = []
        for member in members:
            report = self._reports.get(member.rank)
            if report is not None and report.incarnation == member.incarnation:
                wire = on_the_wire.get(member.rank, [])
                views.append(RankView(member.rank, member.incarnation, report.step, report.load, report.taken, wire))
        return views

    def one_step(self, members: list[Member]) -> bool:
        """Whether all ready ranks have reported the same step, but for those that the last view passed over."""
        if members is not self._counted:
            self._counted = members
            self._counted_ranks = {member.rank for member in members}
            self._at_step = {}
            for member in members:
                if member.rank in self._reports:
                    self._at_step.setdefault(self._reports[member.rank].step, set()).add(member.rank)
        return len(self._at_step) <= 1

    def pass_over(self) -> None:
        """A view goes out: whoever is behind in it is not waited for until it reports again."""
        if len(self._at_step) > 1:
            last = max(self._at_step)
            self._at_step = {last: self._at_step[last]}

    def _count(self, rank: int, before: int, step: int) -> None:
        there = self._at_step.get(before)
        if there is not None:
            there.discard(rank)
            if not there:
                del self._at_step[before]
        self._at_step.setdefault(step, set()).add(rank)


class PublishClock:
    """When the next view is due."""

    def __init__(self, interval_s: float, step_wait_s: float = STEP_WAIT_S) -> None:
        self._interval_s = interval_s
        self._step_wait_s = step_wait_s
        self._last = float("-inf")
        self._changed_at: float | None = None
        self._hold_until: float | None = None

    def changed(self, now: float) -> None:
        """Something that a view shows has changed."""
        if self._changed_at is None:
            self._changed_at = now

    def published(self, now: float) -> None:
        """A view went out."""
        self._last = now
        self._changed_at = None
        self._hold_until = None

    def due(self, now: float) -> bool:
        """Whether a view may go out now."""
        return now >= self._plain_due()

    def hold(self, now: float) -> bool:
        """Whether a view that is due but holds half a step waits for the other half."""
        if self._changed_at is None:
            return False
        if self._hold_until is None:
            self._hold_until = now + self._step_wait_s
        return now < self._hold_until

    def deadline(self) -> float:
        """When to ask again."""
        return self._hold_until if self._hold_until is not None else self._plain_due()

    def _plain_due(self) -> float:
        if self._changed_at is None:
            return self._last + HEARTBEAT_S
        return max(self._changed_at, self._last + self._interval_s)
