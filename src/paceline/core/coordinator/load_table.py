"""The coordinator's load table, and what it publishes of it: who is there, every rank's load, the wave, the pause.

Publishing has a deadline that no input delays: the first change after a quiet time goes out at once,
later ones one interval after the last view, and without any change a view goes out every few seconds.
In lockstep a view holds one step's loads where it can: the ranks report within microseconds of one another,
and a view of half a step shows differences between ranks that are not there. So from a few milliseconds
before its time on it goes out as soon as all are at one step, and else at its time. Where the first change comes late,
or after a quiet time, the view waits a few milliseconds at most. A rank reports what has changed, so one that was
waited for in vain, or was behind in an urgent view, is not waited for again until it reports.

Of what is on the wire to one life of a rank there is an accounting for each front-end, and the sum of all is kept
beside them: it is asked for with every report while somebody waits, and most of many front-ends have nothing under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from paceline.core.binding import Send
from paceline.core.coordinator.events import Effect, ToFrontends
from paceline.core.coordinator.membership import Membership
from paceline.core.dispatch.capacity import ANY, Amount
from paceline.core.load import Accounting
from paceline.core.messages import (
    PROTOCOL_VERSION,
    LoadView,
    Member,
    Members,
    OnTheWire,
    RankReport,
    RankView,
    Scaling,
    Stall,
    SuspensionState,
)

if TYPE_CHECKING:
    from paceline.core.dispatch.dispatcher import Dispatcher


class UnackedSends:
    """The sends to one life of a rank that its reports do not hold yet."""

    __slots__ = ("accountings", "total")

    def __init__(self) -> None:
        self.accountings: dict[int, Accounting] = {}
        """By front-end."""
        self.total = Amount()

    def sent(self, frontend: int, send: Send, taken: Mapping[int, int]) -> bool:
        """A front-end has sent something. `taken`: by the rank's latest report. Returns whether it is under way."""
        accounting = self.accountings.get(frontend)
        if accounting is None:
            accounting = self.accountings[frontend] = Accounting()
            accounting.reported(taken.get(frontend, 0))
        requests, tokens, kv = accounting.requests, accounting.tokens, accounting.kv
        accounting.sent(send.number, send.tokens, send.tokens + send.held + send.answer_tokens)
        self.total.add(accounting.requests - requests, accounting.tokens - tokens, accounting.kv - kv)
        return accounting.requests > requests

    def reported(self, taken: Mapping[int, int]) -> None:
        """The rank has taken in so many sends of each front-end."""
        accountings = self.accountings
        for frontend, number in taken.items():
            accounting = accountings.get(frontend)
            if accounting is not None and number > accounting.taken:
                requests, tokens, kv = accounting.requests, accounting.tokens, accounting.kv
                accounting.reported(number)
                self.total.add(accounting.requests - requests, accounting.tokens - tokens, accounting.kv - kv)

    def forget(self, frontend: int) -> None:
        """The front-end is gone; what it had under way is no longer known."""
        accounting = self.accountings.pop(frontend, None)
        if accounting is not None:
            self.total.add(-accounting.requests, -accounting.tokens, -accounting.kv)


HEARTBEAT_S = 4.0
STEP_WAIT_S = 0.003


class LoadTable:
    """The latest report of every rank, and the sends that no report holds yet."""

    def __init__(self) -> None:
        self.reports: dict[int, RankReport] = {}
        """The latest of each rank that has reported."""
        # By rank and incarnation: a send may be told of before its rank has said anything.
        self._unacked: dict[tuple[int, int], UnackedSends] = {}
        # Ranks by the step of their reports: those that a view waits for. The question comes with every message
        # while a view is held, so it must not cost more with more ranks.
        self._at_step: dict[int, set[int]] = {}
        self._counted: list[Member] | None = None
        self._counted_ranks: set[int] = set()
        self.heard: dict[int, int] = {}
        """Per front-end, how many of its sends it has told of."""

    def report(self, report: RankReport) -> bool:
        """Take in a report. Returns whether it counts: a rank's step never goes back."""
        before = self.reports.get(report.rank)
        if before is not None and before.incarnation == report.incarnation and report.step < before.step:
            return False
        self.reports[report.rank] = report
        if before is None or before.incarnation != report.incarnation:
            self._counted = None
        elif self._counted is not None and report.rank in self._counted_ranks:
            self._count(report.rank, before.step, report.step)
        unacked = self._unacked.get((report.rank, report.incarnation))
        if unacked is not None:
            unacked.reported(report.taken)
        return True

    def heard_of(self, frontend: int, told: int) -> None:
        """A front-end has told of so many of its sends."""
        if told > self.heard.get(frontend, 0):
            self.heard[frontend] = told

    def sent(self, frontend: int, send: Send) -> bool:
        """A front-end said that it sent a request to a rank. Returns whether it is on the wire: not reported yet."""
        unacked = self._unacked_of(send.rank, send.incarnation)
        report = self.reports.get(send.rank)
        current = report is not None and report.incarnation == send.incarnation
        return unacked.sent(frontend, send, report.taken if report is not None and current else {})

    def on_the_wire(self, rank: int, incarnation: int) -> Amount:
        """What is on the wire to this life of a rank, now and later, until it is forgotten."""
        return self._unacked_of(rank, incarnation).total

    def _unacked_of(self, rank: int, incarnation: int) -> UnackedSends:
        unacked = self._unacked.get((rank, incarnation))
        if unacked is None:
            unacked = self._unacked[rank, incarnation] = UnackedSends()
        return unacked

    def idle(self, rank: int, incarnation: int | None) -> bool:
        """Whether this life of a rank has said that it has nothing to do, and nothing is on the wire to it. None is."""
        if incarnation is None:
            return True
        report = self.reports.get(rank)
        if report is None or report.incarnation != incarnation:
            return False
        return not report.load.waiting + report.load.running + self.on_the_wire(rank, incarnation).requests

    def forget_rank(self, rank: int) -> None:
        """The rank is gone or has begun a new life."""
        self.reports.pop(rank, None)
        self._counted = None
        self._unacked = {life: unacked for life, unacked in self._unacked.items() if life[0] != rank}

    def forget_frontend(self, frontend: int) -> None:
        """The front-end is gone; what it had on the wire is no longer known."""
        for unacked in self._unacked.values():
            unacked.forget(frontend)
        self.heard.pop(frontend, None)

    def views(self, members: list[Member]) -> list[RankView]:
        """The published view of the ready ranks that have reported, in order of their numbers.

        A rank that has not, to this coordinator, is left out: an empty load in its place would make front-ends
        forget what the coordinator before had told them.
        """
        on_the_wire: dict[int, list[OnTheWire]] = {}
        for (rank, _), to_life in self._unacked.items():
            if not to_life.total.requests:
                continue
            for frontend, accounting in to_life.accountings.items():
                if accounting.requests:
                    entry = OnTheWire(frontend, accounting.last, accounting.requests, min(accounting.tokens, ANY))
                    on_the_wire.setdefault(rank, []).append(entry)
        views: list[RankView] = []
        for member in members:
            report = self.reports.get(member.rank)
            if report is not None and report.incarnation == member.incarnation:
                unacked = on_the_wire.get(member.rank, [])
                views.append(RankView(member.rank, member.incarnation, report.step, report.load, report.taken, unacked))
        return views

    def one_step(self, members: list[Member]) -> bool:
        """Whether all ready ranks have reported the same step, but for those that the last view passed over."""
        if members is not self._counted:
            self._counted = members
            self._counted_ranks = {member.rank for member in members}
            self._at_step = {}
            for member in members:
                if member.rank in self.reports:
                    self._at_step.setdefault(self.reports[member.rank].step, set()).add(member.rank)
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
    """When the next view is due.

    `interval_s`: least time between two, on average. `step_wait_s`: how long before its time a view may go out
    because all ranks are at one step, and how long after the first change it waits until they are; 0 for neither.
    """

    def __init__(self, interval_s: float, step_wait_s: float = STEP_WAIT_S) -> None:
        self._interval_s = interval_s
        self._step_wait_s = step_wait_s
        self._early_s = min(step_wait_s, interval_s / 2)
        self._last = float("-inf")
        self._changed_at: float | None = None
        self._hold_until: float | None = None

    def changed(self, now: float) -> None:
        if self._changed_at is None:
            self._changed_at = now

    def published(self, now: float) -> None:
        # What goes out early makes the next one no earlier: with the steps of all ranks it would always be early.
        on_time = self._last + self._interval_s
        self._last = on_time if on_time - self._early_s <= now < on_time else now
        self._changed_at = None
        self._hold_until = None

    def due(self, now: float) -> bool:
        return now >= self._plain_due()

    def hold(self, now: float) -> bool:
        """Whether a view that may go out but holds half a step waits for the other half.

        It does until its time, so that the wait makes no interval longer, and after a change that came later for the
        whole wait.
        """
        if self._changed_at is None:
            return False
        self._hold_until = max(self._last + self._interval_s, self._changed_at + self._step_wait_s)
        return now < self._hold_until

    def deadline(self) -> float:
        return self._hold_until if self._hold_until is not None else self._plain_due()

    def _plain_due(self) -> float:
        if self._changed_at is None:
            return self._last + HEARTBEAT_S
        return max(self._changed_at, self._last + self._interval_s - self._early_s)


class SnapshotHeader(Struct, frozen=True):
    """What a view and Members say besides loads and ranks; `free`: whether work may be started."""

    wave: int
    running: bool
    suspension: SuspensionState
    free: bool
    scaling: Scaling
    epoch: int


class Publisher:
    """The views of one coordinator. `with_loads`: False in external mode. `step_wait_s`: in lockstep, how long a view
    waits for ranks that have not reported the same step; None where no view waits.
    """

    INCIDENTAL = frozenset({"views"})

    def __init__(
        self, identity: int, interval_s: float, *, with_loads: bool, step_wait_s: float | None = STEP_WAIT_S
    ) -> None:
        self.views = 0
        """Published so far."""
        self._identity = identity
        self._with_loads = with_loads
        self._one_step = step_wait_s is not None
        self._clock = PublishClock(interval_s, step_wait_s or 0.0)
        self._members_due = True
        self._members_sent = float("-inf")
        self._said = (0, False, 0, True)

    @property
    def deadline(self) -> float:
        return self._clock.deadline()

    def changed(self, now: float) -> None:
        self._clock.changed(now)

    def loads_changed(self, now: float) -> None:
        if self._with_loads:
            self._clock.changed(now)

    def members_changed(self, now: float) -> None:
        """Somebody has come or gone, or wants to know who is there."""
        self._members_due = True
        self._clock.changed(now)

    def ripe(self, load_table: LoadTable, membership: Membership, now: float) -> bool:
        """Whether a view that waits for one step is due, and all ranks have reported it."""
        return self._one_step and self._clock.due(now) and load_table.one_step(membership.members())

    def publish(
        self, header: SnapshotHeader, load_table: LoadTable, membership: Membership, stalls: Sequence[Stall],
        dispatcher: Dispatcher, now: float,
    ) -> list[Effect]:  # fmt: skip
        state = (header.wave, header.running, header.suspension.number, header.suspension.settled)
        # A change of the wave or of running is what front-ends act on: it does not wait.
        if not self._members_due and state == self._said:
            if not self._clock.due(now):
                return []
            if self._one_step and not load_table.one_step(membership.members()) and self._clock.hold(now):
                return []
        effects: list[Effect] = []
        members = membership.members()
        if self._members_due or now >= self._members_sent + HEARTBEAT_S:
            self._members_sent = now
            missing, ended = membership.missing(), membership.ended()
            known = Members(
                PROTOCOL_VERSION, self._identity, header.wave, header.running, members, missing, ended, list(stalls),
                header.scaling, header.epoch,
            )  # fmt: skip
            effects.append(ToFrontends(known))
        self._members_due = False
        self._said = state
        self.views += 1
        ranks = load_table.views(members) if self._with_loads else None
        load_table.pass_over()
        heard = dict(load_table.heard) if self._with_loads else {}
        # Without loads nobody knows where there is room.
        shares = dispatcher.shares(load_table, membership, header.free) if self._with_loads else None
        view = LoadView(
            self._identity, self.views, header.wave, header.running, ranks, heard, header.suspension, shares,
            dispatcher.queued, dispatcher.queues(),
        )  # fmt: skip
        effects.append(ToFrontends(view))
        self._clock.published(now)
        return effects
