"""A walk over states that are kept whole, the nearest first: for worlds too varied to be taken apart into numbers.

A state is copied for each move, by pickling. Two states are one where `World.key` says so. Liveness is asked at the
end: from every state one must be reachable in which all is over.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, TypeVar

from msgspec import Struct

from paceline.simulate.world import Violation

P = TypeVar("P")


class Broken(Violation):
    """A move led to what must not be."""


class World(Protocol[P]):
    """What is walked."""

    stuck: str
    """What is wrong with a state from which nothing that is over can be reached."""

    def start(self) -> P:
        """The first state."""

    def moves(self, place: P) -> Iterator[tuple[str, Callable[[P], None]]]:
        """All that may happen next: what it is called, and what to do to a copy. Raises Violation."""

    def over(self, place: P) -> bool:
        """Whether all is over."""

    def key(self, place: P) -> Hashable:
        """Equal for states that go on alike."""


class Finding(Struct):
    """What came of a walk: `story` is a shortest way to a violation, empty where there is none."""

    states: int
    moves: int
    depth: int
    seconds: float
    violation: str = ""
    story: list[str] = []


def search(world: World[P], report: Callable[[int, int, int], None] = lambda *_: None) -> Finding:
    """Walk all states. `report`: told how many there are, how many must be looked at, how deep."""
    begin = time.perf_counter()
    first = world.start()
    numbers: dict[bytes, int] = {_hash(world.key(first)): 0}
    before: list[tuple[int, str]] = [(-1, "")]
    after: list[list[int]] = [[]]
    done: list[int] = [0] if world.over(first) else []
    frontier: list[tuple[int, bytes]] = [(0, pickle.dumps(first))]
    moves = depth = 0

    def story(number: int, last: str = "") -> list[str]:
        told = [last] if last else []
        while number:
            number, what = before[number]
            told.append(what)
        return [f"{place:3}. {what}" for place, what in enumerate(reversed(told), 1)]

    while frontier:
        reached: list[tuple[int, bytes]] = []
        for number, stored in frontier:
            for what, move in world.moves(pickle.loads(stored)):
                place = pickle.loads(stored)
                moves += 1
                try:
                    move(place)
                except Violation as broken:
                    seconds = time.perf_counter() - begin
                    return Finding(len(before), moves, depth + 1, seconds, broken.what, story(number, what))
                found = _hash(world.key(place))
                other = numbers.get(found)
                if other is None:
                    other = numbers[found] = len(before)
                    before.append((number, what))
                    after.append([])
                    reached.append((other, pickle.dumps(place)))
                    if world.over(place):
                        done.append(other)
                after[number].append(other)
        depth += bool(reached)
        report(len(before), len(reached), depth)
        frontier = reached
    stuck = _stuck(after, done)
    seconds = time.perf_counter() - begin
    if stuck is None:
        return Finding(len(before), moves, depth, seconds)
    return Finding(len(before), moves, depth, seconds, world.stuck, story(stuck))


def _hash(key: Hashable) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def _stuck(after: list[list[int]], done: list[int]) -> int | None:
    """The nearest state from which none of those that are done can be reached."""
    sources: list[list[int]] = [[] for _ in after]
    for number, targets in enumerate(after):
        for target in targets:
            sources[target].append(number)
    can = set(done)
    queue = list(done)
    while queue:
        for source in sources[queue.pop()]:
            if source not in can:
                can.add(source)
                queue.append(source)
    return next((number for number in range(len(after)) if number not in can), None)
