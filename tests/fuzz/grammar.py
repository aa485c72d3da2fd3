"""Messages that are valid and absurd: of any type, with the numbers at which things break."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from paceline.core.messages import PROTOCOL_VERSION

EDGES = (
    0, 1, 2, 3, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**48 - 1, 2**48, 2**53 - 1, 2**53, 2**63 - 1, 2**64 - 1,
    -1, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, 5e-324, 1e-9, 1e308, 1.7976931348623157e308, -1.0, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "tcp://127.0.0.1:9", "ipc:///x", "tcp://", "é" * 9, "\x00", "\ud7ff", "x" * 600, "%s{0}\n")
LONGEST = 40


class Grammar:
    """Draws valid values of msgspec types. `known`: integers that mean something to whoever is fuzzed; `parties`: what
    belongs together, by the names of fields.
    """

    def __init__(
        self, draw: random.Random, known: Sequence[int] = (), parties: Sequence[Mapping[str, int]] = ()
    ) -> None:
        self._draw = draw
        self._known = known
        self._parties = parties
        self._party: Mapping[str, int] = {}

    def message(self, kinds: Sequence[type]) -> Any:
        self._party = self._draw.choice(self._parties) if self._parties and self._draw.random() < 0.7 else {}
        return self.value(msgspec.inspect.type_info(self._draw.choice(kinds)))

    def value(self, kind: Any, name: str = "", depth: int = 0) -> Any:
        """A value of a type as `msgspec.inspect` describes it; `name`: the field's."""
        match kind:
            case msgspec.inspect.StructType(cls, fields):
                values = [self.value(field.type, field.name, depth + 1) for field in fields]
                return cls(*values)
            case msgspec.inspect.IntType(gt, ge, lt, le):
                low = ge if ge is not None else (gt + 1 if gt is not None else -(2**63))
                high = le if le is not None else (lt - 1 if lt is not None else 2**64 - 1)
                if name in self._party and self._draw.random() < 0.9:
                    return self._party[name]
                return PROTOCOL_VERSION if name == "version" else self._integer(int(low), int(high))
            case msgspec.inspect.FloatType(gt, ge, lt, le):
                low, high = ge if ge is not None else gt, le if le is not None else lt
                return self._float(low, high, gt is not None)
            case msgspec.inspect.StrType(min_length, max_length):
                text = self._draw.choice(TEXTS)[: max_length or LONGEST]
                return text or "a" * (min_length or 0)
            case msgspec.inspect.ListType(item):
                return [self.value(item, name, depth + 1) for _ in range(self._length(depth))]
            case msgspec.inspect.DictType(key, value):
                pairs = range(self._length(depth))
                return {self.value(key, name, depth + 1): self.value(value, name, depth + 1) for _ in pairs}
            case msgspec.inspect.TupleType(items):
                return tuple(self.value(item, name, depth + 1) for item in items)
            case msgspec.inspect.UnionType(types):
                return self.value(self._draw.choice(types), name, depth)
            case msgspec.inspect.LiteralType(literals):
                return self._draw.choice(literals)
            case msgspec.inspect.BytesType():
                return self._draw.randbytes(self._draw.randrange(9))
            case msgspec.inspect.BoolType():
                return self._draw.random() < 0.5
            case msgspec.inspect.NoneType() | msgspec.inspect.AnyType():
                return None
        return kind

    def _length(self, depth: int) -> int:
        return self._draw.choice((0, 0, 1, 1, 2, 3, LONGEST if depth < 3 else 2))

    def _integer(self, low: int, high: int) -> int:
        draw = self._draw.random()
        if draw < 0.4 and self._known:
            found = self._draw.choice(self._known)
        elif draw < 0.8:
            found = self._draw.choice((*EDGES, *(low, high, high - 1) * 3))
        else:
            found = self._draw.getrandbits(self._draw.randrange(1, 64))
        return min(max(found, low), high)

    def _float(self, low: float | None, high: float | None, open_below: bool) -> float:
        found = self._draw.choice(FLOATS)
        if low is not None and (found < low or (open_below and found == low)):
            return low + 1e-6 if open_below else low
        return min(found, high) if high is not None else found
