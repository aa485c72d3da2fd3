"""Links between machines: frames, first in first out, delayed, held, cut or lost.

A link is one direction of one connection. What is on a link when its sender dies still arrives; what is on it when
its receiver dies does not. A broadcast is sent on one link a receiver, so it can be lost to one and reach the others.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from paceline.core import codec
from paceline.simulate.world import World


class Delays(Struct, frozen=True):
    """How long a frame is under way: log-normal around `median_s`, and now and then much longer.

    `spread`: the standard deviation of the logarithm, 0 for none. `rare`: the share of frames that take up to
    `rare_s` instead.
    """

    median_s: float = 0.0003
    spread: float = 0.5
    rare: float = 0.002
    rare_s: float = 0.08

    def draw(self, stream: random.Random) -> float:
        """One frame's delay in seconds."""
        if not self.spread:
            return self.median_s
        if self.rare and stream.random() < self.rare:
            return stream.random() * self.rare_s
        return self.median_s * math.exp(self.spread * stream.gauss(0.0, 1.0))


STEADY = Delays(0.0005, 0.0, 0.0, 0.0)
"""Half a millisecond, always: for scenarios."""


class Link:
    """One direction from one machine to another.

    `name`: shown where a frame is lost. `decoder`: of the direction, None to hand messages over as they are (faster).
    `deliver`: takes a message. `loss`: the share of frames that vanish.
    """

    def __init__(
        self, world: World, name: str, decoder: codec.Decoder[Any] | None, deliver: Callable[[Any], None],
        delays: Delays, stream: random.Random,
    ) -> None:  # fmt: skip
        self.name = name
        self.delays = delays
        self.loss = 0.0
        self.held = False
        self.closed = False
        self.lost = 0
        self._world = world
        self._decoder = decoder
        self._deliver = deliver
        self._stream = stream
        self._frames: deque[Any] = deque()
        self._arrived = 0
        self._last_arrival = 0.0
        self._void = 0
        self._to_lose: list[type] = []

    def lose(self, kind: type, times: int = 1) -> None:
        """Lose the next messages of this kind."""
        self._to_lose += [kind] * times

    def lose_no_more(self) -> None:
        """From now on everything arrives."""
        self._to_lose.clear()
        self.loss = 0.0

    def send(self, message: Any) -> None:
        """Put a message on the link."""
        if self.closed or self._is_lost(message):
            return
        self._frames.append(message if self._decoder is None else codec.encode(message))
        self._last_arrival = max(self._last_arrival, self._world.now + self.delays.draw(self._stream))
        self._world.at(self._last_arrival, self._arrive)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._frames

    def hold(self) -> None:
        """Deliver nothing until `release`."""
        self.held = True

    def release(self) -> None:
        """Deliver what has gathered, and go on."""
        self.held = False
        self._flush()

    def cut(self) -> None:
        """The connection is gone with all that is on it; a later send is a new connection's."""
        self._void += len(self._frames) - self._arrived
        self._frames.clear()
        self._arrived = 0

    def close(self) -> None:
        """For ever: nothing more is sent or arrives."""
        self.closed = True
        self.cut()

    def _is_lost(self, message: Any) -> bool:
        lost = self.loss > 0.0 and self._stream.random() < self.loss
        for kind in self._to_lose:
            if isinstance(message, kind):
                self._to_lose.remove(kind)
                lost = True
                break
        if lost:
            self.lost += 1
            self._world.journal.record(self._world.now, self.name, f"lost: {message!r}")
        return lost

    def _arrive(self) -> None:
        if self._void:
            # Arrivals come in the order of the sends, so those of a cut connection come first.
            self._void -= 1
            return
        self._arrived += 1
        if not self.held:
            self._flush()

    def _flush(self) -> None:
        while self._arrived and not self.held:
            self._arrived -= 1
            frame = self._frames.popleft()
            self._deliver(frame if self._decoder is None else self._decoder.decode(frame))
