"""The coordinator's side of brokered binding: whose queue, what is repeated, which rooms must be looked at anew.

Front-ends that balance over the same ranks share one queue: all of them in internal mode, each node's in hybrid mode.
Nothing is looked at for its own sake: while nobody waits, a report or a notice only marks its rank, and the rank's
room is reckoned when somebody waits or a view goes out. While somebody does, a report that makes no room ends there.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from paceline.core.coordinator.load_table import Board
from paceline.core.coordinator.membership import Membership
from paceline.core.dispatch.credits import Pool
from paceline.core.dispatch.queue import Entry
from paceline.core.messages import Ask, FrontEndHello, Grant, Grants, RankReport, ReturnShares, Send, Shares, Withdraw

REPEAT_S = 0.1
"""While any descriptor is there, front-ends hear of the queue this often at least, and each unconfirmed grant again."""

UNANSWERED_S = 1.0
"""A front-end that has not answered a grant, or a recall of its shares, for so long is not waited for."""


class Brokerage:
    """All queues of one coordinator. `without`: rules (`rules.py`) left out."""

    def __init__(self, identity: int, without: Set[str] = frozenset()) -> None:
        self._identity = identity
        self._without = without
        self._repeats = "grants-repeated" not in without
        self._pools: dict[frozenset[int] | None, Pool] = {}
        self._pool_of: dict[int, Pool] = {}
        self._told: dict[int, int] = {}
        self._due: float | None = None
        self._recalling = False
        # `grants` is asked after every event, and most change nothing for those that wait. Whether, since it was last
        # asked, something may start that could not; and whether somebody waits, or holds shares, who did not, or not
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
        """Descriptors that wait."""
        return sum(len(pool.broker.queued) for pool in self._pools.values())

    @property
    def granted(self) -> int:
        """Grants that nobody has confirmed yet."""
        return sum(len(pool.broker.granted) for pool in self._pools.values())

    def queues(self) -> dict[int, int]:
        """By front-end, how many wait in its queue; nothing where there is one queue only."""
        pools = self._pool_of.items() if len(self._pools) > 1 else ()
        return {front_end: len(pool.broker.queued) for front_end, pool in pools}

    def descriptors(self) -> Iterable[tuple[int, int]]:
        """Whose requests wait or are granted, by front-end and request."""
        for pool in self._pools.values():
            yield from pool.broker.queued
            yield from pool.broker.granted

    # Front-ends ---------------------------------------------------------------------------------

    def hello(self, hello: FrontEndHello, heard: Iterable[int]) -> None:
        """A front-end is there. `heard`: the ranks of which anything is known."""
        front_end = hello.front_end
        ranks = None if hello.ranks is None else frozenset(hello.ranks)
        pool = self._pool_of.get(front_end)
        if pool is not None and (not hello.brokered or pool.ranks != ranks):
            self.forget_front_end(front_end)
            pool = None
        if not hello.brokered or pool is not None:
            return
        pool = self._pools.get(ranks)
        if pool is None:
            pool = self._pools[ranks] = Pool(ranks, self._without)
            pool.marked = {rank for rank in heard if rank < self._limit and (ranks is None or rank in ranks)}
        self._pool_of[front_end] = pool
        self._told.setdefault(front_end, 0)
        pool.shares.join(front_end)

    def said(self, message: Ask | Withdraw | ReturnShares, now: float) -> None:
        """A front-end that has not said hello says it before it asks again."""
        pool = self._pool_of.get(message.front_end)
        if pool is None:
            return
        if isinstance(message, Ask):
            self._ask(pool, message, now)
            return
        self._stirred = self._changed = pool.stale = True
        if isinstance(message, Withdraw):
            self._count(message.front_end, message.told)
            for request in message.requests:
                pool.broker.drop(message.front_end, request)
        else:
            pool.shares.returned(message.front_end, message.edition, pool.broker.rooms)

    def _ask(self, pool: Pool, ask: Ask, now: float) -> None:
        front_end, broker = ask.front_end, pool.broker
        if pool.shares.returned(front_end, ask.edition, broker.rooms) or not broker.queued:
            self._stirred = self._changed = True
        told = self._told[front_end]
        if ask.whole and ask.told > told:
            wanted = {(front_end, descriptor.request) for descriptor in ask.descriptors}
            for key in [key for key in broker.of_front_end(front_end) if key not in wanted]:
                broker.drop(*key)
            self._told[front_end] = ask.told
            self._stirred = self._changed = True
        elif ask.told == told + 1:
            self._told[front_end] = ask.told
        for descriptor in ask.descriptors:
            broker.ask(front_end, descriptor, now)
        # Who joins those that wait for room does not find any either.
        if pool.stale or broker.may_start():
            self._stirred = pool.stale = True

    def sent(self, front_end: int, send: Send, on_the_wire: bool) -> None:
        """A front-end has sent a request: one that waited, or one of its share. `on_the_wire`: by the board, which has
        been told.
        """
        pool = self._pool_of.get(front_end)
        confirmed = pool is not None and on_the_wire and pool.broker.confirm(front_end, send)
        if pool is not None and confirmed and not pool.broker.counts:
            # It was the last: nothing has to be said of the queue any more.
            self._stirred = self._changed = True
        if confirmed and len(self._pools) == 1:
            return
        for one in self._pools.values():
            of_it = send.rank < self._limit and (one.ranks is None or send.rank in one.ranks)
            if of_it and (one is not pool or not confirmed):
                one.marked.add(send.rank)
        if pool is None or confirmed:
            return
        if send.request:
            pool.broker.drop(front_end, send.request)
            self._stirred = self._changed = True
        else:
            pool.shares.spent(front_end, send, pool.broker.rooms)
        if pool.broker.queued and pool.broker.may_start():
            # What was promised for it elsewhere is free, or what its rank has reported already was promised twice.
            self._stirred = pool.stale = True

    def forget_front_end(self, front_end: int) -> None:
        """The front-end is gone: nothing of it waits, and it holds nothing."""
        self._told.pop(front_end, None)
        # What it had on the wire does not count any more, wherever it was.
        for one in self._pools.values():
            one.marked.update(room.rank for room in one.broker.rooms)
            one.stale = True
        self._stirred = self._changed = True
        pool = self._pool_of.pop(front_end, None)
        if pool is None:
            return
        pool.broker.drop_front_end(front_end)
        pool.shares.leave(front_end, pool.broker.rooms)
        if not len(pool.shares):
            del self._pools[pool.ranks]

    # Ranks --------------------------------------------------------------------------------------

    def limit(self, ranks: int) -> None:
        """Ranks from this one on get nothing new: they leave."""
        self._limit = ranks
        leaving = {room.rank for pool in self._pools.values() for room in pool.broker.rooms if room.rank >= ranks}
        marked = {rank for pool in self._pools.values() for rank in pool.marked if rank >= ranks}
        for rank in leaving | marked:
            self.lost(rank)

    def reported(self, report: RankReport) -> None:
        """A rank has reported, by the board, which has been told."""
        rank = report.rank
        if rank >= self._limit:
            return
        for pool in self._pools.values():
            if pool.ranks is None or rank in pool.ranks:
                waiting, rooms = pool.broker.queued, pool.broker.rooms
                starts = rooms.reported(report) if waiting else None
                if starts is None:
                    pool.marked.add(rank)
                elif not starts:
                    # It is full: nobody who waits can start there, which is what most reports say then.
                    continue
                pool.stale = True
                if waiting:
                    self._stirred = True

    def mark(self, rank: int) -> None:
        """A rank is ready."""
        if rank >= self._limit:
            return
        for pool in self._pools.values():
            if pool.ranks is None or rank in pool.ranks:
                pool.marked.add(rank)
                pool.stale = True
                if pool.broker.queued:
                    self._stirred = True

    def lost(self, rank: int) -> None:
        """The rank is gone, or may be: nothing is granted there until it is heard again."""
        for pool in self._pools.values():
            pool.marked.discard(rank)
            self._stirred = self._changed = pool.stale = True
            pool.broker.lost(rank)
            pool.shares.lost(rank)

    # What goes out ------------------------------------------------------------------------------

    def grants(self, board: Board, membership: Membership, free: bool, now: float) -> Grants | None:
        """What to tell front-ends now. `free`: whether work may be started; a suspended deployment grants nothing."""
        repeat = self._due is not None and now >= self._due
        if repeat:
            self._forget_silent(now)
        elif not self._stirred:
            return None
        made = self._start(board, membership, now) if free else []
        # While the deployment is suspended, what may start stays to be looked at.
        self._stirred = not free
        if self._changed or repeat:
            self._changed = False
            return self._settle(made, repeat, now)
        return self._said(made) if made else None

    def _start(self, board: Board, membership: Membership, now: float) -> list[Grant]:
        """Grant whatever can start."""
        made: list[Grant] = []
        for pool in self._pools.values():
            if pool.stale and pool.broker.queued:
                pool.stale = False
                if pool.marked:
                    pool.look(board, membership)
                for entry in pool.broker.grant():
                    entry.granted_at = now
                    made.append(_grant(entry))
                if not pool.broker.queued:
                    self._changed = True
        return made

    def _settle(self, made: list[Grant], repeat: bool, now: float) -> Grants | None:
        """Who waits, and whether shares are to be given back, may have changed. Returns what there is to say."""
        recall = descriptors = waits = False
        for pool in self._pools.values():
            waiting = bool(pool.broker.queued)
            descriptors = descriptors or bool(pool.broker.counts)
            waits = waits or waiting
            if waiting and pool.shares.outstanding:
                recall = True
                pool.recalled = now if pool.recalled is None else pool.recalled
            else:
                pool.recalled = None
        news = made or self._due is None or (recall and not self._recalling)
        self._recalling = recall
        self._emptied = self._emptied or (self._waited and not waits)
        self._waited = waits
        if not descriptors:
            self._due = None
            return None
        if not news and not repeat:
            return None
        if repeat and self._repeats:
            made = [_grant(entry) for pool in self._pools.values() for entry in pool.broker.granted.values()]
        if repeat or self._due is None:
            self._due = now + REPEAT_S
        return self._said(made)

    def _said(self, made: list[Grant]) -> Grants:
        told = self._told
        if len(self._pools) == 1:
            (pool,) = self._pools.values()
            counts = pool.broker.counts
            asked = told.copy() if len(counts) == len(told) else {front_end: told[front_end] for front_end in counts}
            return Grants(self._identity, made, asked, len(pool.broker.queued), self._recalling)
        asked = {front_end: told[front_end] for pool in self._pools.values() for front_end in pool.broker.counts}
        return Grants(self._identity, made, asked, self.queued, self._recalling, self.queues())

    def _forget_silent(self, now: float) -> None:
        """Do not wait for front-ends that hang: who has not confirmed a grant, or given back a recalled share."""
        late = now - UNANSWERED_S
        # Where this process itself has hung, the answers may be there, unread.
        hung = self._due is not None and now >= self._due + UNANSWERED_S / 2
        for pool in list(self._pools.values()):
            if hung:
                pool.recalled = None
                for entry in pool.broker.granted.values():
                    entry.granted_at = now
            silent = {entry.front_end for entry in pool.broker.granted.values() if entry.granted_at <= late}
            if pool.recalled is not None and pool.recalled <= late:
                silent.update(pool.shares.holders())
                pool.recalled = None
            for front_end in silent:
                self.forget_front_end(front_end)

    def emptied(self) -> bool:
        """Whether, since this was last asked, the last one that waited has been granted or has gone."""
        emptied, self._emptied = self._emptied, False
        return emptied

    def shares(self, board: Board, membership: Membership, free: bool) -> list[Shares]:
        """Everybody's shares, for a view; handed out anew where nobody waits."""
        found: list[Shares] = []
        for pool in self._pools.values():
            if free and not pool.broker.queued:
                pool.look(board, membership)
                pool.shares.hand_out(pool.broker.rooms)
            found += pool.shares.shares(pool.broker.rooms)
        return found

    def _count(self, front_end: int, told: int) -> None:
        """Take note of a message, where none before it is missing."""
        if told == self._told.get(front_end, 0) + 1:
            self._told[front_end] = told


def _grant(entry: Entry) -> Grant:
    assert entry.room is not None
    return Grant(entry.front_end, entry.request, entry.room.rank, entry.room.incarnation)
