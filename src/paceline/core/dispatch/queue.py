"""The queue before all ranks: requests wait once, and are bound to a rank when one can start them.

A request that is bound when it arrives waits behind one rank, and stays there although another is free a moment
later: lengths of answers are not known, so no policy can foresee which. Here nobody waits behind a rank. The front-
ends keep the bodies; the coordinator keeps one queue of descriptors and grants each to a rank at the moment that one
can start it: a slot is free, or will be in a moment; the prompts ahead are fewer than one and a half steps compute;
and the KV memory holds the prompt and the longest answer (`capacity.py`). Of those ranks it takes the one with the
least ahead.

Who is next. Tenants share by weight (`tenants.py`); of one, by priority, then by arrival, and nobody is passed over
for ever (`line.py`): a request with k before it by arrival is granted after at most (k + 1) x (PRIORITY_PATIENCE + 1)
others, plus the times that k + 1 ranks take to end. Where it belongs to a rank that holds its prefix (`homes.py`) it
waits in that rank's line, else in the one for any. A rank takes the first of both; what nobody belongs to, and takes
too long at home, goes to ranks that nobody waits for.

What a grant is. It says that this request goes to this life of this rank, and counts against the rank's capacity at
once. The front-end that has the body sends it and tells of the send (SendNotice); from then on the accounting counts
it like any other. Only the front-end sends, and only what it still holds, so a grant may be lost, come twice, late,
or from a coordinator that is no more, and no request is ever sent twice. A grant is repeated until it is confirmed by
the notice of the send or, where the client has gone or the request has a rank already, a Withdraw. A front-end that
owes this, or its revoked credits, for `dispatcher.UNANSWERED_S` hangs: nothing of it waits any more, as if it had
ended. When it goes on it sees that no view names it, and says hello again. A grant for a life of a rank that has
ended goes back to its old place in the queue, which the order keeps for it.

No hop while ranks are free. As long as nobody waits, each front-end holds grants in advance: a credit of each rank's
capacity that it may use without a word (`credits.py`). Where none fits, it asks, and is answered at once if there is
capacity that nobody was given. When somebody waits all the same, all credits are revoked and granted by the queue.

When the coordinator goes. The queue dies with it, the bodies do not. A front-end that is not answered for a while
binds what it holds itself (`dispatch.py`). A new coordinator is told of everything that still waits, with its age.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from paceline.core.binding import Descriptor, Send
from paceline.core.blocks import unpacked
from paceline.core.dispatch.capacity import Capacities, Capacity
from paceline.core.dispatch.homes import Homes
from paceline.core.dispatch.line import Entry
from paceline.core.dispatch.tenants import TenantLine, Tenants

STRAYS_TO = 4
"""So many ranks that nobody waits for are offered to those who wait elsewhere."""


class CentralQueue:
    """The queue of one set of ranks. `without`: rules (`rules.py`) left out, to show what breaks."""

    def __init__(self, without: Set[str] = frozenset()) -> None:
        self.capacities = Capacities()
        self.granted: dict[tuple[int, int], Entry] = {}
        """By front-end and request: granted, and not confirmed yet."""
        self.queued: dict[tuple[int, int], Entry] = {}
        """Waiting. In no order."""
        self.counts: dict[int, int] = {}
        """How many of both there are of each front-end."""
        self._counts = "grants-count" not in without
        self.homes = Homes(self.capacities)
        self.tenants = Tenants()
        self._anywhere = TenantLine(self.tenants)
        self._lines = self.homes.lines
        # Those for which a rank is kept.
        self._keeping: set[int] = set()
        self._next_number = 0

    def __len__(self) -> int:
        """Descriptors, waiting and granted."""
        return len(self.queued) + len(self.granted)

    def ask(self, frontend: int, descriptor: Descriptor, now: float) -> None:
        """A request waits. One that is known already keeps its place, or its grant."""
        request, tokens = descriptor.request, descriptor.tokens
        key = (frontend, request)
        if key in self.queued or key in self.granted:
            return
        self._next_number = number = self._next_number + 1
        arrival = now - descriptor.waited_ms / 1000
        self.counts[frontend] = self.counts.get(frontend, 0) + 1
        kv = tokens + descriptor.answer_tokens
        blocks = unpacked(descriptor.blocks) if descriptor.blocks else ()
        self._join(key, Entry(
            frontend, request, tokens, kv, descriptor.priority, arrival, number, whole=tokens, blocks=blocks,
            session=descriptor.session, tenant=descriptor.tenant, weight=descriptor.weight,
        ))  # fmt: skip

    def confirm(self, frontend: int, send: Send) -> bool:
        """The request is on its way to where it was granted: what was promised there, the rank now has. Returns whether
        that is so. It takes no more capacity than before, so nothing has to be looked at anew.
        """
        key = (frontend, send.request)
        entry = self.granted.get(key)
        if entry is None:
            return False
        capacity = entry.capacity
        if (
            capacity is None
            or capacity.rank != send.rank
            or capacity.incarnation != send.incarnation
            or not self._counts
        ):
            return False
        if entry.tokens != send.tokens or entry.kv != send.tokens + send.held + send.answer_tokens:
            return False
        del self.granted[key]
        promised = capacity.promised
        promised.requests -= 1
        promised.tokens -= entry.tokens
        promised.kv -= entry.kv
        self._count_out(frontend)
        return True

    def drop(self, frontend: int, request: int) -> None:
        """The request has been sent, or is not wanted any more."""
        key = (frontend, request)
        entry = self.queued.pop(key, None)
        if entry is not None:
            self._leave(entry)
        entry = entry or self.granted.pop(key, None)
        if entry is None:
            return
        capacity = entry.capacity
        if capacity is not None and self._counts:
            capacity.promised.add(-1, -entry.tokens, -entry.kv)
            self.capacities.changed(capacity)
        self._count_out(frontend)

    def drop_frontend(self, frontend: int) -> None:
        for _, request in list(self.of_frontend(frontend)):
            self.drop(frontend, request)

    def of_frontend(self, frontend: int) -> Iterator[tuple[int, int]]:
        return (key for known in (self.queued, self.granted) for key in known if key[0] == frontend)

    def lost(self, rank: int) -> None:
        """That life of the rank has ended: what was granted there waits again, in its old place."""
        self.capacities.forget(rank)
        self.homes.lost(rank)
        self._anywhere.lost(rank)
        again = [entry for entry in self.granted.values() if entry.capacity is not None and entry.capacity.rank == rank]
        line = self._lines.pop(rank, None)
        self._keeping.discard(rank)
        waiting = list(line) if line is not None else []
        for entry in waiting:
            entry.waiting = False
            self.tenants.left(entry.tenant)
        for entry in [*again, *waiting]:
            self.granted.pop((entry.frontend, entry.request), None)
            self._rejoin(entry)

    def may_start(self) -> bool:
        """Whether there is any capacity, or some rank is kept for somebody."""
        return bool(self.capacities.open) or self._anywhere.keeps or bool(self._keeping)

    def grant(self) -> list[Entry]:
        """Grant whatever can start now, in order of the grants."""
        made: list[Entry] = []
        while self.may_start() and (found := self._next()) is not None:
            entry, capacity = found
            key = (entry.frontend, entry.request)
            del self.queued[key]
            self._leave(entry)
            self.granted[key] = entry
            entry.capacity = capacity
            if entry.blocks or entry.session:
                self.homes.granted(entry, capacity.rank)
            if self._counts:
                self.capacities.promise(capacity, entry.tokens, entry.kv)
            self.tenants.granted(entry, self.homes.answer_tokens(capacity))
            self._anywhere.granted(entry.tenant)
            line = self._lines.get(capacity.rank)
            if line is not None:
                line.granted(entry.tenant)
            made.append(entry)
        return made

    def _next(self) -> tuple[Entry, Capacity] | None:
        """Who is granted next, and which rank: the first in order of all lines that have one."""
        capacities, order = self.capacities, self.tenants.order
        found = self._anywhere.next(self._best, capacities.most_free, capacities.changed, lambda: bool(capacities.open))
        if not self._lines:
            return found and found[:2]
        if found is not None and found[2]:
            return found[:2]
        few = self._lines if len(self._lines) < len(capacities.open) else capacities.open
        for rank in {*few, *self._keeping}:
            of_rank = self._next_of(rank)
            while of_rank is not None and self.homes.forgotten(of_rank[0]):
                self._again(of_rank[0])
                of_rank = self._next_of(rank)
            if of_rank is not None and (found is None or of_rank[2] or order(of_rank[0]) < order(found[0])):
                found = of_rank
                if found[2]:
                    break
        if found is not None:
            return found[:2]
        return self.homes.strays(list(capacities.open.values())[:STRAYS_TO]) if capacities.open else None

    def _next_of(self, rank: int) -> tuple[Entry, Capacity, bool] | None:
        """Who of those that wait for this rank is granted it next, and whether because it is its turn."""
        line, capacity = self._lines.get(rank), self.capacities.of(rank)
        if line is None or capacity is None:
            return None
        opened = self.capacities.open
        found = line.next(
            lambda entry: capacity if rank in opened and capacity.startable_kv() >= entry.kv else None,
            lambda: None if capacity.reserved else capacity, self.capacities.changed, lambda: rank in opened,
        )  # fmt: skip
        if line.keeps:
            self._keeping.add(rank)
        else:
            self._keeping.discard(rank)
            if not len(line):
                del self._lines[rank]
        return found

    def _best(self, entry: Entry) -> Capacity | None:
        """The rank that can start one that has no home."""
        if entry.blocks or entry.session:
            return self.homes.soonest(entry, self.capacities.least_loaded())
        return self.capacities.best(entry.kv)

    def _join(self, key: tuple[int, int], entry: Entry) -> None:
        self.queued[key] = entry
        entry.due = entry.arrival
        if entry.blocks or entry.session:
            entry.home = self.homes.home(entry)
            if entry.home is not None:
                entry.tokens = max(1, entry.whole - entry.holders[entry.home])
            entry.due -= self.homes.saved_s(entry)
        line = self._anywhere if entry.home is None else self._line_of(entry.home)
        self.tenants.joined(entry.tenant)
        line.join(entry)

    def _line_of(self, rank: int) -> TenantLine:
        line = self._lines.get(rank)
        if line is None:
            line = self._lines[rank] = TenantLine(self.tenants)
        return line

    def _again(self, entry: Entry) -> None:
        """It belongs elsewhere than it did."""
        self._leave(entry)
        self._rejoin(entry)

    def _rejoin(self, entry: Entry) -> None:
        # A new one: the old one may still stand in a line, marked.
        key, whole = (entry.frontend, entry.request), entry.whole
        self._join(key, Entry(
            *key, whole, entry.kv, entry.priority, entry.arrival, entry.number, whole=whole, blocks=entry.blocks,
            session=entry.session, tenant=entry.tenant, weight=entry.weight,
        ))  # fmt: skip

    def _leave(self, entry: Entry) -> None:
        entry.waiting = False
        self.tenants.left(entry.tenant)
        line = self._anywhere if entry.home is None else self._lines[entry.home]
        line.leave(entry)
        if entry.home is not None and not len(line) and not line.keeps:
            del self._lines[entry.home]

    def _count_out(self, frontend: int) -> None:
        left = self.counts[frontend] - 1
        if left:
            self.counts[frontend] = left
        else:
            del self.counts[frontend]
