"""The coordinator's side of brokered binding: whose queue, what is repeated, which rooms must be looked at anew.

Front-ends that balance over the same ranks share one queue: all of them in internal mode, each node's in hybrid mode.
Nothing is looked at for its own sake: a report or a notice only marks its rank, and the rank's room is reckoned when
somebody waits or a view goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from paceline.protocol.binding.broker import Broker, Entry
from paceline.protocol.binding.shares import ShareBook
from paceline.protocol.binding_messages import Ask, Grant, Grants, ReturnShares, Shares, Withdraw
from paceline.protocol.coordination.board import Board
from paceline.protocol.coordination.membership import Membership
from paceline.protocol.messages import FrontEndHello, Send

REPEAT_S = 0.1
"""While any descriptor is there, front-ends hear of the queue this often at least, and each unconfirmed grant again."""

UNANSWERED_S = 1.0
"""A front-end that has not answered a grant, or a recall of its shares, for so long is not waited for."""


class Pool:
    """The front-ends that balance over the same ranks, None for all, with their queue."""

    def __init__(self, ranks: frozenset[int] | None, without: Set[str], lockstep: bool) -> None:
        self.ranks = ranks
        self.broker = Broker(without, lockstep)
        self.shares = ShareBook()
        self.marked: set[int] = set()
        self.recalled: float | None = None
        """Since when all shares have been recalled; None where they are not."""
        self.stale = False
        """Whether something may start since the queue was last looked through: a send alone makes no room."""


class Brokerage:
    """All queues of one coordinator. `without`: rules (`rules.py`) left out."""

    def __init__(self, identity: int, without: Set[str] = frozenset(), lockstep: bool = False) -> None:
        self._identity = identity
        self._without = without
        self._lockstep = lockstep
        self._repeats = "grants-repeated" not in without
        self._pools: dict[frozenset[int] | None, Pool] = {}
        self._pool_of: dict[int, Pool] = {}
        self._told: dict[int, int] = {}
        self._due: float | None = None
        self._recalling = False
        self._waited = False
        self._limit = 65536

    @property
    def due(self) -> float | None:
        """When front-ends must hear of the queue again, or None where it is empty."""
        return self._due

    @property
    def queued(self) -> int:
        """Descriptors that wait."""
        return sum(len(pool.broker.queued) for pool in self._pools.values())

    @property
    def granted(self) -> int:
        """Grants that nobody has confirmed yet."""
        return sum(len(pool.broker.granted) for pool in self._pools.values())

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
            pool = self._pools[ranks] = Pool(ranks, self._without, self._lockstep)
            pool.marked = {rank for rank in heard if rank < self._limit and (ranks is None or rank in ranks)}
        self._pool_of[front_end] = pool
        pool.shares.join(front_end)

    def said(self, message: Ask | Withdraw | ReturnShares, now: float) -> None:
        """A front-end that has not said hello says it before it asks again."""
        pool = self._pool_of.get(message.front_end)
        if pool is None:
            return
        pool.stale = True
        match message:
            case Ask():
                self._ask(pool, message, now)
            case Withdraw(front_end, told, requests):
                self._count(front_end, told)
                for request in requests:
                    pool.broker.drop(front_end, request)
            case ReturnShares(front_end, edition):
                pool.shares.returned(front_end, edition, pool.broker.rooms)

    def _ask(self, pool: Pool, ask: Ask, now: float) -> None:
        if ask.whole and ask.told > self._told.get(ask.front_end, 0):
            wanted = {(ask.front_end, descriptor.request) for descriptor in ask.descriptors}
            for key in [key for key in pool.broker.of_front_end(ask.front_end) if key not in wanted]:
                pool.broker.drop(*key)
            self._told[ask.front_end] = ask.told
        self._count(ask.front_end, ask.told)
        pool.shares.returned(ask.front_end, ask.edition, pool.broker.rooms)
        for descriptor in ask.descriptors:
            pool.broker.ask(ask.front_end, descriptor, now)

    def sent(self, front_end: int, send: Send, on_the_wire: bool) -> None:
        """A front-end has sent a request: one that waited, or one of its share. `on_the_wire`: by the board, which has
        been told.
        """
        pool = self._pool_of.get(front_end)
        confirmed = pool is not None and on_the_wire and pool.broker.confirm(front_end, send)
        for one in self._pools.values():
            of_it = send.rank < self._limit and (one.ranks is None or send.rank in one.ranks)
            if of_it and (one is not pool or not confirmed):
                one.marked.add(send.rank)
        if pool is None or confirmed:
            return
        if send.request:
            granted = pool.broker.granted.get((front_end, send.request))
            if granted is not None and granted.room is not None and granted.room.rank != send.rank:
                # It went elsewhere: there is room where it was granted.
                pool.stale = True
            pool.broker.drop(front_end, send.request)
        else:
            pool.shares.spent(front_end, send, pool.broker.rooms)

    def forget_front_end(self, front_end: int) -> None:
        """The front-end is gone: nothing of it waits, and it holds nothing."""
        self._told.pop(front_end, None)
        pool = self._pool_of.pop(front_end, None)
        if pool is None:
            return
        pool.broker.drop_front_end(front_end)
        pool.shares.leave(front_end, pool.broker.rooms)
        # What it had on the wire does not count any more.
        pool.marked.update(room.rank for room in pool.broker.rooms)
        pool.stale = True
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

    def mark(self, rank: int) -> None:
        """What is known of a rank has changed."""
        if rank >= self._limit:
            return
        for pool in self._pools.values():
            if pool.ranks is None or rank in pool.ranks:
                pool.marked.add(rank)
                pool.stale = True

    def lost(self, rank: int) -> None:
        """The rank is gone, or may be: nothing is granted there until it is heard again."""
        for pool in self._pools.values():
            pool.marked.discard(rank)
            pool.stale = True
            pool.broker.lost(rank)
            pool.shares.lost(rank)

    # What goes out ------------------------------------------------------------------------------

    def grants(self, board: Board, membership: Membership, free: bool, now: float) -> Grants | None:
        """What to tell front-ends now. `free`: whether work may be started; a suspended deployment grants nothing."""
        if not self._pools:
            self._due = None
            return None
        repeat = self._due is None or now >= self._due
        if repeat:
            self._forget_silent(now)
        made: list[Grant] = []
        recall = waiting = False
        for pool in self._pools.values():
            broker = pool.broker
            waiting = waiting or bool(broker.counts)
            if broker.queued and pool.stale and free:
                _look(pool, board, membership)
                pool.stale = False
                for entry in broker.grant():
                    entry.granted_at = now
                    made.append(_grant(entry))
            recalled = bool(broker.queued) and pool.shares.outstanding
            pool.recalled = (now if pool.recalled is None else pool.recalled) if recalled else None
            recall = recall or recalled
        news = bool(made) or (recall and not self._recalling)
        self._recalling = recall
        if not waiting:
            self._due = None
            return None
        if not news and not repeat:
            return None
        if repeat and self._repeats:
            made = [_grant(entry) for pool in self._pools.values() for entry in pool.broker.granted.values()]
        if repeat:
            self._due = now + REPEAT_S
        asked = (front_end for pool in self._pools.values() for front_end in pool.broker.counts)
        told = {front_end: self._told.get(front_end, 0) for front_end in asked}
        return Grants(self._identity, made, told, self.queued, recall)

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
        before, self._waited = self._waited, False
        for pool in self._pools.values():
            if pool.broker.queued:
                self._waited = True
        return before and not self._waited

    def shares(self, board: Board, membership: Membership, free: bool) -> list[Shares]:
        """Everybody's shares, for a view; handed out anew where nobody waits."""
        found: list[Shares] = []
        for pool in self._pools.values():
            if free and not pool.broker.queued:
                _look(pool, board, membership)
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


def _look(pool: Pool, board: Board, membership: Membership) -> None:
    """Reckon the rooms of the ranks that are marked."""
    for rank in pool.marked:
        life = membership.ready_life(rank)
        known = board.known(rank, life) if life is not None else None
        if life is not None and known is not None:
            pool.broker.rooms.heard(rank, life, *known)
    pool.marked.clear()
