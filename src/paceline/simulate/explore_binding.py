"""Every interleaving of brokered binding in a small deployment (`explore_binding_world.py` says what may happen).

Two states are one where everything that machines may act on is the same. Left out are counters that only grow and are
only compared with themselves; numbers that are compared with each other are kept as the smallest ones that compare
alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, cast

from paceline.core.dispatch.dispatcher import Brokerage
from paceline.core.dispatch.queue import Broker
from paceline.core.messages import Ask, Grants, LoadView, ReturnShares, Withdraw
from paceline.simulate.explore_binding_world import Limits, Place, World
from paceline.simulate.explore_parts import attributes
from paceline.simulate.explore_search import Finding, search

PLAIN = frozenset({bool, int, str, float, bytes})

DROPPED = frozenset({
    # Counters for people, and numbers of which only the newest counts.
    "_dropped", "_void", "void", "_view_number", "step", "finished", "_next_number", "number",
    # When things are due: a timer that is set may be due at any time. How long something has waited is its place
    # in the line, which is kept.
    "_answered", "_behind_since", "_due", "arrival", "since", "waited_ms",
    # Of PATIENCE grants there are never so many here.
    "_made", "_first", "_oldest",
    # Follows from the rest.
    "_router", "_placement", "_pool_of", "_placed", "candidate", "waiting", "_by_load", "_by_kv", "_by_order",
    "_by_age", "queued", "touched",
    "_members", "_counted", "_counted_ranks", "_at_step", "_publisher",
    # No part of what is walked: independent ranks, never suspended, that all live.
    "_calls", "_introductions", "_group", "_generations", "_stalls", "_suspension",
})  # fmt: skip
TOLD = frozenset(
    {
        ("Binding", "_told"),
        ("Binding", "_heard"),
        ("Ask", "told"),
        ("Withdraw", "told"),
        ("Brokerage", "_told"),
        ("Grants", "asked"),
    }
)
EDITION = frozenset({
    ("Binding", "_edition"), ("Binding", "_returned"), ("Holding", "edition"), ("Ask", "edition"),
    ("ReturnShares", "edition"), ("Shares", "edition"),
})  # fmt: skip
"""Numbers that grow and are compared with each other alone, and with their successors."""


class Numbers(dict[int, int]):
    """Growing numbers to the smallest ones that compare alike: gaps of more than one are one of two."""

    def __init__(self, met: Iterable[int]) -> None:
        before = small = 0
        for number in sorted(set(met)):
            small += min(2, number - before)
            before, self[number] = number, small


def key(place: Place) -> Hashable:
    """Equal for states that go on alike."""
    told: list[int] = []
    edition: list[int] = []
    for machine, up, down in zip(place.machines, place.up, place.down, strict=True):
        binding = machine._binding
        told += [binding._told, binding._heard, *(one.told for one in up if isinstance(one, Ask | Withdraw))]
        told += [number for one in down if isinstance(one, Grants) for number in one.asked.values()]
        edition += [binding._edition, binding._returned]
        edition += [one.edition for one in up if isinstance(one, Ask | ReturnShares)]
        edition += [shares.edition for one in down if isinstance(one, LoadView) for shares in one.shares or ()]
    if place.coordinator is not None:
        told += place.coordinator.broker._told.values()
        for pool in place.coordinator.broker._pools.values():
            edition += [holding.edition for holding in pool.shares._holdings.values()]
    return _freeze(place, Numbers(told), Numbers(edition))


_plans: dict[type, list[tuple[str, str]]] = {}


def _plan(value: object) -> list[tuple[str, str]]:
    """The attributes of a class that count, and what each is."""
    kind = type(value)
    plan = _plans.get(kind)
    if plan is None:
        plan = _plans[kind] = []
        for name in attributes(value):
            place = (kind.__name__, name)
            if name not in DROPPED and not callable(getattr(value, name)):
                plan.append((name, "told" if place in TOLD else "edition" if place in EDITION else ""))
    return plan


def _freeze(value: Any, told: Numbers, edition: Numbers) -> Hashable:
    kind = type(value)
    if value is None or kind in PLAIN:
        return cast(Hashable, value)
    if kind is list or kind is tuple or kind is deque:
        return tuple([_freeze(one, told, edition) for one in value])
    if kind is dict:
        return tuple(sorted([(repr(k), _freeze(v, told, edition)) for k, v in value.items()]))
    if kind is set or kind is frozenset:
        return tuple(sorted(map(repr, value)))
    found: list[Hashable] = [kind.__name__]
    for name, what in _plan(value):
        one = getattr(value, name)
        if not what:
            found.append(_freeze(one, told, edition))
        elif what == "edition":
            found.append(edition[one])
        else:
            found.append(told[one] if type(one) is int else tuple(sorted((who, told[n]) for who, n in one.items())))
    if kind is Broker:
        found.append(tuple([(entry.front_end, entry.request) for entry in value._by_order]))
    elif kind is Brokerage:
        found.append(value.due is not None)
    return tuple(found)


def explore(limits: Limits, report: Callable[[int, int, int], None] = lambda *_: None) -> Finding:
    """Walk all states, the nearest first. `report`: told how many there are, how many must be looked at, how deep."""
    return search(KeyedWorld(limits), report)


class KeyedWorld(World):
    """With the key by which states are one."""

    def key(self, place: Place) -> Hashable:
        """Equal for states that go on alike."""
        return key(place)
