"""One breadth-first search for every model: safety in each move, liveness at the end, and a shortest story.

A model says where to begin, what may happen next, and when all is over. A move is a function of a copy of the state.
Safety is asked of each move, and of each state that is over: what is broken raises Violation. Liveness is asked at the
end: from every state, by what happens by itself and without another request or fault, one must be reached in which all
is over. Breadth first means that the story of what goes wrong is a shortest one.

A state that differs from one met before only in that fewer faults of the `spare` kind are left is not looked at:
whatever can happen in it can happen in the other. What happens by itself is the same in both, so liveness is asked of
the other too; and since the other was met no later, a shortest story stays one.
"""

from __future__ import annotations

import resource
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from msgspec import Struct

from paceline.sim.world import Violation

LOOK_EVERY = 4096
LONGEST_ENDING = 40


class State(Protocol):
    """What is walked through. `spare`: how many more losses there may be."""

    @property
    def spare(self) -> int: ...

    def copy(self) -> Self: ...


S = TypeVar("S", bound=State)


class Same(Exception):
    """The move, as it turns out, is another one's: it is not made."""


class Move(NamedTuple):
    """`what`: for `tell`. `fair`: whether it happens by itself, sooner or later. `do`: to a copy, with `given`."""

    what: tuple[Any, ...]
    fair: bool
    do: Callable[..., None]
    given: tuple[Any, ...] = ()


class Whole:
    """A state of plain attributes, of which lists alone are ever changed in place."""

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update({name: [*one] if type(one) is list else one for name, one in self.__dict__.items()})
        return twin


class Requests:
    """What models of requests have in common, whose moves all happen by themselves and are told as they are named."""

    def stuck(self, _: Any) -> str:
        return "a request can never come to its end any more"

    def tell(self, _: Any, what: tuple[Any, ...], __: Any) -> str:
        return str(what[0])


def told(what: str, do: Callable[..., None], *given: Any) -> Move:
    """A move with its name."""
    return Move((what,), True, do, given)


class Model(Protocol[S]):
    """What is searched."""

    def start(self) -> S:
        """The first state."""

    def moves(self, state: S) -> Iterator[Move]:
        """All that may happen next, always in the same order."""

    def over(self, state: S) -> bool:
        """Whether all that was asked for is done and nothing is under way. Raises Violation."""

    def key(self, state: S) -> Hashable:
        """Equal for states that go on alike, whatever their `spare`; the state may be brought into a normal form."""

    def tell(self, before: S, what: tuple[Any, ...], after: S) -> str: ...

    def stuck(self, state: S) -> str:
        """What is wrong with a state from which nothing that is over can be reached."""


class Finding(Struct):
    """What came of a search: `story` is a shortest way to the violation. `decided`: False where memory ran out."""

    states: int
    moves: int
    depth: int
    seconds: float
    violation: str = ""
    story: list[str] = []
    decided: bool = True


def search(model: Model[S], report: Callable[[int, int, int], None] = lambda *_: None, most_mb: int = 4096) -> Finding:
    """Walk all states. `report`: told how many there are, how many are to be looked at, how deep. `most_mb`: of this
    process's memory, all in all."""
    begin = time.perf_counter()
    walk = Walk(model)
    violation, story, decided = "", [], True
    try:
        while walk.queue and decided:
            number = walk.look()
            if number % LOOK_EVERY == 0:
                report(len(walk.parents), len(walk.queue), walk.depth)
                decided = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most_mb * 1024
        stuck = walk.first_stuck() if decided else None
        if stuck is not None:
            lines, state = walk.story(stuck)
            more, state = walk.ending(state, len(lines))
            story, violation = lines + more, model.stuck(state)
    except Found as found:
        story, violation = walk.story(found.state, found.move)[0], f"Then: {found.why}."
    seconds = time.perf_counter() - begin
    return Finding(len(walk.parents), walk.moves, walk.depth, seconds, violation, story, decided)


class Found(Exception):
    """Something is broken in this state, or by the move from it with this place among all (-1: none)."""

    def __init__(self, state: int, move: int, why: str) -> None:
        self.state, self.move, self.why = state, move, why


class Walk(Generic[S]):
    """The states met, by number in the order in which they were; of each which move of which state has led there."""

    def __init__(self, model: Model[S]) -> None:
        self._model = model
        first = model.start()
        self._numbers: dict[Hashable, int] = {model.key(first): 0}
        self.parents, self._places, self._depths = array("l", [-1]), array("H", [0]), array("H", [0])
        self._spare = array("H", [first.spare])
        # The fair moves, and the states that are over.
        self._sources, self._targets, self._over = array("L"), array("L"), array("L")
        self.queue: deque[tuple[int, S]] = deque([(0, first)])
        self.moves = 0

    @property
    def depth(self) -> int:
        """Moves from the first state to the last one met."""
        return self._depths[-1]

    def look(self) -> int:
        """Make all moves of the next state. Returns its number; raises Found."""
        number, state = self.queue.popleft()
        model, numbers, place = self._model, self._numbers, -1
        try:
            if model.over(state):
                self._over.append(number)
            for place, move in enumerate(model.moves(state)):
                after = state.copy()
                try:
                    move.do(after, *move.given)
                except Same:
                    continue
                self.moves += 1
                key = model.key(after)
                target = numbers.get(key)
                if target is None or self._spare[target] < after.spare:
                    target = numbers[key] = self._meet(number, place, after)
                if move.fair:
                    self._sources.append(number)
                    self._targets.append(target)
        except Violation as broken:
            raise Found(number, place, broken.what) from broken
        return number

    def _meet(self, parent: int, place: int, state: S) -> int:
        self.parents.append(parent)
        self._places.append(place)
        self._depths.append(self._depths[parent] + 1)
        self._spare.append(state.spare)
        number = len(self.parents) - 1
        self.queue.append((number, state))
        return number

    def story(self, number: int, last: int = -1) -> tuple[list[str], S]:
        """How this state came about, and `last`, the place of a move that breaks there; and the state."""
        places = [last] if last >= 0 else []
        while number:
            places.append(self._places[number])
            number = self.parents[number]
        state, lines = self._model.start(), list[str]()
        self._model.key(state)
        for count, place in enumerate(reversed(places), 1):
            move = next(move for at, move in enumerate(self._model.moves(state)) if at == place)
            after = state.copy()
            try:
                move.do(after, *move.given)
            except Violation:
                after = state.copy()
            lines.append(f"{count}. {self._model.tell(state, move.what, after)}.")
            self._model.key(after)
            state = after
        return lines, state

    def ending(self, state: S, told: int) -> tuple[list[str], S]:
        """What happens by itself from here on, until nothing does, or no longer than is readable."""
        met, lines = {self._model.key(state)}, list[str]()
        while len(met) < LONGEST_ENDING:
            for move in self._model.moves(state):
                after = state.copy()
                try:
                    move.do(after, *move.given)
                except (Same, Violation):
                    continue
                line = f"{told + len(met)}. {self._model.tell(state, move.what, after)}."
                if move.fair and self._model.key(after) not in met:
                    break
            else:
                break
            met.add(self._model.key(after))
            lines.append(line)
            state = after
        return lines, state

    def first_stuck(self) -> int | None:
        """The nearest state from which no fair moves lead to one that is over."""
        first, link = array("l", [-1]) * len(self.parents), array("l")
        for edge, target in enumerate(self._targets):
            link.append(first[target])
            first[target] = edge
        can, ahead = bytearray(len(self.parents)), list(self._over)
        for number in ahead:
            can[number] = 1
        while ahead:
            edge = first[ahead.pop()]
            while edge >= 0:
                source = self._sources[edge]
                if not can[source]:
                    can[source] = 1
                    ahead.append(source)
                edge = link[edge]
        stuck = can.find(0)
        return None if stuck < 0 else stuck
