"""What a front-end has to tell an operator: requests that lost their ranks and moved, overload begun and ended, another
coordinator.

The machine and what it has answered are looked at after each event; nothing here changes what it does. Overload is one
thing however many requests are refused: it begins with the first and is over when none was for a while.
"""

from __future__ import annotations

from paceline.core.coordinator.events import Note
from paceline.core.frontend.events import Moved, Refuse
from paceline.core.frontend.machine import NOBODY, Frontend

QUIET_S = 5.0
"""Overload, or the time without ranks, is over when nothing was refused for so long."""
NAMES = 8
"""As many of the requests that moved are named in one line."""
BEGINS = {"overloaded": "overload", "no-rank": "no rank is ready", "suspended": "the deployment is suspended"}
"""Why requests are refused for a while: what the log calls it."""


class Spell:
    """A time in which requests are refused for one reason."""

    def __init__(self, reason: str, now: float) -> None:
        self.reason, self.begin, self.refused, self.last = reason, now, 0, now


class Journal:
    """One front-end's. `machine`: what is looked at."""

    def __init__(self, machine: Frontend) -> None:
        self._machine = machine
        self._moved, self._coordinator = 0, NOBODY
        self._spells: dict[str, Spell] = {}
        self._names: list[str] = []
        """Of those that have moved since this was told of, as many as are named."""

    @property
    def deadline(self) -> float:
        """When to look at the latest; infinite while nothing is under way."""
        return min((spell.last for spell in self._spells.values()), default=float("inf")) + QUIET_S

    def look(self, now: float, rank: int | None = None) -> list[Note]:
        """After an event, about this rank where it was about one: what is to be said."""
        notes: list[Note] = []
        moved, coordinator = self._machine.moved - self._moved, self._machine.coordinator
        if moved:
            self._moved = self._machine.moved
            whose = "their ranks" if rank is None else f"rank {rank}"
            names, self._names = self._names, []
            rest = f" and {moved - len(names)} more" if names and moved > len(names) else ""
            which = f" ({', '.join(names)}{rest})" if names else ""
            notes.append(Note(f"requests that had lost {whose} go on at others: {moved}{which}", True, rank))
        if coordinator != self._coordinator:
            if self._coordinator != NOBODY:
                notes.append(Note("another coordinator is there"))
            self._coordinator = coordinator
        for spell in [spell for spell in self._spells.values() if now >= spell.last + QUIET_S]:
            del self._spells[spell.reason]
            lasted = f"over after {spell.last - spell.begin:.1f} s"
            notes.append(Note(f"{BEGINS[spell.reason]}: {lasted}, requests refused: {spell.refused}"))
        return notes

    def moved(self, moved: Moved) -> None:
        """One of the requests of which `look` tells next."""
        if moved.name and len(self._names) < NAMES:
            self._names.append(moved.name)

    def refused(self, refusal: Refuse, now: float, name: str = "") -> list[Note]:
        """`name`: what the request is called."""
        if refusal.reason == "rank-lost":
            which = f"request {name}" if name else "a request"
            return [Note(f"{which} is given up: {refusal.text}", True, request=name)]
        if refusal.reason not in BEGINS:
            return []
        notes: list[Note] = []
        spell = self._spells.get(refusal.reason)
        if spell is None:
            spell = self._spells[refusal.reason] = Spell(refusal.reason, now)
            notes.append(Note(f"{BEGINS[spell.reason]}: requests are refused ({refusal.text})", True))
        spell.refused, spell.last = spell.refused + 1, now
        return notes
