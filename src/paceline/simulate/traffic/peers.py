"""How other systems choose a rank, written anew from what they publish of it. For comparison only.

Each has its clients (front-ends) as its documentation says, and each client knows what it has itself in flight, and a
snapshot of all ranks: vLLM's coordinator sends one at most every 100 ms, SGLang's controller reads one every 20 ms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.plane import ControlPlane, Fleet
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence

Floats = NDArray[np.float64]


class Snapshot:
    """All ranks' counts as of one moment, each an array by rank; `kv_use` is a share of the memory."""

    __slots__ = ("kv_use", "running", "tokens", "waiting")

    def __init__(self, fleet: Fleet, when: float) -> None:
        ranks = fleet.ranks
        counts = [rank.counts for rank in ranks]
        self.waiting = np.array([count.waiting for count in counts], dtype=float)
        self.running = np.array([count.running for count in counts], dtype=float)
        used = [rank.counts.kv_used + fleet.grown(rank, when) for rank in ranks]
        kv_tokens = ranks[0].engine.shape.kv_tokens
        self.kv_use = np.array(used, dtype=float) / kv_tokens
        self.tokens = np.array(
            [use + sum(one.prompt for one in rank.engine.waiting) for use, rank in zip(used, ranks, strict=True)]
        )


class Client(ABC):
    """One front-end of a peer, `index` of `count`, before `ranks` ranks. `in_flight`: its own requests, by rank."""

    interval_s = 0.1
    """From one snapshot to the next."""

    one = False
    """Whether there is a single one before all ranks, however many front-ends."""

    def __init__(self, index: int, count: int, ranks: int) -> None:
        self.index, self.count, self.ranks = index, count, ranks
        self.in_flight: Floats = np.zeros(ranks)

    @abstractmethod
    def choose(self, sequence: Sequence) -> int:
        """The rank for a request."""

    @abstractmethod
    def hear(self, snapshot: Snapshot) -> None:
        """A snapshot has come."""


class Vllm032(Client):
    """vLLM 0.32 (`DPLBAsyncMPClient.get_core_engine_for_request`, vllm/v1/engine/core_client.py).

    The least of max(clients x own in flight, waiting + running), plus waiting x 6 x what KV use is above one half.
    Among equals the first from a place that moves on by one with each request. The chosen rank's waiting goes up by
    the number of clients until the next snapshot replaces it.
    """

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._waiting: Floats = np.zeros(ranks)
        self._running: Floats = np.zeros(ranks)
        self._weight: Floats = np.zeros(ranks)
        self._begin = (ranks * index) // count

    def hear(self, snapshot: Snapshot) -> None:
        """Replaces all that was known but the own requests in flight."""
        self._waiting, self._running = snapshot.waiting.copy(), snapshot.running
        self._weight = 6.0 * np.maximum(0.0, snapshot.kv_use - 0.5)

    def choose(self, sequence: Sequence) -> int:
        """The least score."""
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

    def __init__(self, index: int, count: int, ranks: int) -> None:
        super().__init__(index, count, ranks)
        self._waiting: Floats = np.zeros(ranks)
        self._running: Floats = np.zeros(ranks)
        self._begin = (ranks * index) // count

    def hear(self, snapshot: Snapshot) -> None:
        """Replaces all that was known."""
        self._waiting, self._running = snapshot.waiting.copy(), snapshot.running

    def choose(self, sequence: Sequence) -> int:
        """The least score."""
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
        """Replaces all that was known."""
        self._tokens = snapshot.tokens.astype(float)
        self._requests = snapshot.waiting + snapshot.running

    def choose(self, sequence: Sequence) -> int:
        """The least of (tokens, requests)."""
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


class PeerPlane(ControlPlane):
    """A peer's clients, and what tells them of the ranks. `delay_s`: how long a message is on its way."""

    def __init__(self, clock: Clock, kind: type[Client], clients: int, ranks: int, delay_s: float) -> None:
        self._clock = clock
        self._delay_s = delay_s
        self._interval_s = kind.interval_s
        self._one = kind.one
        self._clients = [kind(index, clients, ranks) for index in range(1 if self._one else clients)]
        self._news: deque[tuple[float, Snapshot]] = deque()
        self._heard = [-1.0] * len(self._clients)
        self._ends: list[deque[tuple[float, int]]] = [deque() for _ in self._clients]
        self._fleet: Fleet
        self._ticking = False
        self._unfinished = 0

    def start(self, fleet: Fleet) -> None:
        """Its ranks."""
        self._fleet = fleet

    def arrive(self, sequence: Sequence) -> None:
        """Choose, and send."""
        place = 0 if self._one else sequence.frontend
        client = self._clients[place]
        self._listen(place)
        rank = client.choose(sequence)
        client.in_flight[rank] += 1
        self._unfinished += 1
        self._clock.at(self._clock.now + self._delay_s, self._deliver, (rank, sequence))
        if not self._ticking:
            self._ticking = True
            self._clock.at(self._clock.now + self._interval_s, self._tick)

    def ended(self, rank: SimulatedRank, sequences: Iterable[Sequence]) -> None:
        """The clients hear of it in a moment."""
        when = self._clock.now + self._delay_s
        for sequence in sequences:
            self._unfinished -= 1
            self._ends[0 if self._one else sequence.frontend].append((when, rank.number))

    def _deliver(self, what: tuple[int, Sequence]) -> None:
        self._fleet.deliver(*what)

    def _tick(self, _: None) -> None:
        # What the ranks were like when they sent it; it is published now.
        self._news.append((self._clock.now + self._delay_s, Snapshot(self._fleet, self._clock.now - self._delay_s)))
        while len(self._news) > 1 and self._news[1][0] <= self._clock.now:
            self._news.popleft()
        self._ticking = self._unfinished > 0
        if self._ticking:
            self._clock.at(self._clock.now + self._interval_s, self._tick)

    def _listen(self, place: int) -> None:
        """Bring a client up to date: the newest snapshot that is there, and what has ended."""
        client, now = self._clients[place], self._clock.now
        ends = self._ends[place]
        while ends and ends[0][0] <= now:
            client.in_flight[ends.popleft()[1]] -= 1
        for when, snapshot in reversed(self._news):
            if when <= now:
                if when > self._heard[place]:
                    self._heard[place] = when
                    client.hear(snapshot)
                break


PEERS: dict[str, type[Client]] = {
    "vllm-0.32": Vllm032,
    "vllm-0.9": Vllm09,
    "sglang-total-tokens": SglangTotalTokens,
}
"""`--routing` name to class, of whom the name alone tells."""
