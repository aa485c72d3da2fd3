"""Where a request belongs: sticky until saturated.

A prompt that begins as an earlier one did costs the rank that has that one's KV almost nothing. So a request waits for
the rank that holds most of its prefix, its home, as long as the predicted wait there is shorter than computing the
prefix anew at whoever could start it now. Both are predicted in seconds, by what each rank says that its steps cost it
(`Load.step_s`, `prompt_token_s`, `answer_token_s`): the prompts ahead, those that wait for the same home before it, and
where a slot or KV memory is lacking the answers that must end first. Nothing of this is a setting.

What is new goes where it starts soonest, and of ranks that start it about as soon where most KV can be spared: where
memory is free, or else where what would be forgotten was used longest ago. So a prompt that many share spreads by
itself: where its home is busy for longer than the prompt takes to compute, another rank has it from then on.

What ranks hold is known from what they say (`dispatch/held.py`), or else from what they were granted and sent
(`core/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from paceline.core.blocks import BLOCK_TOKENS, BlockIndex, unpacked
from paceline.core.dispatch.capacity import ANY, Capacities, Capacity
from paceline.core.dispatch.line import Entry
from paceline.core.dispatch.tenants import TenantLine
from paceline.core.load import Load
from paceline.core.messages import KvDelta
from paceline.core.requests import Receipt

COMPARED = 8
"""So many of the ranks that hold as much are compared, and so many of those that could start it."""

STEP_S, PROMPT_TOKEN_S, STEP_TOKENS, ANSWER_TOKENS = 0.01, 0.0001, 2048, 256
"""What a rank's steps cost, what they and an answer hold, until it has said so."""

ABOUT_AS_SOON_S = 0.05
"""Ranks that start a new prompt within so long of the soonest are chosen among by their memory."""

WORTH_SHARE = 2
"""Who holds less than this part of a prompt is preferred where it can start it, and not waited for: one rank has memory
for a large prompt less often than any has."""

FORGOTTEN = 3
"""What goes is computed anew where its owner comes again, as two of three do, and makes others go in turn: so much in
all. With 1 and 8, 160 sessions on 8 ranks have 0.98 and 0.99 times the turns a second; where memory suffices, it does
not matter.
"""

MOST_MS = 2**48 - 1

LOOKED_AT = 8
"""So many that wait for one home are asked whether they had better go elsewhere."""


def _in_ms(seconds: float) -> int:
    return -1 if seconds == float("inf") else min(MOST_MS, round(1000 * seconds))


class Homes:
    """What the ranks of one queue hold, and which of them a request belongs to."""

    def __init__(self, capacities: Capacities) -> None:
        self.index = BlockIndex()
        self.keys = BlockIndex()
        """Which rank has had clients' keys, each as one block."""
        self.lines: dict[int, TenantLine] = {}
        """Those that wait, by their home; others wait for any rank."""
        self._capacities = capacities
        self._typical = Load()

    def home(self, entry: Entry) -> int | None:
        """The rank that the request had better wait for, None where any will do. What it holds is taken note of."""
        entry.holders = self._holders(entry)
        best, least = None, float("inf")
        for rank, held in entry.holders.items():
            capacity = self._capacities.of(rank)
            if capacity is not None and held * WORTH_SHARE >= entry.whole:
                line = self.lines.get(rank)
                ahead = (len(line), line.tokens) if line is not None else (0, 0)
                cost = self._wait_s(capacity, entry.kv, *ahead) + self._compute_s(capacity, entry.whole - held)
                if cost < least:
                    best, least = rank, cost
        others = [one for one in self._capacities.least_loaded() if one.rank not in entry.holders]
        elsewhere = self.soonest(entry, others)
        other = float("inf") if elsewhere is None else self._cost(elsewhere, entry)
        burden = 0.0 if best is None or elsewhere is None else self._burden_s(elsewhere, entry, entry.holders[best])
        if best is not None:
            held = entry.holders[best]
            entry.receipt = Receipt(best, held, entry.by_key, _in_ms(least), _in_ms(other))
        return None if other + burden < least else best

    def soonest(self, entry: Entry, capacities: Iterable[Capacity]) -> Capacity | None:
        """Of these, where it starts soonest; about as soon, where most memory is to spare. None where none can."""
        fits = [(self._cost(one, entry), one) for one in capacities if one.startable_kv() >= entry.kv]
        if not fits:
            return None
        limit = min(cost for cost, _ in fits) + ABOUT_AS_SOON_S
        spare = self.index.spare
        return max((one for cost, one in fits if cost <= limit), key=lambda one: (spare(one.rank), -one.rank))

    def answer_tokens(self, capacity: Capacity) -> int:
        """What an answer there has had of late."""
        return self._load(capacity).answer_tokens or ANSWER_TOKENS

    def saved_s(self, entry: Entry) -> float:
        """How long what its home holds would take to compute."""
        capacity = None if entry.home is None else self._capacities.of(entry.home)
        return 0.0 if capacity is None else self._compute_s(capacity, entry.whole - entry.tokens)

    def forgotten(self, entry: Entry) -> bool:
        """Whether what its home held of it has had to make room since."""
        if entry.home is None or entry.by_key:
            return False
        last = -(-entry.holders[entry.home] // BLOCK_TOKENS) - 1
        return not self.index.holds(entry.home, entry.blocks[last])

    def strays(self, free: Iterable[Capacity]) -> tuple[Entry, Capacity] | None:
        """Who waits for its home for longer than one of the free ranks would take to compute what it holds there."""
        waiting = [(rank, line) for rank, line in self.lines.items() if len(line)]
        if not waiting:
            return None
        rank, line = max(waiting, key=lambda one: one[1].tokens)
        home = self._capacities.of(rank)
        tokens = 0
        for place, entry in enumerate(line):
            other = self.soonest(entry, free)
            if other is None or place == LOOKED_AT:
                return None
            if home is None:
                return entry, other
            stays = self._wait_s(home, entry.kv, place, tokens) + self._compute_s(home, entry.tokens)
            if self._cost(other, entry) + self._burden_s(other, entry, entry.whole - entry.tokens) < stays:
                return entry, other
            tokens += entry.tokens
        return None

    def granted(self, entry: Entry, rank: int) -> None:
        """It is to be computed there."""
        entry.tokens = max(1, entry.whole - entry.holders.get(rank, 0))
        self.sent(rank, entry.blocks, entry.session)

    def sent(self, rank: int, blocks: Iterable[int], session: int) -> None:
        capacity = self._capacities.of(rank)
        if capacity is not None and capacity.load.kv_total:
            self.index.limit(rank, capacity.load.kv_total // BLOCK_TOKENS)
        if session:
            self.keys.sent(rank, (session,))
        self.index.sent(rank, tuple(blocks))

    def told(self, delta: KvDelta) -> None:
        """A rank has said what it holds, in step with what it said before."""
        self.index.told(delta.rank, unpacked(delta.stored), unpacked(delta.removed), whole=delta.whole)

    def lost(self, rank: int) -> None:
        self.index.forget(rank)
        self.keys.forget(rank)

    def _cost(self, capacity: Capacity, entry: Entry) -> float:
        held = entry.holders.get(capacity.rank, 0)
        return self._wait_s(capacity, entry.kv, 0, 0) + self._compute_s(capacity, entry.whole - held)

    def _burden_s(self, capacity: Capacity, entry: Entry, held: int) -> float:
        """What others lose where a request whose home holds so much of it is computed there anew: those that wait, each
        rank's share of them for as long as that takes; and whoever's KV has to make room for it.
        """
        again = max(0, held - entry.holders.get(capacity.rank, 0))
        waiting = sum(map(len, self.lines.values())) / max(1, len(self._capacities))
        spare = max(0, self.index.spare(capacity.rank)) * BLOCK_TOKENS
        gone = max(0, again - spare)
        return waiting * self._compute_s(capacity, again) + FORGOTTEN * self._compute_s(capacity, gone)

    def _holders(self, entry: Entry) -> dict[int, int]:
        """By rank, how many tokens of the prompt it holds; of ranks that hold as much, the least loaded ones."""
        found: dict[int, int] = {}
        for count, holders in self.index.held(entry.blocks):
            for rank in self._some(holders):
                found[rank] = min(count * BLOCK_TOKENS, entry.whole - 1)
            if len(found) >= COMPARED:
                break
        if not found and entry.session:
            # A key alone promises as much as a prefix would.
            for _, holders in self.keys.held((entry.session,)):
                found, entry.by_key = dict.fromkeys(self._some(holders), entry.whole - 1), True
        return found

    def _some(self, holders: int) -> list[int]:
        ranks = []
        while holders:
            lowest = holders & -holders
            holders ^= lowest
            capacity = self._capacities.of(lowest.bit_length() - 1)
            if capacity is not None:
                ranks.append(capacity)
        ranks.sort(key=lambda capacity: (capacity.work(), capacity.rank))
        return [capacity.rank for capacity in ranks[:COMPARED]]

    # Predicted ----------------------------------------------------------------------------------

    def _load(self, capacity: Capacity) -> Load:
        """A rank's load, with its costs; of one that has computed nothing yet, those of the last that had."""
        load = capacity.load
        if load.prompt_token_s:
            self._typical = load
            return load
        return self._typical

    def _step_s(self, capacity: Capacity) -> float:
        load = self._load(capacity)
        return load.step_s + load.answer_token_s * capacity.load.decoding or STEP_S

    def _compute_s(self, capacity: Capacity, tokens: int) -> float:
        """How long it takes to compute so many tokens of prompts there, beside what it decodes."""
        budget = max(1, (capacity.load.step_tokens or STEP_TOKENS) - capacity.load.decoding)
        return tokens * ((self._load(capacity).prompt_token_s or PROMPT_TOKEN_S) + self._step_s(capacity) / budget)

    def _wait_s(self, capacity: Capacity, kv: int, ahead: int, tokens: int) -> float:
        """How long until a request that may come to need `kv` could begin there, behind `ahead` others with `tokens` to
        compute that wait for the same."""
        load, promised = capacity.load, capacity.promised
        prompts = load.prefill_tokens + capacity.unacked.tokens + promised.tokens - capacity.credited.tokens + tokens
        wait_s = self._compute_s(capacity, max(0, prompts))
        slots, room, running = capacity.free_requests(), capacity.startable_kv(), max(1, capacity.requests())
        ends = max(0, ahead + 1 - slots) if slots < ANY else 0
        if room < ANY and load.kv_used:
            lacking = kv * (ahead + 1) - room
            ends = max(ends, -(-lacking * running // load.kv_used))
        return wait_s + ends * (load.answer_tokens or ANSWER_TOKENS) * self._step_s(capacity) / running
