"""The bound that the others are held against: perfect, instant knowledge.

One queue before all ranks, no delay anywhere. A request stays in the queue until a rank can compute it next: less than
one token budget of prompts is ahead of it there, a slot is free, and with the answers of all that run being as long as
they will be, memory does not run out. Of several such ranks it goes to the one where its first token comes soonest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.plane import ControlPlane, Fleet
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence


class Oracle(ControlPlane):
    """Knows everything at once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[Sequence] = deque()
        self._fleet: Fleet

    def start(self, fleet: Fleet) -> None:
        """The ranks that it knows all of."""
        self._fleet = fleet

    def arrive(self, sequence: Sequence) -> None:
        """To a rank that can start it, or into the queue."""
        if not self._queue:
            rank = self._best(self._fleet.ranks, sequence)
            if rank is not None:
                self._fleet.deliver(rank.number, sequence)
                return
        self._queue.append(sequence)

    def pull(self, ranks: list[SimulatedRank]) -> Iterable[int]:
        """From the queue, in order, as far as these ranks can start them."""
        given: set[int] = set()
        while self._queue:
            rank = self._best(ranks, self._queue[0])
            if rank is None:
                break
            sequence = self._queue.popleft()
            sequence.rank = rank.number
            rank.engine.add(sequence)
            given.add(rank.number)
        return given

    def _best(self, ranks: Iterable[SimulatedRank], sequence: Sequence) -> SimulatedRank | None:
        best, soonest = None, float("inf")
        for rank in ranks:
            ahead = rank.engine.to_prefill + sum(waiting.prompt for waiting in rank.inbox)
            if ahead >= rank.engine.shape.budget - rank.engine.decoding:
                continue
            when = self._first_token(rank, ahead, sequence)
            if when < soonest and _fits(rank, sequence):
                best, soonest = rank, when
        return best

    def _first_token(self, rank: SimulatedRank, ahead: int, sequence: Sequence) -> float:
        shape = rank.engine.shape
        room = max(1, shape.budget - rank.engine.decoding)
        tokens = ahead + sequence.prompt
        steps = -(-tokens // room)
        begin = self._fleet.next_turn(rank)
        return begin + shape.costs.seconds(tokens, 0) + (steps - 1) * shape.costs.seconds(0, rank.engine.decoding)


def _fits(rank: SimulatedRank, sequence: Sequence) -> bool:
    """Whether a slot is free, and memory suffices until the last of all that are there has ended."""
    engine = rank.engine
    there = [*engine.running, *engine.waiting, *rank.inbox]
    if len(there) >= engine.shape.slots:
        return False
    held = [(engine.left(one), one.prompt + one.answer) for one in (*there, sequence)]
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
