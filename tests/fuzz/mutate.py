"""Bytes out of bytes: a message with one thing changed, and its bytes with some of them wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tests.fuzz.grammar import EDGES, FLOATS, TEXTS

LARGEST = 1 << 16
BAD_HEADS = (b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\x91" * 2000, b"\xc1")


class Mutator:
    """Draws from a corpus. `make`: a valid message now and then, encoded; None where there is no grammar."""

    def __init__(self, draw: random.Random, corpus: Sequence[bytes], make: Callable[[], bytes] | None) -> None:
        self._draw = draw
        self._corpus = corpus
        self._make = make

    def next(self) -> bytes:
        draw = self._draw.random()
        if self._make is not None and draw < 0.4:
            return self._make()
        return self.mutated(self._draw.choice(self._corpus))

    def mutated(self, frame: bytes) -> bytes:
        draw = self._draw.random()
        if draw < 0.02:
            return frame
        if draw < 0.6:
            try:
                changed = self._changed(msgspec.msgpack.decode(frame))
                return msgspec.msgpack.encode(changed)[:LARGEST]
            except (ValueError, TypeError, OverflowError, RecursionError):
                pass
        for _ in range(self._draw.choice((1, 1, 2, 4, 16))):
            frame = self._bytes_changed(frame)
        return frame[:LARGEST]

    def _changed(self, value: Any) -> Any:
        if isinstance(value, list) and value and self._draw.random() < 0.9:
            place = self._draw.randrange(len(value))
            draw = self._draw.random()
            if draw < 0.1:
                return value[:place]
            if draw < 0.2:
                return [*value[:place], *[value[place]] * self._draw.choice((2, 3, 300)), *value[place + 1 :]]
            if draw < 0.25:
                return [*value, self._anything()]
            return [*value[:place], self._changed(value[place]), *value[place + 1 :]]
        if isinstance(value, dict) and value and self._draw.random() < 0.9:
            key = self._draw.choice(list(value))
            rest = {one: kept for one, kept in value.items() if one != key}
            return rest | {self._changed(key) if self._draw.random() < 0.4 else key: self._changed(value[key])}
        if isinstance(value, int) and not isinstance(value, bool) and self._draw.random() < 0.7:
            return self._draw.choice((*EDGES, value + 1, value - 1, -value, self._draw.getrandbits(63)))
        return self._anything()

    def _anything(self) -> Any:
        inside: Any = self._draw.choice((None, True, b"\xff", "a", 1, []))
        for _ in range(self._draw.choice((0, 1, 3, 600))):
            inside = [inside]
        return self._draw.choice(
            (None, True, False, b"", self._draw.randbytes(9), inside, {"a": inside}, self._draw.choice(TEXTS),
             self._draw.choice(FLOATS), self._draw.choice(EDGES))
        )  # fmt: skip

    def _bytes_changed(self, frame: bytes) -> bytes:
        draw, size = self._draw, len(frame)
        at = draw.randrange(size + 1)
        match draw.randrange(8):
            case 0 if at < size:
                return frame[:at] + bytes([frame[at] ^ 1 << draw.randrange(8)]) + frame[at + 1 :]
            case 1 if at < size:
                return frame[:at] + draw.randbytes(1) + frame[at + 1 :]
            case 2:
                return frame[:at] + draw.randbytes(draw.choice((1, 2, 8))) + frame[at:]
            case 3:
                return frame[:at] + frame[at + draw.choice((1, 2, 8)) :]
            case 4:
                return frame[:at]
            case 5:
                other = draw.choice(self._corpus)
                return frame[:at] + other[draw.randrange(len(other) + 1) :]
            case 6:
                part = frame[at : at + draw.randrange(1, 9)]
                return frame[:at] + part * draw.choice((2, 50)) + frame[at:]
            case _:
                return draw.choice(BAD_HEADS) + frame[at:]
