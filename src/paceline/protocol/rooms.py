"""How much each rank can still start at once, and the ranks in order of it.

What a rank has is counted as the exact accounting counts it: its report, and what front-ends have told of that the
report does not hold. On top of that comes what was promised and is not yet told of: grants, and front-ends' shares.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from msgspec import Struct

from paceline.protocol.candidates import PLACE_BITS, PLACE_MASK, Ordering
from paceline.protocol.messages import Load
from paceline.protocol.policy import REQUEST_TOKENS

ANY = 1 << 40
"""More than there ever is: no limit is known."""

BUDGETS_AHEAD = 2
"""A rank with fewer prompt tokens ahead than so many steps compute has room for another prompt."""

LOCKSTEP_BUDGETS_AHEAD = 1
"""Likewise in lockstep, where the prefill quota makes a budget's worth of prompts take several steps."""

KV_SHARE = 0.98
"""Of the KV memory, what is given away; the rest is for answers whose length nobody knows."""

LOOKED_AT = 8
"""So many of the least loaded ranks are looked at before the roomiest one is taken."""


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
    """One life of one rank. `has`: what it has; `granted`, `shared`: what was promised. `reserved`: for one request.

    `touched`: whether anything has changed since shares were last handed out.
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
        return int(KV_SHARE * self.kv_total) - self.has.kv - self.granted.kv - self.shared.kv

    def startable_kv(self) -> int:
        """The most KV of a request that can start here. An empty rank takes anything: else it would fit nowhere."""
        empty = not self.has.requests + self.granted.requests + self.shared.requests
        return ANY if empty else self.free_kv()

    def takes(self, kv: int) -> bool:
        """Whether a request that needs so much KV can start here, reserved or not."""
        return self.free_requests() > 0 and self.free_tokens() > 0 and self.startable_kv() >= kv


def _load(room: Room) -> int:
    if room.reserved or room.free_requests() <= 0 or room.free_tokens() <= 0:
        return ANY
    has, granted = room.has, room.granted
    return has.tokens + granted.tokens + REQUEST_TOKENS * (has.requests + granted.requests)


def _kv(room: Room) -> int:
    if room.reserved or room.free_requests() <= 0 or room.free_tokens() <= 0:
        return 0
    return -room.startable_kv()


class Rooms:
    """The rooms of all ranks that have been heard, in order of rank. `budgets_ahead`: as BUDGETS_AHEAD."""

    def __init__(self, budgets_ahead: int = BUDGETS_AHEAD) -> None:
        self._budgets_ahead = budgets_ahead
        self._rooms: list[Room] = []
        self._ranks: list[int] = []
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
            sizes = (load.slots, load.step_tokens, load.kv_total)
            room = Room(rank, incarnation, *sizes, has, Amount(), Amount(), budgets_ahead=self._budgets_ahead)
            self._ranks.insert(place, rank)
            self._rooms.insert(place, room)
            self._by_load.changed = self._by_kv.changed = None
        else:
            room.slots, room.step_tokens, room.kv_total, room.has = load.slots, load.step_tokens, load.kv_total, has
            self.changed(room)

    def forget(self, rank: int) -> None:
        """The rank is gone, with all that was promised of it."""
        place = self._place(rank)
        if place is not None:
            del self._ranks[place], self._rooms[place]
            self._by_load.changed = self._by_kv.changed = None

    def changed(self, room: Room) -> None:
        """What was promised of it, or whether it is reserved, has changed."""
        room.touched = True
        place = bisect_left(self._ranks, room.rank)
        for ordering in (self._by_load, self._by_kv):
            if ordering.changed is not None:
                ordering.changed.add(place)

    def best(self, kv: int) -> Room | None:
        """The least loaded rank that can start a request which needs so much KV, None where none can."""
        loads, frees = self._by_load, self._by_kv
        loads.refresh()
        if not loads.entries or loads.least() >= ANY:
            return None
        frees.refresh()
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

    def roomiest(self) -> Room | None:
        """Where what fits nowhere now will fit soonest, of those that are not reserved. Looks at all ranks."""
        free = [room for room in self._rooms if not room.reserved]
        return max(free, key=lambda room: (room.startable_kv(), room.free_requests(), -room.rank), default=None)

    def _place(self, rank: int) -> int | None:
        place = bisect_left(self._ranks, rank)
        return place if place < len(self._ranks) and self._ranks[place] == rank else None
