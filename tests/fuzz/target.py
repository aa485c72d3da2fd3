"""What is fuzzed: a decoder and the machine behind it, as one thing that takes bytes."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import zmq

from paceline.core.codec import BadMessage, Decoder, encode

PAUSES_S = (0.0, 0.0, 1e-4, 1e-3, 0.02, 0.3, 5.0)


class Target(ABC):
    """Lives for a round of inputs, is checked, and begins anew: `begin`, many times `feed`, `check`.

    `corpus`: its folder. `kinds`: the classes of messages that its grammar makes, none where it is fed other bytes.
    `known`: integers that mean something to it; `parties`: those of them that belong together, by the names of fields.
    `largest`: what it may remember, as `size_of` counts it, however long a round is.
    """

    name: str
    corpus: str
    kinds: Sequence[type] = ()
    known: Sequence[int] = ()
    parties: Sequence[Mapping[str, int]] = ()
    largest = 20_000

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.now = 1000.0

    @abstractmethod
    def begin(self) -> None:
        """A fresh machine."""

    def feed(self, frame: bytes) -> None:
        """One input. Raises nothing, whatever it is."""
        try:
            message = self.decode(frame)
        except BadMessage:
            return
        self.take(message)

    def decode(self, frame: bytes) -> Any:
        raise NotImplementedError

    def take(self, message: Any) -> None:
        """What a frame has come to."""
        raise NotImplementedError

    def check(self) -> None:  # noqa: B027
        """The round is over: whatever must be so still is."""

    def machines(self) -> list[Any]:
        return []

    def pass_time(self) -> None:
        self.now += self.draw.choice(PAUSES_S)


class Frames:
    """Stands for a socket: what has come in, to be read without waiting."""

    closed = False

    def __init__(self) -> None:
        self._messages: deque[list[bytes]] = deque()
        self._rest: list[bytes] = []

    def arrive(self, *frames: bytes) -> None:
        self._messages.append(list(frames))

    def recv(self, flags: int = 0) -> bytes:
        if not self._rest and not self._messages:
            raise zmq.Again
        self._rest = self._rest or self._messages.popleft()
        return self._rest.pop(0)

    def getsockopt(self, option: int) -> int:
        assert option == zmq.RCVMORE
        return bool(self._rest)


def said_well(message: Any, decoder: Decoder[Any]) -> None:
    """What a machine says must be a message to whoever hears it."""
    decoder.decode(encode(message))
