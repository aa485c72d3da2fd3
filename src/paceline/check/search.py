"""One breadth-first search for every model: safety in each move, liveness at the end, and a shortest story.

A model says where to begin, what may happen next, and when all is over. A move is a function of a copy of the state.
Safety is asked of each move, and of each state that is over: what is broken raises Violation. Liveness is asked at the
end: from every state, by what happens by itself and without another request or fault, one must be reached in which all
is over. A state that differs from one met before only in that fewer faults of the `spare` kind are left is not looked
at: whatever can happen in it can happen in the other, which was met no later.

**Whole machines as values.** A search sees few states of any one machine and very many of all together. So a machine's
state is a `Part`, which is never changed: `part.after(do, ...)` lets the production machine do it in a copy, and gives
the part that it has become. Two parts are one where `Freezer` makes the same of them. It looks at all attributes of all
objects and knows none by name: an attribute that nobody has thought of costs states and never a behaviour. A class says
itself which of its own attributes are of no consequence to what it does later (`INCIDENTAL`: counters for people,
caches), and a model says which classes are no part of what it walks.

Time is the search's choice. Everything happens at `NOW`; of a time only whether it is set counts, and a timer that is
set may be due at any moment (`timers()` and `expire()` of the machines). What is below 0 stands for "not yet". A dict
or set is one with another that has the same in it, whatever came first.
"""

from __future__ import annotations

import pickle
import resource
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import msgspec
from msgspec import Struct

from paceline.sim.world import Violation

NOW = 1000.0
INFINITE = (float("inf"), float("-inf"))
ATOMS = frozenset({type(None), bool, int, str, bytes})
LOOK_EVERY = 4096
LONGEST_ENDING = 40

T = TypeVar("T")
S = TypeVar("S", bound="Whole")


class Broken(Violation):
    """A move led to what must not be."""


class Same(Exception):
    """The move, as it turns out, is another one's: it is not made."""


class Found(Exception):
    """Something is broken in this state, or by the move from it with this place among all (-1: none)."""

    def __init__(self, state: int, move: int, why: str) -> None:
        self.state, self.move, self.why = state, move, why


def demand(why: str | None) -> None:
    """Raises Broken where an invariant says why it does not hold."""
    if why is not None:
        raise Broken(why)


# Machines as values -----------------------------------------------------------------------------


class Freezer:
    """Makes a value that can be hashed and compared of anything; equal for states that behave alike.

    `besides`: classes that are no part of what is walked.
    """

    def __init__(self, *besides: type) -> None:
        self._besides = frozenset(besides)
        self._kept: dict[type, tuple[str, ...]] = {}

    def __call__(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in ATOMS:
            return value  # type: ignore[no-any-return]
        if kind is float:
            return value if value in INFINITE else -1.0 if value < 0 else 0.0
        if kind in self._besides or callable(value):
            return None
        if isinstance(value, Mapping):
            return tuple(sorted([(self(key), self(one)) for key, one in value.items()], key=repr))
        if kind is list or kind is tuple or kind is deque:
            return tuple([self(one) for one in value])
        if kind is set or kind is frozenset:
            return tuple(sorted([self(one) for one in value], key=repr))
        if isinstance(value, Enum | Part):
            return value
        names = self._kept.get(kind)
        if names is None:
            incidental = {name for base in kind.__mro__ for name in getattr(base, "INCIDENTAL", ())}
            names = self._kept[kind] = tuple(name for name in attributes(value) if name not in incidental)
        return (kind, *[self(getattr(value, name)) for name in names])


def attributes(thing: Any) -> list[str]:
    """The names of an object's attributes: the same, and in the same order, for all of its class."""
    if isinstance(thing, msgspec.Struct):
        return list(thing.__struct_fields__)
    slots = {name for base in type(thing).__mro__ for name in getattr(base, "__slots__", ())}
    return sorted(slots | set(getattr(thing, "__dict__", ())))


class Part(Generic[T]):
    """One state of a machine (or a message), which is never changed; equal to itself alone. `number`: of its kind."""

    __slots__ = ("_after", "_mirrored", "_origin", "_register", "_stored", "number", "thing")

    def __init__(self, register: Register[T], thing: T, number: int, origin: tuple[Any, ...] | None) -> None:
        self.thing, self.number = thing, number
        self._register, self._origin, self._stored = register, origin, b""
        self._after: dict[Hashable, tuple[Part[T], Any]] = {}
        self._mirrored: dict[tuple[int, ...], Part[T]] = {}

    def __repr__(self) -> str:
        return repr(self.thing)

    def after(self, do: Callable[..., Any], *given: Any) -> tuple[Part[T], Any]:
        """What becomes of it by `do`, a function of a copy of it, and what that returns."""
        found = self._after.get((do, given))
        if found is None:
            self._stored = self._stored or pickle.dumps(self.thing)
            copy: T = pickle.loads(self._stored)
            try:
                made = do(copy, *given)
            except Violation:
                raise
            except Exception as error:
                name = type(getattr(copy, "machine", copy)).__name__
                raise Broken(f"the machine of a {name} failed: {type(error).__name__}: {error}") from error
            found = self._after[do, given] = (self._register.part(copy, (self, do, given)), made)
        return found

    def mirrored(self, order: tuple[int, ...]) -> Part[T]:
        """The part in which rank `order[i]` is rank `i`: what the same story, told with other numbers, has led to.

        Of parts of which each event names its rank first (below 0 for none), and at first nobody's.
        """
        found = self._mirrored.get(order)
        if found is None:
            found = self
            if self._origin is not None:
                before, do, (rank, *rest) = self._origin
                found = before.mirrored(order).after(do, order.index(rank) if rank >= 0 else rank, *rest)[0]
            self._mirrored[order] = found
        return found


class Register(Generic[T]):
    """The states of one kind of machine that were met. `key`: equal for those that are one."""

    def __init__(self, key: Callable[[T], Hashable]) -> None:
        self._key = key
        self._parts: dict[Hashable, Part[T]] = {}

    def part(self, thing: T, origin: tuple[Any, ...] | None = None) -> Part[T]:
        """The part that this is a state of."""
        key = self._key(thing)
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = Part(self, thing, len(self._parts), origin)
        return found


# Models -----------------------------------------------------------------------------------------


class Whole:
    """A state of plain attributes, of which lists alone are ever changed in place. `spare`: losses that are left."""

    spare = 0

    def copy(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update({name: [*one] if type(one) is list else one for name, one in self.__dict__.items()})
        return twin

    def values(self, *without: str) -> tuple[Hashable, ...]:
        """All attributes but these, to be compared."""
        kept = [one for name, one in self.__dict__.items() if name not in without]
        return tuple([tuple(one) if type(one) is list else one for one in kept])


class Move(NamedTuple):
    """`what`: for `tell`. `fair`: whether it happens by itself, sooner or later. `do`: to a copy, with `given`."""

    what: tuple[Any, ...]
    fair: bool
    do: Callable[..., None]
    given: tuple[Any, ...] = ()


class Model(Protocol[S]):
    """What is searched."""

    def start(self) -> S: ...

    def moves(self, state: S) -> Iterator[Move]:
        """All that may happen next, always in the same order."""

    def over(self, state: S) -> bool:
        """Whether all that was asked for is done and nothing is under way. Raises Violation."""

    def key(self, state: S) -> Hashable:
        """Equal for states that go on alike, whatever their `spare`; the state may be brought into a normal form."""

    def tell(self, before: S, what: tuple[Any, ...], after: S) -> str: ...

    def stuck(self, state: S) -> str:
        """What is wrong with a state from which nothing that is over can be reached."""


# The walk ---------------------------------------------------------------------------------------


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
            if walk.look() % LOOK_EVERY == 0:
                report(len(walk.parents), len(walk.queue), walk.depths[-1])
                decided = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most_mb * 1024
        stuck = walk.first_stuck() if decided else -1
        if stuck >= 0:
            lines, state = walk.story(stuck)
            more, state = walk.ending(state, len(lines))
            story, violation = lines + more, model.stuck(state)
    except Found as found:
        story, violation = walk.story(found.state, found.move)[0], f"Then: {found.why}."
    seconds = time.perf_counter() - begin
    return Finding(len(walk.parents), walk.moves, walk.depths[-1], seconds, violation, story, decided)


def goes_on(model: Model[S], state: S, met: set[Any]) -> tuple[str, S] | None:
    """What happens by itself next and leads to a state that is not among `met`, where it is put; and that state."""
    for move in model.moves(state):
        after = state.copy()
        if move.fair:
            try:
                move.do(after, *move.given)
            except (Same, Violation):
                continue
            line = model.tell(state, move.what, after)
            key = model.key(after)
            if key not in met:
                met.add(key)
                return line, after
    return None


class Walk(Generic[S]):
    """The states met, by number in the order in which they were; of each which move of which state has led there."""

    def __init__(self, model: Model[S]) -> None:
        self._model = model
        first = model.start()
        self._numbers: dict[Hashable, int] = {model.key(first): 0}
        self.parents, self._places, self.depths = array("l", [-1]), array("H", [0]), array("H", [0])
        self._spare = array("H", [first.spare])
        # The fair moves, and the states that are over.
        self._sources, self._targets, self._over = array("L"), array("L"), array("L")
        self.queue: deque[tuple[int, S]] = deque([(0, first)])
        self.moves = 0

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
        self.depths.append(self.depths[parent] + 1)
        self._spare.append(state.spare)
        self.queue.append((len(self.parents) - 1, state))
        return len(self.parents) - 1

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
        while len(met) < LONGEST_ENDING and (further := goes_on(self._model, state, met)) is not None:
            lines.append(f"{told + len(met) - 1}. {further[0]}.")
            state = further[1]
        return lines, state

    def first_stuck(self) -> int:
        """The nearest state from which no fair moves lead to one that is over, -1 for none."""
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
        return can.find(0)
