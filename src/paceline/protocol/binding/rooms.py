"""How much each rank can still start at once, and the ranks in order of it.

What a rank has is counted as the exact accounting counts it: its report, and what front-ends have told of that the
report does not hold. On top of that comes what was promised and is not yet told of: grants, and front-ends' shares.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from msgspec import Struct

from paceline.protocol.messages import Load
from paceline.protocol.routing.candidates import PLACE_BITS, PLACE_MASK, Ordering
from paceline.protocol.routing.policy import REQUEST_TOKENS

ANY = 1 << 40
"""More than there ever is: no limit is known."""

BUDGETS_AHEAD = 2
"""A rank with fewer prompt tokens ahead than so many steps compute has room for another prompt."""

LOCKSTEP_BUDGETS_AHEAD = 1
"""Likewise in lockstep, where the prefill quota makes a budget's worth of prompts take several steps."""

KV_SHARE = 0.98
"""Of the KV memory, what is given away; the rest is for answers whose length nobody knows. An engine that reserves the
whole answer when a request begins (it says so: `kv_reserved` is more than `kv_used`) needs no such rest: in a memory
for four answers of the whole context it would leave room for three."""

STEPS_AHEAD = 3
"""A slot that is free at the end of a step would stay empty in the next: a request may be there already, and wait, for
each that is expected to end within so many steps. None where answers are long, and one empty step is nothing."""

LOOKED_AT = 8
"""So many of the least loaded ranks are looked at before the roomiest one is taken."""

FEW = 16
"""So many ranks with room are looked at one by one: while somebody waits, hardly any has. More are kept in order."""


class Amount(Struct, gc=False):
    """Requests, tokens of their prompts, and tokens of KV that they may come to need."""

    requests: int = 0
    tokens: int = 0
    kv: int = 0

    def add(self, requests: int, tokens: int, kv: int) -> None:
        """So much more; less where they are negative."""
        self.requests += requests
        self.tokens += tokens
        self.kv += kv


class Room(Struct, gc=False):
    """One life of one rank. `slots`, `kv_total`: what may be given away of either. `has`: what it has; `granted`,
    `shared`: what was promised. `reserved`: for one request. `touched`: whether anything has changed since shares were
    last handed out.
    """

    rank: int
    incarnation: int
    slots: int
    step_tokens: int
    kv_total: int
    has: Amount
    granted: Amount
    shared: Amount
    reserved: bool = False
    touched: bool = True
    budgets_ahead: int = BUDGETS_AHEAD

    def free_requests(self) -> int:
        """Slots that are neither taken nor promised."""
        if not self.slots:
            return ANY
        return self.slots - self.has.requests - self.granted.requests - self.shared.requests

    def free_tokens(self) -> int:
        """Prompt tokens until there is no room for another prompt."""
        if not self.step_tokens:
            return ANY
        ahead = self.has.tokens + self.granted.tokens + self.shared.tokens
        return self.budgets_ahead * self.step_tokens - ahead

    def free_kv(self) -> int:
        """Tokens of KV."""
        if not self.kv_total:
            return ANY
        return self.kv_total - self.has.kv - self.granted.kv - self.shared.kv

    def startable_kv(self) -> int:
        """The most KV of a request that can start here. An empty rank takes anything: else it would fit nowhere."""
        empty = not self.has.requests + self.granted.requests + self.shared.requests
        return ANY if empty else self.free_kv()

    def open(self) -> bool:
        """Whether something can start here that is small enough."""
        return not self.reserved and self.free_requests() > 0 and self.free_tokens() > 0

    def load(self) -> int:
        """What it has to do, in prompt tokens."""
        has, granted = self.has, self.granted
        return has.tokens + granted.tokens + REQUEST_TOKENS * (has.requests + granted.requests)

    def takes(self, kv: int) -> bool:
        """Whether a request that needs so much KV can start here, reserved or not."""
        return self.free_requests() > 0 and self.free_tokens() > 0 and self.startable_kv() >= kv


def _sizes(load: Load) -> tuple[int, int, int]:
    """Slots, token budget and KV memory, of which 0 is no limit."""
    ending = STEPS_AHEAD * load.decoding // load.answer_tokens if load.answer_tokens else 0
    reserves = load.kv_reserved > load.kv_used
    kv_total = load.kv_total if reserves else int(KV_SHARE * load.kv_total)
    return (load.slots + ending if load.slots else 0), load.step_tokens, kv_total


def _load(room: Room) -> int:
    return room.load() if room.open() else ANY


def _kv(room: Room) -> int:
    return -room.startable_kv() if room.open() else 0


class Rooms:
    """The rooms of all ranks that have been heard, in order of rank. `budgets_ahead`: as BUDGETS_AHEAD."""

    def __init__(self, budgets_ahead: int = BUDGETS_AHEAD) -> None:
        self._budgets_ahead = budgets_ahead
        self._rooms: list[Room] = []
        self._ranks: list[int] = []
        self._open: dict[int, Room] = {}
        # Ranks whose places in the orderings are to be found anew when these are asked for.
        self._moved: set[int] = set()
        self._by_load: Ordering[Room] = Ordering(self._rooms, _load)
        self._by_kv: Ordering[Room] = Ordering(self._rooms, _kv)

    def __len__(self) -> int:
        return len(self._rooms)

    def __iter__(self) -> Iterator[Room]:
        return iter(self._rooms)

    def __getitem__(self, place: int) -> Room:
        return self._rooms[place]

    def of(self, rank: int) -> Room | None:
        """A rank's room, None where it has not been heard."""
        place = self._place(rank)
        return None if place is None else self._rooms[place]

    def heard(self, rank: int, incarnation: int, load: Load, wire: Amount) -> None:
        """What a rank has: its latest report and what is on the wire. Another life than before is another rank."""
        has = Amount(
            load.waiting + load.running + wire.requests, load.prefill_tokens + wire.tokens,
            max(load.kv_reserved, load.kv_used) + load.kv_waiting + wire.kv,
        )  # fmt: skip
        room = self.of(rank)
        if room is None or room.incarnation != incarnation:
            self.forget(rank)
            place = bisect_left(self._ranks, rank)
            room = Room(rank, incarnation, *_sizes(load), has, Amount(), Amount(), budgets_ahead=self._budgets_ahead)
            self._ranks.insert(place, rank)
            self._rooms.insert(place, room)
            self._by_load.changed = self._by_kv.changed = None
        else:
            room.slots, room.step_tokens, room.kv_total = _sizes(load)
            room.has = has
        self.changed(room)

    def forget(self, rank: int) -> None:
        """The rank is gone, with all that was promised of it."""
        place = self._place(rank)
        if place is not None:
            del self._ranks[place], self._rooms[place]
            self._open.pop(rank, None)
            self._moved.discard(rank)
            self._by_load.changed = self._by_kv.changed = None

    def changed(self, room: Room) -> None:
        """What was promised of it, or whether it is reserved, has changed."""
        room.touched = True
        if room.open():
            self._open[room.rank] = room
        else:
            self._open.pop(room.rank, None)
        self._moved.add(room.rank)

    def open(self) -> bool:
        """Whether any rank can start something that is small enough."""
        return bool(self._open)

    def best(self, kv: int) -> Room | None:
        """The least loaded rank that can start a request which needs so much KV, None where none can."""
        if len(self._open) <= FEW:
            fits = [room for room in self._open.values() if room.startable_kv() >= kv]
            return min(fits, key=lambda room: (room.load(), room.rank), default=None)
        loads, frees = self._orderings()
        if frees.least() > -kv:
            return None
        keys = frees.keys
        for entry in loads.entries[:LOOKED_AT]:
            place = entry & PLACE_MASK
            if entry >> PLACE_BITS >= ANY:
                break
            if keys[place] <= -kv:
                return self._rooms[place]
        return self._rooms[frees.entries[0] & PLACE_MASK]

    def _orderings(self) -> tuple[Ordering[Room], Ordering[Room]]:
        places = [bisect_left(self._ranks, rank) for rank in self._moved]
        self._moved.clear()
        for ordering in (self._by_load, self._by_kv):
            if ordering.changed is not None:
                ordering.changed.update(places)
            ordering.refresh()
        return self._by_load, self._by_kv

    def roomiest(self) -> Room | None:
        """Where what fits nowhere now will fit soonest, of those that are not reserved. Looks at all ranks."""
        free = [room for room in self._rooms if not room.reserved]
        return max(free, key=lambda room: (room.startable_kv(), room.free_requests(), -room.rank), default=None)

    def _place(self, rank: int) -> int | None:
        place = bisect_left(self._ranks, rank)
        return place if place < len(self._ranks) and self._ranks[place] == rank else None
