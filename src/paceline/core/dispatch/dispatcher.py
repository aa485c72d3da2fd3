"""The coordinator's side of late binding: whose queue, what is repeated, which capacities must be looked at anew.

Front-ends that balance over the same ranks share one queue: all of them in internal mode, each node's in hybrid mode.
Nothing is looked at for its own sake: while nobody waits, a report or a notice only marks its rank, and the rank's
capacity is reckoned when somebody waits or a view goes out. While somebody does, a report that makes no capacity ends
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from paceline.core.binding import Ask, Grant, Grants, ReturnShares, Send, Shares, Withdraw
from paceline.core.blocks import unpacked
from paceline.core.coordinator.load_table import LoadTable
from paceline.core.coordinator.membership import Membership
from paceline.core.dispatch.credits import QueueGroup
from paceline.core.dispatch.held import HeldNumbers
from paceline.core.dispatch.line import Entry
from paceline.core.messages import FrontendHello, KvDelta, RankReport

REPEAT_S = 0.1
"""While any descriptor is there, front-ends hear of the queue this often at least, and each unconfirmed grant again."""

LONGEST_MS = 2**53 - 1
"""As a front-end may say of what has waited there."""

UNANSWERED_S = 1.0
"""A front-end that has not answered a grant, or a revoke of its credits, for so long is not waited for."""


class Dispatcher:
    """All queues of one coordinator. `without`: rules (`rules.py`) left out."""

    def __init__(self, identity: int, without: Set[str] = frozenset()) -> None:
        self._identity = identity
        self._without = without
        self._repeats = "grants-repeated" not in without
        self._groups: dict[frozenset[int] | None, QueueGroup] = {}
        self._group_of: dict[int, QueueGroup] = {}
        self._told: dict[int, int] = {}
        self.held = HeldNumbers()
        self._due: float | None = None
        self._revoking = False
        # `grants` is asked after every event, and most change nothing for those that wait. Whether, since it was last
        # asked, something may start that could not; and whether somebody waits, or holds credits, who did not, or not
        # any more.
        self._stirred = False
        self._changed = False
        self._waited = False
        self._limit = 65536
        self._emptied = False

    @property
    def due(self) -> float | None:
        """When front-ends must hear of the queue again, or None where it is empty."""
        return self._due

    def expire(self, now: float) -> None:
        """Front-ends are to hear of the queue again, whatever the time was."""
        self._due = now

    @property
    def queued(self) -> int:
        return sum(len(group.queue.queued) for group in self._groups.values())

    @property
    def granted(self) -> int:
        """Grants that nobody has confirmed yet."""
        return sum(len(group.queue.granted) for group in self._groups.values())

    def queues(self) -> dict[int, int]:
        """By front-end, how many wait in its queue; nothing where there is one queue only."""
        groups = self._group_of.items() if len(self._groups) > 1 else ()
        return {frontend: len(group.queue.queued) for frontend, group in groups}

    def kv(self, delta: KvDelta, now: float) -> None:
        """A rank has said what it holds."""
        if self.held.take(delta, now):
            for group in self._groups_of(delta.rank):
                group.queue.homes.told(delta)

    def _groups_of(self, rank: int) -> list[QueueGroup]:
        """Those that its work may come from."""
        groups = self._groups.values() if rank < self._limit else ()
        return [group for group in groups if group.ranks is None or rank in group.ranks]

    def descriptors(self) -> Iterable[tuple[int, int]]:
        """Whose requests wait or are granted, by front-end and request."""
        for group in self._groups.values():
            yield from group.queue.queued
            yield from group.queue.granted

    # Front-ends ---------------------------------------------------------------------------------

    def hello(self, hello: FrontendHello, heard: Iterable[int]) -> None:
        """A front-end is there. `heard`: the ranks of which anything is known."""
        frontend = hello.frontend
        ranks = None if hello.ranks is None else frozenset(hello.ranks)
        group = self._group_of.get(frontend)
        if group is not None and (not hello.brokered or group.ranks != ranks):
            self.forget_frontend(frontend)
            group = None
        if not hello.brokered or group is not None:
            return
        group = self._groups.get(ranks)
        if group is None:
            group = self._groups[ranks] = QueueGroup(ranks, self._without)
            group.marked = {rank for rank in heard if rank < self._limit and (ranks is None or rank in ranks)}
            self.held.all_again()
        self._group_of[frontend] = group
        self._told.setdefault(frontend, 0)
        group.shares.join(frontend)

    def said(self, message: Ask | Withdraw | ReturnShares, now: float) -> None:
        """A front-end that has not said hello says it before it asks again."""
        group = self._group_of.get(message.frontend)
        if group is None:
            return
        if isinstance(message, Ask):
            self._ask(group, message, now)
            return
        self._stirred = self._changed = group.stale = True
        if isinstance(message, Withdraw):
            self._count(message.frontend, message.told)
            for request in message.requests:
                group.queue.drop(message.frontend, request)
        else:
            group.shares.returned(message.frontend, message.edition, group.queue.capacities)

    def _ask(self, group: QueueGroup, ask: Ask, now: float) -> None:
        frontend, queue = ask.frontend, group.queue
        if group.shares.returned(frontend, ask.edition, queue.capacities) or not queue.queued:
            self._stirred = self._changed = True
        told = self._told[frontend]
        if ask.whole and ask.told > told:
            wanted = {(frontend, descriptor.request) for descriptor in ask.descriptors}
            for key in [key for key in queue.of_frontend(frontend) if key not in wanted]:
                queue.drop(*key)
            self._told[frontend] = ask.told
            self._stirred = self._changed = True
        elif ask.told == told + 1:
            self._told[frontend] = ask.told
        for descriptor in ask.descriptors:
            queue.ask(frontend, descriptor, now)
        # Who joins those that wait for capacity does not find any either.
        if group.stale or queue.may_start():
            self._stirred = group.stale = True

    def sent(self, frontend: int, send: Send, on_the_wire: bool) -> None:
        """A front-end has sent a request: one that waited, or one of its credit. `on_the_wire`: by the load table."""
        group = self._group_of.get(frontend)
        confirmed = group is not None and on_the_wire and group.queue.confirm(frontend, send)
        if group is not None and confirmed and not group.queue.counts:
            # It was the last: nothing has to be said of the queue any more.
            self._stirred = self._changed = True
        if confirmed and len(self._groups) == 1:
            return
        for one in self._groups_of(send.rank):
            if one is not group or not confirmed:
                one.marked.add(send.rank)
        if group is None or confirmed:
            return
        if send.request:
            group.queue.drop(frontend, send.request)
            self._stirred = self._changed = True
        else:
            group.shares.spent(frontend, send, group.queue.capacities)
        if send.blocks or send.session:
            group.queue.homes.sent(send.rank, unpacked(send.blocks), send.session)
        if group.queue.queued and group.queue.may_start():
            # What was promised for it elsewhere is free, or what its rank has reported already was promised twice.
            self._stirred = group.stale = True

    def forget_frontend(self, frontend: int) -> None:
        """The front-end is gone: nothing of it waits, and it holds nothing."""
        self._told.pop(frontend, None)
        # What it had on the wire does not count any more, wherever it was.
        for one in self._groups.values():
            one.marked.update(capacity.rank for capacity in one.queue.capacities)
            one.stale = True
        self._stirred = self._changed = True
        group = self._group_of.pop(frontend, None)
        if group is None:
            return
        group.queue.drop_frontend(frontend)
        group.shares.leave(frontend, group.queue.capacities)
        if not len(group.shares):
            del self._groups[group.ranks]

    # Ranks --------------------------------------------------------------------------------------

    def limit(self, ranks: int) -> None:
        """Ranks from this one on get nothing new: they leave."""
        self._limit = ranks
        leaving = {
            capacity.rank
            for group in self._groups.values()
            for capacity in group.queue.capacities
            if capacity.rank >= ranks
        }
        marked = {rank for group in self._groups.values() for rank in group.marked if rank >= ranks}
        for rank in leaving | marked:
            self.lost(rank)

    def reported(self, report: RankReport) -> None:
        """A rank has reported, by the load table, which has been told."""
        rank = report.rank
        if rank >= self._limit:
            return
        for group in self._groups.values():
            if group.ranks is None or rank in group.ranks:
                waiting, capacities = group.queue.queued, group.queue.capacities
                starts = capacities.reported(report) if waiting else None
                if starts is None:
                    group.marked.add(rank)
                elif not starts:
                    # It is full: nobody who waits can start there, which is what most reports say then.
                    continue
                group.stale = True
                if waiting:
                    self._stirred = True

    def mark(self, rank: int) -> None:
        if rank >= self._limit:
            return
        for group in self._groups.values():
            if group.ranks is None or rank in group.ranks:
                group.marked.add(rank)
                group.stale = True
                if group.queue.queued:
                    self._stirred = True

    def lost(self, rank: int) -> None:
        """The rank is gone, or may be: nothing is granted there until it is heard again."""
        for group in self._groups.values():
            group.marked.discard(rank)
            self._stirred = self._changed = group.stale = True
            group.queue.lost(rank)
            group.shares.lost(rank)
        self.held.again(rank)

    # What goes out ------------------------------------------------------------------------------

    def grants(self, load_table: LoadTable, membership: Membership, free: bool, now: float) -> Grants | None:
        """What to tell front-ends now. `free`: whether work may be started; a paused deployment grants nothing."""
        repeat = self._due is not None and now >= self._due
        if repeat:
            self._forget_silent(now)
        elif not self._stirred:
            return None
        made = self._start(load_table, membership, now) if free else []
        # While the deployment is paused, what may start stays to be looked at.
        self._stirred = not free
        if self._changed or repeat:
            self._changed = False
            return self._settle(made, repeat, now)
        return self._said(made) if made else None

    def _start(self, load_table: LoadTable, membership: Membership, now: float) -> list[Grant]:
        """Grant whatever can start."""
        made: list[Grant] = []
        for group in self._groups.values():
            if group.stale and group.queue.queued:
                group.stale = False
                if group.marked:
                    group.look(load_table, membership)
                for entry in group.queue.grant():
                    entry.granted_at = now
                    made.append(_grant(entry))
                if not group.queue.queued:
                    self._changed = True
        return made

    def _settle(self, made: list[Grant], repeat: bool, now: float) -> Grants | None:
        """Who waits, and whether credits are to be given back, may have changed. Returns what there is to say."""
        revoke = descriptors = waits = False
        for group in self._groups.values():
            waiting = bool(group.queue.queued)
            descriptors = descriptors or bool(group.queue.counts)
            waits = waits or waiting
            if waiting and group.shares.outstanding:
                revoke = True
                group.revoked = now if group.revoked is None else group.revoked
            else:
                group.revoked = None
        news = made or self._due is None or (revoke and not self._revoking)
        self._revoking = revoke
        self._emptied = self._emptied or (self._waited and not waits)
        self._waited = waits
        if not descriptors:
            self._due = None
            return None
        if not news and not repeat:
            return None
        if repeat and self._repeats:
            made = [_grant(entry) for group in self._groups.values() for entry in group.queue.granted.values()]
        if repeat or self._due is None:
            self._due = now + REPEAT_S
        return self._said(made)

    def _said(self, made: list[Grant]) -> Grants:
        told = self._told
        if len(self._groups) == 1:
            (group,) = self._groups.values()
            counts = group.queue.counts
            asked = told.copy() if len(counts) == len(told) else {frontend: told[frontend] for frontend in counts}
            return Grants(self._identity, made, asked, len(group.queue.queued), self._revoking)
        asked = {frontend: told[frontend] for group in self._groups.values() for frontend in group.queue.counts}
        return Grants(self._identity, made, asked, self.queued, self._revoking, self.queues())

    def _forget_silent(self, now: float) -> None:
        """Do not wait for front-ends that hang: who has not confirmed a grant, or given back a revoked share."""
        late = now - UNANSWERED_S
        # Where this process itself has hung, the answers may be there, unread.
        hung = self._due is not None and now >= self._due + UNANSWERED_S / 2
        for group in list(self._groups.values()):
            if hung:
                group.revoked = None
                for entry in group.queue.granted.values():
                    entry.granted_at = now
            silent = {entry.frontend for entry in group.queue.granted.values() if entry.granted_at <= late}
            if group.revoked is not None and group.revoked <= late:
                silent.update(group.shares.holders())
                group.revoked = None
            for frontend in silent:
                self.forget_frontend(frontend)

    def emptied(self) -> bool:
        """Whether, since this was last asked, the last one that waited has been granted or has gone."""
        emptied, self._emptied = self._emptied, False
        return emptied

    def shares(self, load_table: LoadTable, membership: Membership, free: bool) -> list[Shares]:
        """Everybody's credits, for a view; handed out anew where nobody waits."""
        found: list[Shares] = []
        for group in self._groups.values():
            if free and not group.queue.queued:
                group.look(load_table, membership)
                group.shares.hand_out(group.queue.capacities)
            found += group.shares.shares(group.queue.capacities)
        return found

    def _count(self, frontend: int, told: int) -> None:
        """Take note of a message, where none before it is missing."""
        if told == self._told.get(frontend, 0) + 1:
            self._told[frontend] = told


def _grant(entry: Entry) -> Grant:
    assert entry.capacity is not None
    held = entry.whole - entry.tokens
    waited_ms = min(LONGEST_MS, max(0, round((entry.granted_at - entry.arrival) * 1000)))
    return Grant(entry.frontend, entry.request, entry.capacity.rank, entry.capacity.incarnation, held, waited_ms,
                 entry.receipt)  # fmt: skip
