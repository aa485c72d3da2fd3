"""How much each rank can still start at once, and the ranks in order of it.

What a rank has is counted as the exact accounting counts it: its report, and what front-ends have told of that the
report does not hold. On top of that comes what was promised and is not yet told of: grants, and front-ends' credits.
Nothing is copied: the report and the sum of the sends are read where they are kept (`UnackedSends.total`), so that what
the promises become when their sends are told of is there at once, and a report of a full rank costs one comparison.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from paceline.core.load import Load
from paceline.core.messages import RankReport
from paceline.core.ordering import PLACE_BITS, PLACE_MASK, Ordering

ANY = 1 << 40
"""More than there ever is: no limit is known."""

BUDGETS_AHEAD = 1.5
"""A rank with fewer prompt tokens ahead than so many full steps compute has capacity for another prompt: one step's,
and what keeps the next from being short before the report of this one has come back as a grant. More only binds
early."""

RUNNING_TOKENS = 32
"""What one request weighs besides its prompt, in prompt tokens, where ranks are compared by what is ahead of a new one.
Not REQUEST_TOKENS, as in a queue behind one rank: here nobody waits for answers to end, they only make steps longer,
an answer of 300 tokens by what some tens of prompt tokens take. Where prompts are ahead, they decide."""

KV_SHARE = 0.98
"""Of the KV memory, what is given away; the rest is for answers whose length nobody knows. An engine that reserves the
whole answer when a request begins (it says so: `kv_reserved` is more than `kv_used`) needs no such rest: in a memory
for four answers of the whole context it would leave capacity for three."""

STEPS_AHEAD = 3
"""A slot that is free at the end of a step would stay empty in the next: a request may be there already, and wait, for
each that is expected to end within so many steps. None where answers are long, and one empty step is nothing."""

LOOKED_AT = 8
"""So many of the least loaded ranks are looked at before the roomiest one is taken."""

FEW = 16
"""So many ranks with capacity are looked at one by one: while somebody waits, hardly any has. More are kept in
order."""


class Amount:
    """Requests, tokens of their prompts, and tokens of KV that they may come to need."""

    # No Struct, nor is Room: what is set with every message is set at half the cost.
    __slots__ = ("kv", "requests", "tokens")

    def __init__(self, requests: int = 0, tokens: int = 0, kv: int = 0) -> None:
        self.requests = requests
        self.tokens = tokens
        self.kv = kv

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Amount):
            return NotImplemented
        return (self.requests, self.tokens, self.kv) == (other.requests, other.tokens, other.kv)

    def __repr__(self) -> str:
        return f"Amount({self.requests}, {self.tokens}, {self.kv})"

    def add(self, requests: int, tokens: int, kv: int) -> None:
        """So much more; less where they are negative."""
        self.requests += requests
        self.tokens += tokens
        self.kv += kv


class Capacity:
    """One life of one rank. `load`: its latest report; `unacked`: what it was sent beyond; `promised`: by grants and
    credits; `credited`: of that, by credits. `reserved`: for one request. `touched`: whether anything has changed since
    credits were last handed out.
    """

    __slots__ = ("credited", "incarnation", "load", "promised", "rank", "reserved", "touched", "unacked")

    def __init__(self, rank: int, incarnation: int, load: Load, unacked: Amount) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.load = load
        self.unacked = unacked
        self.promised = Amount()
        self.credited = Amount()
        self.reserved = False
        self.touched = True

    def requests(self) -> int:
        """What it has and what was promised."""
        load = self.load
        return load.waiting + load.running + self.unacked.requests + self.promised.requests

    def free_requests(self) -> int:
        """Slots that are neither taken nor promised."""
        load = self.load
        if not load.slots:
            return ANY
        ending = STEPS_AHEAD * load.decoding // load.answer_tokens if load.answer_tokens else 0
        return load.slots + ending - self.requests()

    def free_tokens(self) -> int:
        """Prompt tokens until there is no capacity for another prompt."""
        load = self.load
        if not load.step_tokens:
            return ANY
        ahead = load.prefill_tokens + self.unacked.tokens + self.promised.tokens
        return int(BUDGETS_AHEAD * load.step_tokens) - ahead

    def free_kv(self) -> int:
        load = self.load
        if not load.kv_total:
            return ANY
        used = load.kv_waiting + self.unacked.kv + self.promised.kv
        if load.kv_reserved > load.kv_used:
            return load.kv_total - load.kv_reserved - used
        return int(KV_SHARE * load.kv_total) - load.kv_used - used

    def startable_kv(self) -> int:
        """The most KV of a request that can start here. An empty rank takes anything: else it would fit nowhere."""
        return self.free_kv() if self.load.running or self.requests() else ANY

    def open(self) -> bool:
        """Whether something can start here that is small enough."""
        # `free_requests` and `free_tokens`, written out: this is asked after every report and every promise.
        load, unacked, promised = self.load, self.unacked, self.promised
        slots = load.slots
        if slots:
            if load.answer_tokens:
                slots += STEPS_AHEAD * load.decoding // load.answer_tokens
            if slots <= load.running + load.waiting + unacked.requests + promised.requests:
                return False
        if self.reserved:
            return False
        ahead = load.prefill_tokens + unacked.tokens + promised.tokens
        return not load.step_tokens or ahead < int(BUDGETS_AHEAD * load.step_tokens)

    def work(self) -> int:
        """What it has to do, in prompt tokens. Nobody knows of a credit whether it will be used."""
        load, unacked, promised, credited = self.load, self.unacked, self.promised, self.credited
        requests = load.waiting + load.running + unacked.requests + promised.requests - credited.requests
        return load.prefill_tokens + unacked.tokens + promised.tokens - credited.tokens + RUNNING_TOKENS * requests

    def takes(self, kv: int) -> bool:
        """Whether a request that needs so much KV can start here, reserved or not."""
        return self.free_requests() > 0 and self.free_tokens() > 0 and self.startable_kv() >= kv


def _work(capacity: Capacity) -> int:
    return capacity.work() if capacity.open() else ANY


def _kv(capacity: Capacity) -> int:
    return -capacity.startable_kv() if capacity.open() else 0


class Capacities:
    """The capacities of all ranks that have been heard, in order of rank."""

    def __init__(self) -> None:
        self._capacities: list[Capacity] = []
        self._ranks: list[int] = []
        self._by_rank: dict[int, Capacity] = {}
        self.open: dict[int, Capacity] = {}
        """Those where something can start that is small enough."""
        # Ranks whose places in the orderings are to be found anew when these are asked for.
        self._moved: set[int] = set()
        self._by_load: Ordering[Capacity] = Ordering(self._capacities, _work)
        self._by_kv: Ordering[Capacity] = Ordering(self._capacities, _kv)

    def __len__(self) -> int:
        return len(self._capacities)

    def __iter__(self) -> Iterator[Capacity]:
        return iter(self._capacities)

    def __getitem__(self, place: int) -> Capacity:
        return self._capacities[place]

    def of(self, rank: int) -> Capacity | None:
        """A rank's capacity, None where it has not been heard."""
        return self._by_rank.get(rank)

    def heard(self, rank: int, incarnation: int, load: Load, unacked: Amount) -> None:
        """What a rank has: its latest report, and what is on the wire, which is read again whenever that is asked.
        Another life than before is another rank.
        """
        capacity = self._by_rank.get(rank)
        if capacity is None or capacity.incarnation != incarnation:
            self.forget(rank)
            place = bisect_left(self._ranks, rank)
            capacity = Capacity(rank, incarnation, load, unacked)
            self._ranks.insert(place, rank)
            self._capacities.insert(place, capacity)
            self._by_rank[rank] = capacity
            self._by_load.changed = self._by_kv.changed = None
        capacity.load, capacity.unacked = load, unacked
        self.changed(capacity)

    def reported(self, report: RankReport) -> bool | None:
        """Returns whether something may start there that could not, None where that life of a rank is not known."""
        rank = report.rank
        capacity = self._by_rank.get(rank)
        if capacity is None or capacity.incarnation != report.incarnation:
            return None
        capacity.load = report.load
        capacity.touched = True
        # As `changed` has it, but for what nobody can start at before and after.
        if capacity.open():
            self.open[rank] = capacity
            self._moved.add(rank)
            return True
        if rank in self.open:
            del self.open[rank]
            self._moved.add(rank)
        return capacity.reserved

    def forget(self, rank: int) -> None:
        """The rank is gone, with all that was promised of it."""
        if self._by_rank.pop(rank, None) is not None:
            place = bisect_left(self._ranks, rank)
            del self._ranks[place], self._capacities[place]
            self.open.pop(rank, None)
            self._moved.discard(rank)
            self._by_load.changed = self._by_kv.changed = None

    def promise(self, capacity: Capacity, tokens: int, kv: int) -> None:
        """One that could start there is granted it."""
        promised = capacity.promised
        promised.requests += 1
        promised.tokens += tokens
        promised.kv += kv
        capacity.touched = True
        # As `changed` has it: what is open now was so before.
        if not capacity.open():
            self.open.pop(capacity.rank, None)
        self._moved.add(capacity.rank)

    def changed(self, capacity: Capacity) -> None:
        """What it has, what was promised of it, or whether it is reserved, has changed."""
        rank = capacity.rank
        capacity.touched = True
        if capacity.open():
            self.open[rank] = capacity
        else:
            self.open.pop(rank, None)
        self._moved.add(rank)

    def best(self, kv: int) -> Capacity | None:
        """The least loaded rank that can start a request which needs so much KV, None where none can."""
        if len(self.open) == 1:
            # Mostly so while somebody waits: one slot after the other becomes free.
            (capacity,) = self.open.values()
            return capacity if capacity.startable_kv() >= kv else None
        if len(self.open) <= FEW:
            fits = [capacity for capacity in self.open.values() if capacity.startable_kv() >= kv]
            return min(fits, key=lambda capacity: (capacity.work(), capacity.rank)) if fits else None
        loads, frees = self._orderings()
        if frees.least() > -kv:
            return None
        keys = frees.keys
        for entry in loads.entries[:LOOKED_AT]:
            place = entry & PLACE_MASK
            if entry >> PLACE_BITS >= ANY:
                break
            if keys[place] <= -kv:
                return self._capacities[place]
        return self._capacities[frees.entries[0] & PLACE_MASK]

    def least_loaded(self) -> list[Capacity]:
        """The ranks that can start something; of many, the LOOKED_AT least loaded."""
        if len(self.open) <= FEW:
            return list(self.open.values())
        loads, _ = self._orderings()
        places = [entry & PLACE_MASK for entry in loads.entries[:LOOKED_AT] if entry >> PLACE_BITS < ANY]
        return [self._capacities[place] for place in places]

    def _orderings(self) -> tuple[Ordering[Capacity], Ordering[Capacity]]:
        places = [bisect_left(self._ranks, rank) for rank in self._moved]
        self._moved.clear()
        for ordering in (self._by_load, self._by_kv):
            if ordering.changed is not None:
                ordering.changed.update(places)
            ordering.refresh()
        return self._by_load, self._by_kv

    def most_free(self) -> Capacity | None:
        """Where what fits nowhere now will fit soonest, of those that are not reserved. Looks at all ranks."""
        free = [capacity for capacity in self._capacities if not capacity.reserved]
        return max(
            free, key=lambda capacity: (capacity.startable_kv(), capacity.free_requests(), -capacity.rank), default=None
        )
