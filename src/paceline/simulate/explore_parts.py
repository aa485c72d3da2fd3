"""Interned parts: states of machines, messages and links as small numbers.

A walk sees few states of any one machine and very many of all together. So every state of a part is kept once and
named by a number, what a part does on an event is computed once by the production machine and looked up afterwards,
and the state of the whole deployment is a handful of numbers.

Two states of a machine are one where `freeze` makes the same value of them. It keeps every attribute but those named
in `DROPPED`, each of which says why the machine's later effects cannot depend on it, or only in ways that no wave can
see. An attribute that nobody has thought of is kept, which costs states and never a behaviour.

Time is a choice of the walk's. Everything happens at `NOW`; a timer that is set is due at `LATER`, whenever it was to
be due, and a tick may come at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar, cast

import msgspec

NOW = 1000.0
LATER = 2000.0
INFINITY = float("inf")

DROPPED: Mapping[str, frozenset[str]] = {
    "Coordinator": frozenset(
        {
            # A counter for people.
            "_dropped",
            # When views go out, and what loads are in them: front-ends may hear any published state at any time.
            "_publisher", "_load_table", "_frontends", "_stalls",
            # No front-end of the walk is brokered (`explore_binding.py` walks those that are).
            "broker",
        }
    ),
    # A cache of what `_entries` holds.
    "Membership": frozenset({"_members"}),
    # Durations decide when a timer is due, and a tick comes at any time.
    "GroupWave": frozenset({"_repeat_s"}),
    # `shown` follows from the rest.
    "Suspending": frozenset({"_repeat_s", "shown"}),
    "Generations": frozenset({"_repeat_s"}),
    "Introductions": frozenset({"_repeat_s", "_begun"}),
    # A node is there, sooner or later, and is waited for.
    "DeploymentScaling": frozenset({"_repeat_s", "_nodeless_since"}),
    # Loads, counters and averages go into reports, which the walk turns off. The requests' names stand in `Life` as
    # what is left to do of each. `_mid_step` is read of independent ranks only.
    # The walk's ranks have no prefill quota.
    "Rank": frozenset({"step", "requests", "_reporter", "_mid_step", "quota"}),
}  # fmt: skip

T = TypeVar("T")


class RankLabel(int):
    """A rank's number, wherever a machine or a message holds one.

    Equal to the plain number. That it is told apart from other numbers lets `renumber` give the ranks other
    numbers in any machine's state, without knowing the machine.
    """


ATOMS = frozenset({type(None), bool, int, str, bytes})

_names: dict[type, tuple[str, ...]] = {}
_kept: dict[type, tuple[str, ...]] = {}


def freeze(value: Any) -> Hashable:
    """The value as something that can be hashed and compared; equal for states that behave alike."""
    kind = type(value)
    if kind in ATOMS or kind is float:
        return cast(Hashable, value)
    if kind is RankLabel:
        return ("rank", int(value))
    if kind is dict:
        return ("dict", tuple(sorted(((freeze(key), freeze(one)) for key, one in value.items()), key=repr)))
    if kind is set or kind is frozenset:
        return ("set", tuple(sorted((freeze(one) for one in value), key=repr)))
    if kind is list or kind is tuple or kind is deque:
        return tuple([freeze(one) for one in value])
    if isinstance(value, Enum):
        return value
    kept = _kept.get(kind)
    if kept is None:
        dropped = DROPPED.get(kind.__name__, frozenset())
        kept = _kept[kind] = tuple(name for name in attributes(value) if name not in dropped)
    parts = [getattr(value, name) for name in kept]
    return (kind.__name__, tuple([one if type(one) in ATOMS else freeze(one) for one in parts]))


def attributes(thing: Any) -> tuple[str, ...]:
    """The names of an object's attributes: the same, and in the same order, for all of its class."""
    kind = type(thing)
    names = _names.get(kind)
    if names is None:
        if isinstance(thing, msgspec.Struct):
            names = thing.__struct_fields__
        else:
            slots = {name for base in kind.__mro__ for name in getattr(base, "__slots__", ())}
            names = tuple(sorted(slots | set(getattr(thing, "__dict__", ()))))
        _names[kind] = names
    return names


def renumber(value: Any, ranks: Callable[[int], int] = lambda rank: rank) -> Any:
    """A deep copy in which rank `r` is `ranks(r)` and every timer that is set is due at `LATER`."""
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is float:
        return LATER if NOW <= value < INFINITY else value
    if kind is RankLabel:
        return RankLabel(ranks(value))
    if kind is dict:
        return {renumber(key, ranks): renumber(one, ranks) for key, one in value.items()}
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return kind([renumber(one, ranks) for one in value]) if value else kind()
    if kind is deque:
        return deque((renumber(one, ranks) for one in value), value.maxlen)
    if isinstance(value, Enum) or callable(value):
        return value
    names = attributes(value)
    if isinstance(value, msgspec.Struct):
        parts = [getattr(value, name) for name in names]
        return kind(*[one if type(one) in ATOMS else renumber(one, ranks) for one in parts])
    copy = object.__new__(kind)
    for name in names:
        one = getattr(value, name)
        setattr(copy, name, one if type(one) in ATOMS else renumber(one, ranks))
    return copy


class Once(dict[int, T]):
    """By a part's number, what `make` makes of it: once, when it is first asked for."""

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, number: int) -> T:
        made = self[number] = self._make(number)
        return made


class Register(Generic[T]):
    """Things by number: the first that was met of each kind. `key`: equal for things that are one."""

    def __init__(self, key: Callable[[T], Hashable] = freeze) -> None:
        self._key = key
        self._numbers: dict[Hashable, int] = {}
        self._things: list[T] = []

    def __len__(self) -> int:
        return len(self._things)

    def __getitem__(self, number: int) -> T:
        return self._things[number]

    def number(self, thing: T) -> int:
        """The number of what is equal to `thing`; a new one where there is none yet."""
        key = self._key(thing)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._things)
            self._things.append(thing)
        return number
