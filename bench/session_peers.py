"""How other systems keep sessions where their prefixes are, written anew from what they publish of it.

Each knows prefixes as its own documentation says: from what it has sent itself, forgotten as the engines forget (so the
guess is better here than theirs), or exactly, where theirs takes the engines' events. A prefix counts in the trace's
own blocks. Where what is published leaves a figure open, the docstring says what was taken.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from bench.peers import Client, Floats, Snapshot

from paceline.core.blocks import BlockIndex
from paceline.sim.engine import MemoryEngine, Sequence

POINTS = 160
"""Of a worker on a ring of hashes."""


def hashed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class SessionHash(Client):
    """A session's key modulo the number of engines, as SkyRL and other trainers do (`hash(session_id) % engines`)."""

    def choose(self, sequence: Sequence) -> int:
        return hashed(f"session {sequence.session}") % self.ranks


class ConsistentHash(Client):
    """The vLLM router's `consistent_hash`: the next point of a ring, where each worker has 160. Blind to load."""

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        points = [(hashed(f"{rank} {point}"), rank) for rank in range(ranks) for point in range(POINTS)]
        self._ring = sorted(points)
        self._keys = np.array([key for key, _ in self._ring], dtype=np.uint64)

    def choose(self, sequence: Sequence) -> int:
        place = int(np.searchsorted(self._keys, np.uint64(hashed(f"session {sequence.session}"))))
        return self._ring[place % len(self._ring)][1]


class PrefixAffinity(SessionHash):
    """SGLang's `prefix_affinity` (its pull request 31170): by routing key, one controller before all ranks, with a
    guard: a preferred rank that is overloaded is passed over for the one with the fewest requests. Taken here: it is
    overloaded with more than twice the mean number of requests, and more than four above the least.
    """

    one = True
    interval_s = 0.02

    def choose(self, sequence: Sequence) -> int:
        rank, there = super().choose(sequence), self.in_flight
        if there[rank] <= max(2 * there.mean(), there.min() + 4):
            return rank
        return int(np.argmin(there))


class OfPrefixes(Client):
    """One that remembers what it has sent, for as long as an engine of that memory would keep it."""

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self.index_of: BlockIndex = BlockIndex()
        self._block_tokens = 0

    def engines(self, engines: list[MemoryEngine]) -> None:
        shape = engines[0].shape
        self._block_tokens = shape.block_tokens
        self.index_of.capacity = shape.kv_tokens // shape.block_tokens

    def matched(self, sequence: Sequence) -> Floats:
        """By rank, how many tokens of its prompt are there."""
        found: Floats = np.zeros(self.ranks)
        for count, holders in self.index_of.held(sequence.blocks):
            for rank in range(self.ranks):
                if holders >> rank & 1:
                    found[rank] = count * self._block_tokens
        return found

    def sent(self, rank: int, sequence: Sequence) -> int:
        self.index_of.sent(rank, sequence.blocks)
        return rank


class CacheAware(OfPrefixes):
    """SMG's `cache_aware` (the SGLang model gateway; its documentation's defaults).

    Where the most requests in flight are more than 64 above the least and more than 1.5 times as many, the least
    loaded worker; else the one with the longest match, if that is more than 0.3 of the prompt; else the least loaded.
    """

    def choose(self, sequence: Sequence) -> int:
        there, matched = self.in_flight, self.matched(sequence)
        imbalanced = there.max() - there.min() > 64 and there.max() > 1.5 * there.min()
        if imbalanced or matched.max() <= 0.3 * sequence.prompt:
            return self.sent(int(np.argmin(there)) if imbalanced else self.unmatched(), sequence)
        best = np.where(matched == matched.max(), there, np.inf)
        return self.sent(int(np.argmin(best)), sequence)

    def unmatched(self) -> int:
        return int(np.argmin(self.in_flight))


class VllmCacheAware(CacheAware):
    """The vLLM router's `cache_aware`, which was forked from the same rule before it changed: what matches nowhere goes
    to the worker with the smallest tree."""

    def unmatched(self) -> int:
        return min(range(self.ranks), key=lambda rank: (-self.index_of.spare(rank), rank))


class LlmdScorers(OfPrefixes):
    """llm-d's default profile: the sum of a prefix score (weight 3), a queue score (2) and a score of free KV memory
    (2), each from 0 to 1; the queue's between the shortest and the longest. Metrics are read every 50 ms.
    """

    interval_s = 0.05

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._kv: Floats = np.zeros(ranks)

    def hear(self, snapshot: Snapshot) -> None:
        super().hear(snapshot)
        self._kv = snapshot.kv_use

    def choose(self, sequence: Sequence) -> int:
        waiting = self._waiting
        span = waiting.max() - waiting.min()
        queue = (waiting.max() - waiting) / span if span else np.ones(self.ranks)
        scores = 3 * self.matched(sequence) / sequence.prompt + 2 * queue + 2 * (1 - self._kv)
        best = np.where(scores >= scores.max() - 1e-9, self.in_flight, np.inf)
        return self.sent(int(np.argmin(best)), sequence)


class OfWork(OfPrefixes):
    """One that counts the tokens that it has sent somewhere to be computed, until the first token comes back."""

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self.uncached: Floats = np.zeros(ranks)
        self._open: dict[int, tuple[int, float]] = {}

    def sent(self, rank: int, sequence: Sequence) -> int:
        lacking = sequence.prompt - float(self.matched(sequence)[rank])
        self._open[sequence.number] = (rank, lacking)
        self.uncached[rank] += lacking
        return super().sent(rank, sequence)

    def heard(self, number: int, ended: bool) -> None:
        rank, lacking = self._open.pop(number, (0, 0.0))
        self.uncached[rank] -= lacking


class LlmdSticky(OfWork):
    """llm-d's "sticky until saturated" (its blog of that name): the endpoint with the longest match while its uncached
    tokens in flight are below a threshold; else, and for what matches nowhere, the one with the fewest, those that this
    prompt lacks there included.

    The threshold is to be calibrated for model and accelerator. Taken: what a rank computes in a second and a half.
    """

    threshold = 16_384

    def choose(self, sequence: Sequence) -> int:
        matched, work = self.matched(sequence), self.uncached
        if matched.max() > 0:
            rank = int(np.argmin(np.where(matched == matched.max(), work, np.inf)))
            if work[rank] < self.threshold:
                return self.sent(rank, sequence)
        return self.sent(int(np.argmin(work + sequence.prompt - matched)), sequence)


class DynamoKv(OfWork):
    """Dynamo's KV router (`overlap_score_weight` 1, temperature 0, KV events: what ranks hold is known exactly).

    The least of (tokens to prefill there, this prompt's uncached ones included) / block + blocks of the requests that
    are there, this one's included; as far as the router itself has sent them.
    """

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._engines: list[MemoryEngine] = []
        self._active: Floats = np.zeros(ranks)
        self._blocks: dict[int, tuple[int, int]] = {}

    def engines(self, engines: list[MemoryEngine]) -> None:
        super().engines(engines)
        self._engines = engines

    def matched(self, sequence: Sequence) -> Floats:
        counts = [engine.holds(sequence.blocks) for engine in self._engines]
        return np.array(counts, dtype=float)

    def choose(self, sequence: Sequence) -> int:
        blocks = -(-sequence.prompt // self._block_tokens)
        prefill = (self.uncached + sequence.prompt - self.matched(sequence)) / self._block_tokens
        costs = prefill + self._active + blocks
        rank = int(np.argmin(costs))
        self._active[rank] += blocks
        self._blocks[sequence.number] = (rank, blocks)
        return self.sent(rank, sequence)

    def heard(self, number: int, ended: bool) -> None:
        super().heard(number, ended)
        if ended and number in self._blocks:
            rank, blocks = self._blocks.pop(number)
            self._active[rank] -= blocks


SESSION_CLIENTS: dict[str, type[Client]] = {
    "smg-cache-aware": CacheAware,
    "vllm-router-cache-aware": VllmCacheAware,
    "vllm-router-consistent-hash": ConsistentHash,
    "llm-d-sticky": LlmdSticky,
    "llm-d-scorers": LlmdScorers,
    "sglang-prefix-affinity": PrefixAffinity,
    "dynamo-kv": DynamoKv,
    "skyrl-session-hash": SessionHash,
}
"""`--routing` name to class."""
