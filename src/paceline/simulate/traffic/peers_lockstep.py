"""How other systems treat lockstep ranks, written anew from what they publish. Each has one queue before all ranks,
and gives requests out between two steps, when all ranks' state is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence as Many
from heapq import heapify, heappop, heappush

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.plane import ControlPlane, Fleet
from paceline.simulate.traffic.prefill_quota import PrefillQuota
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence


class OneQueue(ControlPlane):
    """Requests reach the queue `delay_s` after their front-end, and ranks between two steps."""

    def __init__(self, clock: Clock, delay_s: float) -> None:
        self._clock = clock
        self._delay_s = delay_s
        self.queue: deque[Sequence] = deque()
        self._fleet: Fleet

    def start(self, fleet: Fleet) -> None:
        """The ranks."""
        self._fleet = fleet

    def arrive(self, sequence: Sequence) -> None:
        """On its way to the queue."""
        self._clock.at(self._clock.now + self._delay_s, self._join, sequence)

    def _join(self, sequence: Sequence) -> None:
        self.queue.append(sequence)
        self._fleet.nudge()

    @staticmethod
    def give(rank: SimulatedRank, sequence: Sequence) -> None:
        """The rank has it."""
        sequence.rank = rank.number
        rank.engine.add(sequence)


class BfIo(OneQueue):
    """BF-IO (arXiv 2601.17855, "A Universal Load Balancing Principle"), without lookahead: H = 0.

    Between two steps as many waiting requests as there are free slots are placed such that the largest load becomes as
    small as can be; a rank's load is the KV memory that its requests hold. Placed largest first, each on the least
    loaded rank that has a slot and the memory, which is within 4/3 of the integer program's optimum (Graham 1969).
    """

    def pull(self, ranks: list[SimulatedRank]) -> Iterable[int]:
        """Fill the free slots."""
        if not self.queue:
            return ()
        slots, kv_tokens = ranks[0].engine.shape.slots, ranks[0].engine.shape.kv_tokens
        # A rank that waits for memory has its next ones already.
        heap = [
            (rank.engine.kv_used + self._grown(rank), rank.number, slots - len(rank.engine.running))
            for rank in ranks
            if not rank.engine.waiting and len(rank.engine.running) < slots
        ]
        heapify(heap)
        free = sum(entry[2] for entry in heap)
        batch = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        given: set[int] = set()
        left: list[Sequence] = []
        for sequence in sorted(batch, key=lambda one: (-one.prompt, one.number)):
            load, number, room = heap[0] if heap else (kv_tokens, -1, 0)
            if load + sequence.prompt > kv_tokens and (load or not room):
                left.append(sequence)
                continue
            heappop(heap)
            self.give(ranks[number], sequence)
            given.add(number)
            if room > 1:
                heappush(heap, (load + sequence.prompt, number, room - 1))
        self.queue.extendleft(sorted(left, key=lambda one: -one.number))
        return given

    def _grown(self, rank: SimulatedRank) -> int:
        return self._fleet.grown(rank, self._clock.now)


class AdpBalance(OneQueue):
    """TensorRT-LLM's routing of requests among ranks with attention data parallelism (`DefaultADPRouter`,
    tensorrt_llm/_torch/pyexecutor/scheduler/adp_router.py).

    Each iteration, new requests go, longest first, to the rank with the fewest active tokens (then requests), as long
    as it has fewer requests than their mean, rounded up, or than the rank that has most. A rank has at most as many
    requests as slots. Goes with `ContextGate`.
    """

    def pull(self, ranks: list[SimulatedRank]) -> Iterable[int]:
        """Give out what there is."""
        if not self.queue:
            return ()
        slots = ranks[0].engine.shape.slots
        active = [len(rank.engine.running) + len(rank.engine.waiting) for rank in ranks]
        count = min(len(self.queue), max(0, slots * len(ranks) - sum(active)))
        batch = [self.queue.popleft() for _ in range(count)]
        expected = min(slots, max(-(-(sum(active) + count) // len(ranks)), max(active)))
        heap = [
            (sum(one.prompt for one in (*rank.engine.running, *rank.engine.waiting)), active[rank.number], rank.number)
            for rank in ranks
            if active[rank.number] < expected
        ]
        heapify(heap)
        given: set[int] = set()
        for sequence in sorted(batch, key=lambda one: (-one.prompt, one.number)):
            tokens, requests, number = heappop(heap)
            self.give(ranks[number], sequence)
            given.add(number)
            if requests + 1 < expected:
                heappush(heap, (tokens + sequence.prompt, requests + 1, number))
        return given


TIMEOUT_ITERS = 50
BATCHING_WAIT_ITERS = 10
"""What NVIDIA's documentation recommends: `attention_dp_config.timeout_iters` and `.batching_wait_iters`."""


class ContextGate(PrefillQuota):
    """TensorRT-LLM's ADP balance (its tech blog 10; `_balance_adp_requests` in py_executor.py).

    Prompts are computed in an iteration in which every rank has one, so that none waits for another; and that only
    after so many iterations in which they could have been, so that more prompts come together. Where some rank has
    none, the others wait for so many iterations at most, or until some rank has no answer to write.
    """

    def __init__(self) -> None:
        self._waited = 0
        self._gathered = 0

    def tokens(self, ranks: Many[SimulatedRank], busy: Collection[int]) -> int | None:
        """None or all."""
        if not busy:
            return None
        having = [ranks[number].engine for number in busy if ranks[number].engine.wants_prefill()]
        if not having:
            return None
        all_decode = all(rank.engine.decoding for rank in ranks)
        slots = ranks[0].engine.shape.slots
        if len(having) == len(ranks) and all(rank.engine.decoding < slots for rank in ranks):
            self._waited = 0
            if all_decode and self._gathered < BATCHING_WAIT_ITERS:
                self._gathered += 1
                return 0
            if all_decode:
                self._gathered = 0
            return None
        self._waited += 1
        if self._waited >= TIMEOUT_ITERS or not all_decode:
            self._waited = 0
            return None
        return 0


LOCKSTEP_PEERS: dict[str, type[OneQueue]] = {"bf-io": BfIo, "trtllm-adp": AdpBalance}
"""`--routing` name to class, with --lockstep."""
