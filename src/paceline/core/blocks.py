"""Beginnings of prompts, and which rank holds which.

An engine with a prefix cache does not compute again what it holds the KV of. A prompt's beginning is known by its
blocks of BLOCK_TOKENS, each named by the hash of itself and all before it, so that one name says the whole beginning.
What a rank was sent it holds, until other prompts have taken its memory: each rank's blocks are remembered in the order
of their last use, as many as fit into its KV memory, and the least lately used are forgotten first, as the engine
itself does. One map from a block to the ranks that hold it (as the bits of an int) finds the longest prefix of all
ranks at once, so that the number of ranks hardly matters; what matters is the prompt's length, and that costs a hash a
block, once a request.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 128
"""A prefix counts in whole blocks. Smaller ones find more and cost more: a microsecond each."""

MAX_PROMPT_BLOCKS = 2048
"""What of a prompt is looked at: its first 262,144 tokens."""

MAX_ENTRIES = 262_144
"""Blocks remembered over all ranks, a block of two ranks twice; each rank has an equal share, at least
LEAST_ENTRIES. About 200 bytes each, so some 50 MB where all are used."""

LEAST_ENTRIES = 64


def block_hashes(token_ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> tuple[int, ...]:
    """The names of a prompt's whole blocks. Ints hash alike in every process, so all processes have the same."""
    end = min(len(token_ids) // block_tokens, MAX_PROMPT_BLOCKS) * block_tokens
    tokens = tuple(token_ids[:end])
    hashes: list[int] = []
    chained = 0
    for begin in range(0, end, block_tokens):
        chained = hash((chained, tokens[begin : begin + block_tokens]))
        hashes.append(chained)
    return tuple(hashes)


def packed(names: Sequence[int]) -> bytes:
    """Names as they travel: eight bytes each."""
    return array("q", names).tobytes()


def unpacked(frame: bytes) -> Sequence[int]:
    """The names again; bytes that are no whole name are left out."""
    names = array("q")
    names.frombytes(frame[: len(frame) // 8 * 8])
    return names


class BlockIndex:
    """Which rank holds which blocks. `capacity`: blocks of one rank, where it has no limit of its own."""

    def __init__(self) -> None:
        self.capacity = MAX_ENTRIES
        self._holders: dict[int, int] = {}
        self._blocks: dict[int, OrderedDict[int, None]] = {}
        self._rooms: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values()))

    def spare(self, rank: int) -> int:
        """Blocks that it can still take before it forgets any."""
        return self._room(rank) - len(self._blocks.get(rank, ()))

    def holds(self, rank: int, block: int) -> bool:
        return bool(self._holders.get(block, 0) >> rank & 1)

    def longest(self, blocks: Sequence[int]) -> tuple[int, int]:
        """How many of the first `blocks` some rank holds, and which ranks do: bit n for rank n."""
        for count, holders in self.held(blocks):
            return count, holders
        return (0, 0)

    def held(self, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """How many of the first `blocks` ranks hold, and which do, from the longest on; nobody twice."""
        known, steps, holders = self._holders, list[tuple[int, int]](), -1
        count = 0
        for block in blocks:
            further = holders & known.get(block, 0)
            if further != holders:
                if count:
                    steps.append((count, holders & ~further))
                holders = further
                if not further:
                    break
            count += 1
        if holders and count:
            steps.append((count, holders))
        return reversed(steps)

    def sent(self, rank: int, blocks: Sequence[int]) -> None:
        """The rank computes these, or has them already."""
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
        """It holds nothing."""
        self._rooms.pop(rank, None)
        for block in self._blocks.pop(rank, ()):
            self._drop(rank, block)

    def limit(self, rank: int, blocks: int) -> None:
        """Its memory holds no more than so many."""
        if self._rooms.get(rank) != blocks:
            self._rooms[rank] = blocks
            if rank in self._blocks:
                self._shorten(rank, self._blocks[rank])

    def resize(self, capacity: int) -> None:
        """Let each rank have `capacity` blocks."""
        self.capacity = capacity
        for rank, held in self._blocks.items():
            self._shorten(rank, held)

    def _room(self, rank: int) -> int:
        return min(self.capacity, self._rooms.get(rank, self.capacity))

    def _shorten(self, rank: int, held: OrderedDict[int, None]) -> None:
        room = self._room(rank)
        while len(held) > room:
            self._drop(rank, held.popitem(last=False)[0])

    def _drop(self, rank: int, block: int) -> None:
        left = self._holders[block] & ~(1 << rank)
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
