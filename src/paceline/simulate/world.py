"""Virtual time: what is to happen, in order, and a journal of what happened.

Nothing here or above it asks a real clock, and every random choice comes from `Seeds`, so one seed gives one run, event
for event; the journal's digest shows it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable

from msgspec import Struct

from paceline.errors import PacelineError

REMEMBERED = 60
"""Events kept for each party, to be shown where something breaks."""


class Violation(PacelineError):
    """An invariant does not hold. `what`: one line; `parties`: whom it concerns, by name."""

    def __init__(self, what: str, *parties: str) -> None:
        super().__init__(what)
        self.what = what
        self.parties = parties


class Seeds:
    """One seed, a random stream a purpose: a draw more for one purpose changes nothing for another."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stream(self, purpose: str) -> random.Random:
        """The stream of this name, from its beginning."""
        return random.Random(f"{self.seed}/{purpose}")


class Entry(Struct):
    """One event at one party: its number in the run, when (virtual seconds), what came and what it led to."""

    number: int
    when: float
    party: str
    what: object
    effects: object

    def text(self) -> str:
        """One line, long messages cut."""
        effects = self.effects if isinstance(self.effects, Iterable) else ()
        led_to = "".join(f"\n{'':>26}{_short(effect)}" for effect in effects)
        return f"{self.number:>8} {self.when:>11.6f} s  {self.party}: {_short(self.what)}{led_to}"


class Journal:
    """Every event's digest, and each party's last events."""

    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.blake2b(digest_size=8)
        self._last: dict[str, deque[Entry]] = {}

    def record(self, when: float, party: str, what: object, effects: Iterable[object] = ()) -> None:
        """`what` happened at `party`; it answered with `effects`."""
        self.events += 1
        message = getattr(what, "message", what)
        names = " ".join([type(effect).__name__ for effect in effects])
        text = what if isinstance(what, str) else type(message).__name__
        self._hash.update(f"{when!r} {party} {text} {names}\n".encode())
        last = self._last.get(party)
        if last is None:
            last = self._last[party] = deque(maxlen=REMEMBERED)
        last.append(Entry(self.events, when, party, what, effects))

    def digest(self) -> str:
        """16 hex digits over all events so far."""
        return self._hash.hexdigest()

    def last(self, parties: Iterable[str], count: int = 40) -> list[Entry]:
        """The last events at these parties (all parties where none is named), oldest first."""
        wanted = [name for name in parties if name in self._last] or list(self._last)
        entries = [entry for name in dict.fromkeys(wanted) for entry in self._last[name]]
        return sorted(entries, key=lambda entry: entry.number)[-count:]


class World:
    """The clock, in seconds from 0, and the agenda."""

    def __init__(self) -> None:
        self.now = 0.0
        self.journal = Journal()
        self.after_each: Callable[[], None] | None = None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Let `action` happen at `when`, or now where that is past; equal times keep the order of asking."""
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let `action` happen in so many seconds."""
        self.at(self.now + seconds, action)

    def run_for(self, seconds: float) -> None:
        """Let virtual time pass."""
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


def _short(thing: object, limit: int = 260) -> str:
    text = thing if isinstance(thing, str) else repr(thing)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
