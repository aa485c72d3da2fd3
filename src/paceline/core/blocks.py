"""Beginnings of prompts, and which rank holds which.

An engine with a prefix cache does not compute again what it holds the KV of. A prompt's beginning is known by its
blocks of BLOCK_TOKENS, each named by the hash of itself and all before it, so that one name says the whole beginning.
Where a rank says what it holds (`rank/kv.py`), that is known, and beside it what it was sent of late. Else what a rank
was sent it holds, until other prompts have taken its memory: each rank's blocks are remembered in the order of their
last use, as many as fit into its KV memory, and the least lately used are forgotten first, as the engine itself does.
One map from a block to the ranks that hold it (as the bits of an int) finds the longest prefix of all ranks at once, so
that the number of ranks hardly matters; what matters is the prompt's length, and that costs a hash a block, once a
request.
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

EXPECTED = 2 * MAX_PROMPT_BLOCKS
"""So many blocks that a rank was sent, and has not yet said that it holds."""

MANY_SETS = 4096
"""So many sets of ranks are kept once, whichever blocks they hold."""


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


def extend_hashes(
    names: list[int], token_ids: Sequence[int], count: int, block_tokens: int = BLOCK_TOKENS
) -> list[int]:
    """Add the names of the whole blocks among the first `count` tokens behind those that are there; returns the new."""
    new: list[int] = []
    last = min(count // block_tokens, MAX_PROMPT_BLOCKS)
    for place in range(len(names), last):
        block = tuple(token_ids[place * block_tokens : (place + 1) * block_tokens])
        new.append(hash((new[-1] if new else names[-1] if names else 0, block)))
    names += new
    return new


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
        self._told: dict[int, int] = {}
        """By rank that says what it holds, how many blocks it does: those in `_blocks` it was only sent."""
        self._sets: dict[int, int] = {}
        """Each set of holders once: most blocks have the same few."""

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values())) + sum(self._told.values())

    def count(self, rank: int) -> int:
        """How many blocks it is believed to hold."""
        return len(self._blocks.get(rank, ())) + self._told.get(rank, 0)

    def spare(self, rank: int) -> int:
        """Blocks that it can still take before it forgets any."""
        return self._room(rank) - self.count(rank)

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
        held, told = self._blocks.setdefault(rank, OrderedDict()), rank in self._told
        # The last block first: what is left when room runs out is a prefix, and not a tail that nothing leads to.
        for block in reversed(blocks):
            if block in held:
                held.move_to_end(block)
            elif not (told and self.holds(rank, block)):
                held[block] = None
                self._add(rank, block)
        self._shorten(rank, held)

    def told(self, rank: int, stored: Sequence[int], removed: Sequence[int], *, whole: bool) -> None:
        """The rank says what it holds, and holds no more; `whole`: nothing else."""
        if whole:
            self._drop_told(rank)
        sent, count = self._blocks.setdefault(rank, OrderedDict()), self._told.get(rank, 0)
        for block in removed:
            if block in sent:
                del sent[block]
                self._drop(rank, block)
            elif self.holds(rank, block):
                self._drop(rank, block)
                count -= 1
        for block in stored:
            if block in sent:
                del sent[block]
                count += 1
            elif not self.holds(rank, block):
                self._add(rank, block)
                count += 1
        self._told[rank] = count
        self._shorten(rank, sent)

    def forget(self, rank: int) -> None:
        """It holds nothing."""
        self._drop_told(rank)
        self._told.pop(rank, None)
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
        room = EXPECTED if rank in self._told else self._room(rank)
        while len(held) > room:
            self._drop(rank, held.popitem(last=False)[0])

    def _add(self, rank: int, block: int) -> None:
        holders = self._holders.get(block, 0) | 1 << rank
        if len(self._sets) > MANY_SETS:
            self._sets.clear()
        self._holders[block] = self._sets.setdefault(holders, holders)

    def _drop(self, rank: int, block: int) -> None:
        left = self._holders[block] & ~(1 << rank)
        if left:
            self._holders[block] = self._sets.setdefault(left, left)
        else:
            del self._holders[block]

    def _drop_told(self, rank: int) -> None:
        """All that it has said. Looks at every block: it happens where a rank is lost, or a delta was."""
        if not self._told.get(rank):
            return
        sent = self._blocks.get(rank, ())
        for block in [one for one, holders in self._holders.items() if holders >> rank & 1 and one not in sent]:
            self._drop(rank, block)
        self._told[rank] = 0
