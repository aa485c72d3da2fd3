"""Grants in advance: what each front-end may send to each rank by itself, so that no hop is added while ranks are free.

The capacity that nobody has is divided evenly, and what a front-end was given counts as taken until it tells of a
send, or gives all back: so together they cannot send more than there is capacity for. With several front-ends half of
the capacity is kept undivided. It answers at once whoever has no fitting credit, and it is what one busy front-end
gets while the others' credits lie idle. Where that half is used up and somebody waits, all credits are revoked.

A credit is a limit on the sends beyond those that the view has heard of, the same cut on which the front-end's
accounting rests (`LoadView.heard`). So views may be lost: an older one allows no more than a newer one that nobody has
given back. `epoch` says which credits were given back: what comes late of an older credit epoch is void on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from paceline.core.binding import Send, Share, Shares
from paceline.core.coordinator.load_table import LoadTable
from paceline.core.coordinator.membership import Membership
from paceline.core.dispatch.capacity import ANY, Amount, Capacities, Capacity
from paceline.core.dispatch.queue import CentralQueue

ENTRIES = 256
"""So many credits in a view, of all front-ends together, where each has at least LEAST_RANKS."""
LEAST_RANKS = 8


class Holding:
    """What one front-end holds, by rank. `epoch`: of these, or of the next ones where there are none."""

    __slots__ = ("amounts", "epoch")

    def __init__(self) -> None:
        self.epoch = 1
        self.amounts: dict[int, Amount] = {}


class CreditBook:
    """The credits of all front-ends of one queue, in the order in which they have come."""

    def __init__(self) -> None:
        self._holdings: dict[int, Holding] = {}
        self._counted = 0
        self._holders: set[int] = set()

    def __len__(self) -> int:
        return len(self._holdings)

    @property
    def outstanding(self) -> bool:
        """Whether anybody holds any."""
        return bool(self._holders)

    def holders(self) -> Set[int]:
        return self._holders

    def join(self, frontend: int) -> None:
        """The front-end is there, and gets credits from now on."""
        self._holdings.setdefault(frontend, Holding())

    def leave(self, frontend: int, capacities: Capacities) -> None:
        holding = self._holdings.pop(frontend, None)
        if holding is not None:
            self._clear(frontend, holding, capacities)

    def returned(self, frontend: int, epoch: int, capacities: Capacities) -> bool:
        """The front-end uses nothing of this credit epoch, or an earlier one, any more. Returns whether that is
        news."""
        holding = self._holdings.get(frontend)
        # The largest number has no next one, which a view could carry.
        if holding is None or not holding.epoch <= epoch < ANY:
            return False
        self._clear(frontend, holding, capacities)
        holding.epoch = epoch + 1
        return True

    def spent(self, frontend: int, send: Send, capacities: Capacities) -> None:
        holding = self._holdings.get(frontend)
        amount = holding.amounts.get(send.rank) if holding is not None else None
        capacity = capacities.of(send.rank)
        if amount is None or capacity is None:
            return
        kv = send.tokens + send.held + send.answer_tokens
        used = (min(1, amount.requests), min(send.tokens, amount.tokens), min(kv, amount.kv))
        self._give(amount, capacity, -used[0], -used[1], -used[2])
        capacities.changed(capacity)

    def lost(self, rank: int) -> None:
        """That life of the rank has ended; its capacity is gone with it."""
        for frontend, holding in self._holdings.items():
            holding.amounts.pop(rank, None)
            if not holding.amounts:
                self._holders.discard(frontend)

    def hand_out(self, capacities: Capacities) -> None:
        """Give everybody what is due to it, where that is more than what it holds."""
        count = len(self._holdings)
        each = max(LEAST_RANKS, ENTRIES // max(1, count))
        # Of one rank: all of them where each gets credits of every rank.
        sharers = count if each >= len(capacities) else -(-count * each // len(capacities))
        all_anew = count != self._counted
        self._counted = count
        for index, (frontend, holding) in enumerate(self._holdings.items()):
            for place in _places(index, each, len(capacities)):
                capacity = capacities[place]
                if (capacity.touched or all_anew) and not capacity.reserved:
                    self._grow(holding, capacity, sharers, (index + place) % sharers, capacities)
            if holding.amounts:
                self._holders.add(frontend)
        for capacity in capacities:
            capacity.touched = False

    def shares(self, capacities: Capacities) -> list[Shares]:
        """What everybody holds, for a view: a limit each, beyond the sends that have been heard of."""
        found = []
        for frontend, holding in self._holdings.items():
            shares = []
            for rank, amount in holding.amounts.items():
                capacity = capacities.of(rank)
                if capacity is not None and amount.requests:
                    limits = (min(amount.requests, ANY), min(amount.tokens, ANY), min(amount.kv, ANY))
                    shares.append(Share(rank, capacity.incarnation, *limits))
            found.append(Shares(frontend, holding.epoch, shares))
        return found

    def _grow(self, holding: Holding, capacity: Capacity, sharers: int, place: int, capacities: Capacities) -> None:
        amount = holding.amounts.get(capacity.rank) or Amount()
        credited, halves = capacity.credited, 1 if len(self._holdings) == 1 else 2
        requests = _due(capacity.free_requests(), credited.requests, amount.requests, sharers, halves, place)
        tokens = _due(capacity.free_tokens(), credited.tokens, amount.tokens, sharers, halves, place)
        kv = _due(capacity.free_kv(), credited.kv, amount.kv, sharers, halves, place)
        if (requests or tokens or kv) and (requests or amount.requests) and (kv or amount.kv):
            holding.amounts[capacity.rank] = amount
            self._give(amount, capacity, requests, tokens, kv)
            capacities.changed(capacity)

    def _clear(self, frontend: int, holding: Holding, capacities: Capacities) -> None:
        self._holders.discard(frontend)
        for rank, amount in holding.amounts.items():
            capacity = capacities.of(rank)
            if capacity is not None:
                self._give(amount, capacity, -amount.requests, -amount.tokens, -amount.kv)
                capacities.changed(capacity)
        holding.amounts = {}

    def _give(self, amount: Amount, capacity: Capacity, requests: int, tokens: int, kv: int) -> None:
        amount.add(requests, tokens, kv)
        capacity.credited.add(requests, tokens, kv)
        capacity.promised.add(requests, tokens, kv)


def _due(free: int, credited: int, held: int, count: int, halves: int, place: int) -> int:
    """How much more is due to one of `count`, who are given `1 / halves` of what is free and what they hold.

    `place`: who of them gets what is left over by an even division.
    """
    if free <= 0:
        return 0
    # Nobody knows a limit: everybody may have as much as there ever is.
    if free >= ANY - credited:
        return ANY - held
    divided = (free + credited + halves - 1) // halves
    due = divided // count + (place < divided % count)
    return max(0, min(due - held, divided - credited, free))


def _places(index: int, each: int, size: int) -> Iterator[int]:
    """The ranks that one front-end gets credits of, where there are too many for all to have some of each."""
    return iter(range(size)) if each >= size else ((index * each + place) % size for place in range(each))


class QueueGroup:
    """The front-ends that balance over the same ranks, None for all, with their queue."""

    def __init__(self, ranks: frozenset[int] | None, without: Set[str]) -> None:
        self.ranks = ranks
        self.queue = CentralQueue(without)
        self.shares = CreditBook()
        self.marked: set[int] = set()
        """Ranks whose capacities are to be reckoned when that is wanted."""
        self.revoked: float | None = None
        """Since when all credits have been revoked; None where they are not."""
        self.stale = False
        """Whether something may start since the queue was last looked through: a send alone makes no capacity."""

    def look(self, load_table: LoadTable, membership: Membership) -> None:
        capacities = self.queue.capacities
        for rank in self.marked:
            report = load_table.reports.get(rank)
            if report is None or report.incarnation != membership.ready_life(rank) or rank in membership.hung:
                continue
            capacities.heard(rank, report.incarnation, report.load, load_table.on_the_wire(rank, report.incarnation))
        self.marked.clear()
