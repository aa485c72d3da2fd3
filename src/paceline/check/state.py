"""Whole machines as values: each state of a machine is kept once, and what it does on an event is computed once.

A search sees few states of any one machine and very many of all together. So a machine's state is a `Part`, which is
never changed: `part.after(do, ...)` lets the production machine do it in a copy, and gives the part that it has become.
Two parts are one where `freeze` makes the same of them. It looks at all attributes of all objects and knows none by
name; an attribute that nobody has thought of is kept, which costs states and never a behaviour. What is left out is
said in two places. A class says itself which of its own attributes are of no consequence to what it does later
(`INCIDENTAL`: counters for people, caches). And a model says which classes are no part of what it walks.

Time is the search's choice. Everything happens at `NOW`; of a time only whether it is set counts, and a timer that is
set may be due at any moment (`timers()` and `expire()` of the machines). Durations decide when timers are due, so they
count for nothing; what is below 0 stands for "not yet". A dict or set is one with another that has the same in it,
whatever came first.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import msgspec

from paceline.sim.world import Violation

NOW = 1000.0
INFINITE = (float("inf"), float("-inf"))
ATOMS = frozenset({type(None), bool, int, str, bytes})

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class Broken(Violation):
    """A move led to what must not be."""


def demand(why: str | None) -> None:
    """Raises Broken where an invariant says why it does not hold."""
    if why is not None:
        raise Broken(why)


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
        self.thing = thing
        self.number = number
        self._register = register
        self._origin = origin
        self._stored = b""
        self._after: dict[Hashable, tuple[Part[T], Any]] = {}
        self._mirrored: dict[tuple[int, ...], Part[T]] = {}

    def __repr__(self) -> str:
        return repr(self.thing)

    def after(self, do: Callable[Concatenate[T, P], R], *given: P.args, **_: P.kwargs) -> tuple[Part[T], R]:
        """What becomes of it by `do`, a function of a copy of it, and what that returns."""
        found = self._after.get((do, given))
        if found is None:
            self._stored = self._stored or pickle.dumps(self.thing)
            copy: T = pickle.loads(self._stored)
            try:
                made = do(copy, *given)  # type: ignore[call-arg]
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
