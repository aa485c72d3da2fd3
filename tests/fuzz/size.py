"""How much a machine remembers: everything that is reachable from it, counted."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

PLAIN = (int, float, bool, type(None), type)


def size_of(thing: Any) -> int:
    """Objects that can be reached, and the bytes of text and byte strings among them, in sixteens."""
    seen: set[int] = set()
    queue, count = deque([thing]), 0
    while queue:
        one = queue.pop()
        count += 1
        if isinstance(one, PLAIN):
            continue
        if isinstance(one, str | bytes | bytearray):
            count += len(one) // 16
            continue
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            queue.extend(one)
            queue.extend(one.values())
        elif isinstance(one, list | tuple | set | frozenset | deque):
            queue.extend(one)
        elif isinstance(one, msgspec.Struct):
            queue.extend(getattr(one, name) for name in one.__struct_fields__)
        elif type(one).__module__.startswith("paceline"):
            queue.extend(getattr(one, "__dict__", {}).values())
            slots = (name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ()))
            queue.extend(getattr(one, name) for name in slots if hasattr(one, name))
    return count
