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
from collections.abc import Callable, Hashable, Iterator, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec

NOW = 1000.0
LATER = 2000.0

DROPPED: Mapping[str, frozenset[str]] = {
    "Coordinator": frozenset(
        {
            # Counters for people.
            "_view_number", "_dropped",
            # When views go out, and what loads are in them: front-ends may hear any published state at any time.
            "_clock", "_board", "_members_due", "_members_sent", "_published_state", "_front_ends", "_stalls",
            # Follows from `_suspension`.
            "_suspension_state",
        }
    ),
    # A cache of what `_entries` holds.
    "Membership": frozenset({"_members"}),
    # Durations decide when a timer is due, and a tick comes at any time.
    "GroupWave": frozenset({"_repeat_s"}),
    "GroupSuspension": frozenset({"_repeat_s"}),
    "Generations": frozenset({"_repeat_s"}),
    "Introductions": frozenset({"_repeat_s"}),
    # Loads, counters and averages go into reports, which the walk turns off. The requests' names stand in `Life` as
    # what is left to do of each. `_mid_step` is read of independent ranks only.
    "Rank": frozenset({"step", "requests", "_reporter", "_mid_step"}),
}  # fmt: skip

T = TypeVar("T")


class RankLabel(int):
    """A rank's number, wherever a machine or a message holds one.

    Equal to the plain number. That it is told apart from other numbers lets `renumber` give the ranks other
    numbers in any machine's state, without knowing the machine.
    """


def freeze(value: Any) -> Hashable:
    """The value as something that can be hashed and compared; equal for states that behave alike."""
    if isinstance(value, RankLabel):
        return ("rank", int(value))
    if value is None or isinstance(value, bool | int | float | str | bytes | Enum):
        return value
    if isinstance(value, dict):
        return ("dict", tuple(sorted(((freeze(key), freeze(one)) for key, one in value.items()), key=repr)))
    if isinstance(value, set | frozenset):
        return ("set", tuple(sorted((freeze(one) for one in value), key=repr)))
    if isinstance(value, list | tuple | deque):
        return tuple(freeze(one) for one in value)
    kind = type(value).__name__
    dropped = DROPPED.get(kind, frozenset())
    return (kind, tuple((name, freeze(one)) for name, one in attributes(value) if name not in dropped))


def attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """An object's attributes, in an order that is the same for all of its class."""
    if isinstance(thing, msgspec.Struct):
        names: Any = thing.__struct_fields__
    else:
        slots = {name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())}
        names = sorted(slots | set(getattr(thing, "__dict__", ())))
    for name in names:
        if hasattr(thing, name):
            yield name, getattr(thing, name)


def renumber(value: Any, ranks: Callable[[int], int] = lambda rank: rank) -> Any:
    """A deep copy in which rank `r` is `ranks(r)` and every timer that is set is due at `LATER`."""
    if isinstance(value, RankLabel):
        return RankLabel(ranks(value))
    if isinstance(value, float):
        return LATER if NOW <= value < float("inf") else value
    if value is None or isinstance(value, bool | int | str | bytes | Enum) or callable(value):
        return value
    if isinstance(value, dict):
        return {renumber(key, ranks): renumber(one, ranks) for key, one in value.items()}
    if isinstance(value, deque):
        return deque((renumber(one, ranks) for one in value), value.maxlen)
    if isinstance(value, set | frozenset | list | tuple):
        return type(value)(renumber(one, ranks) for one in value)
    if isinstance(value, msgspec.Struct):
        return type(value)(**{name: renumber(one, ranks) for name, one in attributes(value)})
    copy = object.__new__(type(value))
    for name, one in attributes(value):
        setattr(copy, name, renumber(one, ranks))
    return copy


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
