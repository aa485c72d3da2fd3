"""How other systems choose a rank, written anew from what they publish of it, and the bound that all are held against.

Two kinds. A `Client` stands for one front-end, as its documentation says: it knows what it has itself in flight, and a
snapshot of all ranks (vLLM's coordinator sends one at most every 100 ms, SGLang's controller reads one every 20 ms).
A `Queue` holds all requests before all ranks, and gives them out between two steps, when the ranks' state is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence as Many
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from paceline.sim.engine import MemoryEngine, Sequence

Floats = NDArray[np.float64]


class Snapshot:
    """All ranks' counts as of one moment, each an array by rank; `kv_use` is a share of the memory."""

    def __init__(self, engines: Many[MemoryEngine]) -> None:
        self.waiting: Floats = np.array([len(one.waiting) for one in engines], dtype=float)
        self.running: Floats = np.array([len(one.running) for one in engines], dtype=float)
        used = [one.kv_used for one in engines]
        self.kv_use: Floats = np.array(used, dtype=float) / engines[0].shape.kv_tokens
        prompts = [sum(sequence.prompt for sequence in one.waiting) for one in engines]
        self.tokens: Floats = np.array([use + more for use, more in zip(used, prompts, strict=True)], dtype=float)


# Clients ----------------------------------------------------------------------------------------


class Client(ABC):
    """One front-end of a peer, `index` of `count`, before `ranks` ranks. `in_flight`: its own requests, by rank."""

    interval_s = 0.1
    """From one snapshot to the next."""
    one = False
    """Whether there is a single one before all ranks, however many front-ends."""

    def __init__(self, index: int, count: int, ranks: int) -> None:
        self.index, self.count, self.ranks = index, count, ranks
        self.in_flight: Floats = np.zeros(ranks)
        self._waiting: Floats = np.zeros(ranks)
        self._running: Floats = np.zeros(ranks)
        self._begin = (ranks * index) // count

    @abstractmethod
    def choose(self, sequence: Sequence) -> int:
        """The rank for a request."""

    def hear(self, snapshot: Snapshot) -> None:
        """A snapshot has come. It replaces all that was known but the own requests in flight."""
        self._waiting, self._running = snapshot.waiting.copy(), snapshot.running

    def engines(self, engines: list[MemoryEngine]) -> None:  # noqa: B027
        """The ranks' engines: their shape, and what they would tell of themselves by events."""

    def heard(self, number: int, ended: bool) -> None:  # noqa: B027
        """One of its requests has got tokens."""


class Vllm032(Client):
    """vLLM 0.32 (`DPLBAsyncMPClient.get_core_engine_for_request`, vllm/v1/engine/core_client.py).

    The least of max(clients x own in flight, waiting + running), plus waiting x 6 x what KV use is above one half.
    Among equals the first from a place that moves on by one with each request. The chosen rank's waiting goes up by
    the number of clients until the next snapshot replaces it.
    """

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._weight: Floats = np.zeros(ranks)

    def hear(self, snapshot: Snapshot) -> None:
        super().hear(snapshot)
        self._weight = 6.0 * np.maximum(0.0, snapshot.kv_use - 0.5)

    def choose(self, sequence: Sequence) -> int:
        waiting = self._waiting
        scores = np.maximum(self.count * self.in_flight, waiting + self._running) + waiting * self._weight
        rank = _first_least(scores, self._begin)
        waiting[rank] += self.count
        self._begin = (self._begin + 1) % self.ranks
        return rank


class Vllm09(Client):
    """vLLM from 0.9 until July 2026 (the same function before): the least of 4 x waiting + running.

    Among equals the first from a place of the client's own. The chosen rank's waiting goes up by the number of clients
    until the next snapshot replaces it, requests on their way included.
    """

    def choose(self, sequence: Sequence) -> int:
        rank = _first_least(4.0 * self._waiting + self._running, self._begin)
        self._waiting[rank] += self.count
        return rank


class SglangTotalTokens(Client):
    """SGLang's `--load-balance-method total_tokens` (`DPBudget`, sglang/srt/managers/data_parallel_controller.py).

    One controller before all ranks, however many front-ends. The rank with the fewest tokens, used and waiting, then
    the fewest requests; what is sent adds its prompt until the next reading of the ranks' state, which replaces it.
    """

    interval_s = 0.02
    one = True

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._tokens: Floats = np.zeros(ranks)
        self._requests: Floats = np.zeros(ranks)

    def hear(self, snapshot: Snapshot) -> None:
        self._tokens, self._requests = snapshot.tokens.copy(), snapshot.waiting + snapshot.running

    def choose(self, sequence: Sequence) -> int:
        least = self._tokens == self._tokens.min()
        rank = int(np.argmin(np.where(least, self._requests, np.inf)))
        self._tokens[rank] += sequence.prompt
        self._requests[rank] += 1
        return rank


def _first_least(scores: Floats, begin: int) -> int:
    """The place of the smallest, the first from `begin` on, round past the end."""
    least = scores.min()
    after = np.flatnonzero(scores[begin:] == least)
    return begin + int(after[0]) if len(after) else int(np.argmax(scores == least))


# Queues -----------------------------------------------------------------------------------------


class Rank:
    """One rank, as a queue sees it: its engine, what it has been given and not yet taken in, when its next turn is."""

    def __init__(self, number: int, engine: MemoryEngine, next_turn: Callable[[], float] = lambda: 0.0) -> None:
        self.number, self.engine, self.next_turn = number, engine, next_turn
        self.given: list[Sequence] = []

    def there(self) -> list[Sequence]:
        self.given = [sequence for sequence in self.given if not sequence.key]
        return [*self.engine.running, *self.engine.waiting, *self.given]


Give = Callable[[Rank, Sequence], None]
"""Lets a rank have a request."""


class Queue(ABC):
    """All requests that have no rank. `give`: to be called for each that gets one."""

    lockstep = True
    """Whether it is for lockstep ranks alone."""
    at_once = False
    """Whether a request may get a rank when it comes, and nothing takes time on its way."""

    def __init__(self, give: Give) -> None:
        self.queue: deque[Sequence] = deque()
        self.give = give

    @abstractmethod
    def pull(self, ranks: Many[Rank]) -> None:
        """These ranks are between two steps, and take what they are given into the next."""


class BfIo(Queue):
    """BF-IO (arXiv 2601.17855, "A Universal Load Balancing Principle"), without lookahead: H = 0.

    Between two steps as many waiting requests as there are free slots are placed such that the largest load becomes as
    small as can be; a rank's load is the KV memory that its requests hold. Placed largest first, each on the least
    loaded rank that has a slot and the memory, which is within 4/3 of the integer program's optimum (Graham 1969).
    """

    def pull(self, ranks: Many[Rank]) -> None:
        slots, kv_tokens = ranks[0].engine.shape.slots, ranks[0].engine.shape.kv_tokens
        # A rank that waits for memory has its next ones already.
        heap = [
            (rank.engine.kv_used, rank.number, slots - len(rank.there()))
            for rank in ranks
            if not rank.engine.waiting and len(rank.there()) < slots
        ]
        heapify(heap)
        free = sum(entry[2] for entry in heap)
        batch = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        left: list[Sequence] = []
        for sequence in sorted(batch, key=lambda one: (-one.prompt, one.number)):
            load, number, room = heap[0] if heap else (kv_tokens, -1, 0)
            if load + sequence.prompt > kv_tokens and (load or not room):
                left.append(sequence)
                continue
            heappop(heap)
            self.give(ranks[number], sequence)
            if room > 1:
                heappush(heap, (load + sequence.prompt, number, room - 1))
        self.queue.extendleft(sorted(left, key=lambda one: -one.number))


class AdpBalance(Queue):
    """TensorRT-LLM's routing of requests among ranks with attention data parallelism (`DefaultADPRouter`,
    tensorrt_llm/_torch/pyexecutor/scheduler/adp_router.py).

    Each iteration, new requests go, longest first, to the rank with the fewest active tokens (then requests), as long
    as it has fewer requests than their mean, rounded up, or than the rank that has most. A rank has at most as many
    requests as slots. Goes with `ContextGate`.
    """

    def pull(self, ranks: Many[Rank]) -> None:
        slots, there = ranks[0].engine.shape.slots, [rank.there() for rank in ranks]
        active = sum(map(len, there))
        batch = [self.queue.popleft() for _ in range(min(len(self.queue), max(0, slots * len(ranks) - active)))]
        expected = min(slots, max(-(-(active + len(batch)) // len(ranks)), *map(len, there)))
        heap = [
            (sum(one.prompt for one in those), len(those), number)
            for number, those in enumerate(there)
            if len(those) < expected
        ]
        heapify(heap)
        for sequence in sorted(batch, key=lambda one: (-one.prompt, one.number)):
            tokens, requests, number = heappop(heap)
            self.give(ranks[number], sequence)
            if requests + 1 < expected:
                heappush(heap, (tokens + sequence.prompt, requests + 1, number))


TIMEOUT_ITERS = 50
BATCHING_WAIT_ITERS = 10
"""What NVIDIA's documentation recommends: `attention_dp_config.timeout_iters` and `.batching_wait_iters`."""


class ContextGate:
    """TensorRT-LLM's ADP balance (its tech blog 10; `_balance_adp_requests` in py_executor.py).

    Prompts are computed in an iteration in which every rank has one, so that none waits for another; and that only
    after so many iterations in which they could have been, so that more prompts come together. Where some rank has
    none, the others wait for so many iterations at most, or until some rank has no answer to write.
    """

    def __init__(self) -> None:
        self._waited = 0
        self._gathered = 0

    def opens(self, ranks: Many[Rank]) -> bool:
        """Whether prompts are computed in the step that all begin now."""
        having = sum(bool(one.engine.prefilling or one.engine.may_begin() or one.given) for one in ranks)
        if not having:
            return True
        all_decode = all(rank.engine.decoding for rank in ranks)
        slots = ranks[0].engine.shape.slots
        if having == len(ranks) and all(rank.engine.decoding < slots for rank in ranks):
            self._waited = 0
            if all_decode and self._gathered < BATCHING_WAIT_ITERS:
                self._gathered += 1
                return False
            if all_decode:
                self._gathered = 0
            return True
        self._waited += 1
        if self._waited >= TIMEOUT_ITERS or not all_decode:
            self._waited = 0
            return True
        return False


class Oracle(Queue):
    """The bound: perfect, instant knowledge.

    One queue before all ranks, no delay anywhere. A request stays in the queue until a rank can compute it next: less
    than one token budget of prompts is ahead of it there, a slot is free, and with the answers of all that run being as
    long as they will be, memory does not run out. Of several such ranks it goes to the one where its first token comes
    soonest.
    """

    lockstep = False
    at_once = True

    def pull(self, ranks: Many[Rank]) -> None:
        while self.queue:
            rank = self._best(ranks, self.queue[0])
            if rank is None:
                break
            self.give(rank, self.queue.popleft())

    def _best(self, ranks: Many[Rank], sequence: Sequence) -> Rank | None:
        best, soonest = None, float("inf")
        for rank in ranks:
            there, engine = rank.there(), rank.engine
            ahead = engine.to_prefill + sum(given.prompt for given in rank.given)
            if ahead >= engine.shape.budget - engine.decoding:
                continue
            when = self._first_token(rank, ahead, sequence)
            if when < soonest and _fits(engine, there, sequence):
                best, soonest = rank, when
        return best

    def _first_token(self, rank: Rank, ahead: int, sequence: Sequence) -> float:
        shape, decoding = rank.engine.shape, rank.engine.decoding
        tokens = ahead + sequence.prompt
        steps = -(-tokens // max(1, shape.budget - decoding))
        return rank.next_turn() + shape.costs.seconds(tokens, 0) + (steps - 1) * shape.costs.seconds(0, decoding)


def _fits(engine: MemoryEngine, there: Many[Sequence], sequence: Sequence) -> bool:
    """Whether a slot is free, and memory suffices until the last of all that are there has ended."""
    if len(there) >= engine.shape.slots:
        return False
    held = [(one.answer - _made(engine, one), one.prompt + one.answer) for one in (*there, sequence)]
    if sum(whole for _, whole in held) <= engine.shape.kv_tokens:
        return True
    # Just before each ends, those that are left have grown by as much: that is where the most is used.
    held.sort(reverse=True)
    used = 0
    for longer, (left, whole) in enumerate(held, 1):
        used += whole - left
        if used + longer * left > engine.shape.kv_tokens:
            return False
    return True


def _made(engine: MemoryEngine, sequence: Sequence) -> int:
    return sequence.made + (engine.steps - sequence.begins if sequence.ends else 0)


CLIENTS: dict[str, type[Client]] = {"vllm-0.32": Vllm032, "vllm-0.9": Vllm09, "sglang-total-tokens": SglangTotalTokens}
QUEUES: dict[str, type[Queue]] = {"bf-io": BfIo, "trtllm-adp": AdpBalance, "oracle": Oracle}
"""`--routing` name to class."""
