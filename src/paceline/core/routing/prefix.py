"""Routing by prefix: to the rank that was sent the longest beginning of this prompt before.

An engine with a prefix cache does not compute again what it holds the KV of. What a rank holds is not known here,
but what it was sent is, and that is a good guess: blocks of BLOCK_TOKENS, each named by the hash of itself and all
before it, are remembered for each rank, the least recently used forgotten first. One map from a block to the ranks
that were sent it (as the bits of an int) finds the longest prefix of all ranks at once, so that the number of ranks
hardly matters; what matters is the prompt's length, and that costs a hash a block.

A front-end remembers what went through it alone. Others' sends, and what a rank's engine has evicted, it does not
know: a wrong guess costs what routing without affinity costs always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from paceline.core.routing.candidates import Candidates
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy, Query, guard, least_loaded

BLOCK_TOKENS = 128
"""A prefix counts in whole blocks. Smaller ones find more and cost more: a microsecond each."""

MAX_PROMPT_BLOCKS = 256
"""What of a prompt is looked at: its first 32,768 tokens."""

MAX_ENTRIES = 262_144
"""Blocks remembered over all ranks, a block of two ranks twice; each rank has an equal share, at least
LEAST_ENTRIES. About 200 bytes each, so some 50 MB where all are used."""

LEAST_ENTRIES = 64

COMPARED = 16
"""Of many ranks with the same prefix, so many least loaded ones are compared as least-load does."""


class BlockIndex:
    """Which rank was sent which blocks. `capacity`: blocks of one rank."""

    def __init__(self) -> None:
        self.capacity = MAX_ENTRIES
        self._holders: dict[int, int] = {}
        self._blocks: dict[int, OrderedDict[int, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values()))

    def longest(self, blocks: Sequence[int]) -> tuple[int, int]:
        """How many of the first `blocks` some rank was sent, and which ranks: bit n for rank n."""
        holders, count = -1, 0
        for block in blocks:
            further = holders & self._holders.get(block, 0)
            if not further:
                break
            holders, count = further, count + 1
        return (count, holders) if count else (0, 0)

    def sent(self, rank: int, blocks: Sequence[int]) -> None:
        """`rank` is sent a prompt of these blocks."""
        held = self._blocks.setdefault(rank, OrderedDict())
        bit = 1 << rank
        # The last block first: what is left when room runs out is a prefix, and not a tail that nothing leads to.
        for block in reversed(blocks):
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
                self._holders[block] = self._holders.get(block, 0) | bit
        self._shorten(rank, held)

    def forget(self, rank: int) -> None:
        """The rank has gone, and its caches with it."""
        for block in self._blocks.pop(rank, ()):
            self._drop(rank, block)

    def resize(self, capacity: int) -> None:
        """Let each rank have `capacity` blocks."""
        self.capacity = capacity
        for rank, held in self._blocks.items():
            self._shorten(rank, held)

    def _shorten(self, rank: int, held: OrderedDict[int, None]) -> None:
        while len(held) > self.capacity:
            self._drop(rank, held.popitem(last=False)[0])

    def _drop(self, rank: int, block: int) -> None:
        left = self._holders[block] & ~(1 << rank)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


def block_hashes(token_ids: Sequence[int]) -> list[int]:
    """The names of a prompt's whole blocks. Ints hash alike in every process, so runs can be repeated."""
    end = min(len(token_ids) // BLOCK_TOKENS, MAX_PROMPT_BLOCKS) * BLOCK_TOKENS
    tokens = tuple(token_ids[:end])
    hashes: list[int] = []
    chained = 0
    for begin in range(0, end, BLOCK_TOKENS):
        chained = hash((chained, tokens[begin : begin + BLOCK_TOKENS]))
        hashes.append(chained)
    return hashes


class Prefix(Policy):
    """The rank that was sent the longest prefix of the prompt, unless it has too much to do (`affinity.py`).

    Among several with the same prefix, and where no rank has one or all that have are overloaded: as LeastLoad.
    """

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self.index = BlockIndex()
        self._least = LeastLoad(frontend_index, frontend_count)
        self._lives: dict[int, int] = {}
        self._membership: tuple[Candidates, int] | None = None
        self._reason = ""

    def choose(self, candidates: Candidates, query: Query) -> int:
        known = self._membership
        if known is None or known[0] is not candidates or known[1] != candidates.membership:
            self._take_members(candidates)
        blocks = block_hashes(query.prompt_token_ids)
        count, holders = self.index.longest(blocks) if blocks else (0, 0)
        rank = self._choose(candidates, query, count, holders)
        if blocks:
            self.index.sent(rank, blocks)
        return rank

    def reason(self) -> str:
        return self._reason

    def _choose(self, candidates: Candidates, query: Query, count: int, holders: int) -> int:
        if not count:
            self._reason = "no prefix known"
            return self._least.choose(candidates, query)
        works = self._least.works(candidates)
        places = self._usable(candidates, holders, guard(works, count * BLOCK_TOKENS))
        if not places:
            self._reason = f"ranks with {count * BLOCK_TOKENS} tokens of prefix are overloaded"
            return self._least.choose(candidates, query)
        self._reason = f"{count * BLOCK_TOKENS} tokens of prefix"
        return candidates.ranks[places[0]] if len(places) == 1 else self._least.choose_among(candidates, query, places)

    def _usable(self, candidates: Candidates, holders: int, limit: int) -> list[int]:
        """The places of the ranks to choose among, of those in `holders`; empty where all have too much to do."""
        works = self._least.works(candidates)
        if holders.bit_count() > COMPARED:
            return least_loaded(works, holders, candidates.ranks, limit, COMPARED)
        places = []
        while holders:
            lowest = holders & -holders
            holders ^= lowest
            place = candidates.place(lowest.bit_length() - 1)
            if place is not None and works.keys[place] <= limit:
                places.append(place)
        return places

    def _take_members(self, candidates: Candidates) -> None:
        lives = {candidate.rank: candidate.life for candidate in candidates}
        for rank, life in self._lives.items():
            if lives.get(rank) != life:
                self.index.forget(rank)
        self._lives = lives
        self._membership = (candidates, candidates.membership)
        self.index.resize(max(LEAST_ENTRIES, MAX_ENTRIES // len(candidates)))
