"""Virtual time: what is to happen, in order; links between machines; and a journal of what happened.

Nothing here or above it asks a real clock, and every random choice comes from `Seeds`, so one seed gives one run, event
for event; the journal's digest shows it.

A link is one direction of one connection: frames, first in first out, delayed, held, cut or lost. What is on a link
when its sender dies still arrives; what is on it when its receiver dies does not. A broadcast is sent on one link a
receiver, so it can be lost to one and reach the others.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from msgspec import Struct

from paceline.core import codec
from paceline.errors import PacelineError

REMEMBERED = 60
"""Events kept for each process, to be shown where something breaks."""


class Violation(PacelineError):
    """An invariant does not hold. `what`: one line; `processes`: whom it concerns, by name."""

    def __init__(self, what: str, *processes: str) -> None:
        super().__init__(what)
        self.what = what
        self.processes = processes


class Seeds:
    """One seed, a random stream a purpose: a draw more for one purpose changes nothing for another."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stream(self, purpose: str) -> random.Random:
        """The stream of this name, from its beginning."""
        return random.Random(f"{self.seed}/{purpose}")


class Entry(Struct):
    """One event at one process: its number in the run, when (virtual seconds), what came and what it led to."""

    number: int
    when: float
    process: str
    what: object
    effects: object

    def text(self) -> str:
        effects = self.effects if isinstance(self.effects, Iterable) else ()
        led_to = "".join(f"\n{'':>26}{_short(effect)}" for effect in effects)
        return f"{self.number:>8} {self.when:>11.6f} s  {self.process}: {_short(self.what)}{led_to}"


class Journal:
    """Every event's digest, and each process's last events. Without `keeping` it only counts."""

    def __init__(self, keeping: bool = True) -> None:
        self.events = 0
        self._keeping = keeping
        self._hash = hashlib.blake2b(digest_size=8)
        self._last: dict[str, deque[Entry]] = {}

    def record(self, when: float, process: str, what: object, effects: Iterable[object] = ()) -> None:
        """`what` happened at `process`; it answered with `effects`."""
        self.events += 1
        if not self._keeping:
            return
        message = getattr(what, "message", what)
        names = " ".join([type(effect).__name__ for effect in effects])
        text = what if isinstance(what, str) else type(message).__name__
        self._hash.update(f"{when!r} {process} {text} {names}\n".encode())
        last = self._last.get(process)
        if last is None:
            last = self._last[process] = deque(maxlen=REMEMBERED)
        last.append(Entry(self.events, when, process, what, effects))

    def digest(self) -> str:
        """16 hex digits over all events so far."""
        return self._hash.hexdigest()

    def last(self, processes: Iterable[str], count: int = 40) -> list[Entry]:
        """The last events at these processes (at all where none is named), oldest first."""
        wanted = [name for name in processes if name in self._last] or list(self._last)
        entries = [entry for name in dict.fromkeys(wanted) for entry in self._last[name]]
        return sorted(entries, key=lambda entry: entry.number)[-count:]


class World:
    """The clock, in seconds from 0, and the agenda. `after_each`: called after every event on it."""

    def __init__(self, keeping: bool = True) -> None:
        self.now = 0.0
        self.journal = Journal(keeping)
        self.after_each: Callable[[], None] | None = None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Let `action` happen at `when`, or now where that is past; equal times keep the order of asking."""
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            self._next()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit_s: float = 30.0, wanted: str = "the condition") -> float:
        """Run until the condition holds; returns how many seconds that took. Raises Violation where it does not."""
        begin = self.now
        while not condition():
            if not self._agenda:
                raise Violation(f"nothing will ever happen again, and {wanted} does not hold")
            if self._agenda[0][0] > begin + limit_s:
                raise Violation(f"after {limit_s:g} s, {wanted} does not hold")
            self._next()
        return self.now - begin

    def _next(self) -> None:
        self.now, _, action = heapq.heappop(self._agenda)
        action()
        if self.after_each is not None:
            self.after_each()


class Timed(Protocol):
    """A machine with a deadline: when it wants to be ticked at the latest."""

    @property
    def deadline(self) -> float: ...


class Alarm:
    """Calls `tick` when the machine's deadline has come, which may move between its events.

    `alive`: whether the process is, when it is asked.
    """

    def __init__(self, world: World, machine: Timed, tick: Callable[[], None], alive: Callable[[], bool]) -> None:
        self._world, self._machine = world, machine
        self._tick, self._alive = tick, alive
        self._at = math.inf

    def set(self) -> None:
        """After every event: see to it that the tick comes."""
        deadline = self._machine.deadline
        if deadline < self._at:
            self._at = deadline
            self._world.at(deadline, lambda: self._ring(deadline))

    def _ring(self, at: float) -> None:
        if at != self._at:
            return
        self._at = math.inf
        if self._world.now >= self._machine.deadline:
            self._tick()
        elif self._alive():
            self.set()


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
        self.name, self.delays = name, delays
        self.loss = 0.0
        self.held = self.closed = False
        self.lost = 0
        self._world, self._decoder, self._deliver, self._stream = world, decoder, deliver, stream
        self._frames: deque[Any] = deque()
        self._arrived = self._void = 0
        self._last_arrival = 0.0
        self._to_lose: list[type] = []

    def lose(self, kind: type, times: int = 1) -> None:
        self._to_lose += [kind] * times

    def lose_no_more(self) -> None:
        self._to_lose.clear()
        self.loss = 0.0

    def send(self, message: Any) -> None:
        if self.closed or self._is_lost(message):
            return
        self._frames.append(message if self._decoder is None else codec.encode(message))
        self._last_arrival = max(self._last_arrival, self._world.now + self.delays.draw(self._stream))
        self._world.at(self._last_arrival, self._arrive)

    @property
    def idle(self) -> bool:
        return not self._frames

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
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


def _short(thing: object, limit: int = 260) -> str:
    text = thing if isinstance(thing, str) else repr(thing)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
