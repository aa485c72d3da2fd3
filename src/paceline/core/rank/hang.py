"""How long the engine has been in one call, and what becomes of a rank whose step does not return.

The engine's thread is in the engine then and says nothing, so another one looks in from time to time. Whoever waits for
peers in a collective does not hang: it is the other that does, and that one's own look says so. An engine that counts
`progress` during a step gets on, however long the step takes.
"""

from __future__ import annotations

from msgspec import Struct

from paceline.core.messages import StallReport

KIND = "step"
"""`StallReport.kind` of a rank that holds itself up."""


class Limits(Struct, frozen=True):
    """Seconds without progress after which the rank is named, and after which it is ended; 0 for never."""

    stall_s: float = 30.0
    step_s: float = 0.0


NO_LIMITS = Limits()


class StepWatch:
    """One rank's calls of its engine."""

    def __init__(self, rank: int, incarnation: int, limits: Limits) -> None:
        self._life = rank, incarnation
        self._limits = limits
        self._since: float | None = None
        self._progress = 0
        self._said_s = 0.0

    def begin(self, now: float) -> None:
        """The engine is called; nothing changes where it is already."""
        if self._since is None:
            self._since = now

    def end(self, step: int) -> list[StallReport]:
        """It has returned, or gets on. Returns what is to be said of that."""
        self._since = None
        if not self._said_s:
            return []
        self._said_s = 0.0
        return [StallReport(*self._life, step)]

    def look(self, step: int, progress: int, waits: bool, now: float) -> list[StallReport]:
        """Somebody looks in. Returns what is to be said: at the stall timeout, and after each further one."""
        if self._since is None:
            return []
        if waits or progress != self._progress:
            self._progress = progress
            reports = self.end(step)
            self._since = now
            return reports
        if now - self._since < self._said_s + self._limits.stall_s:
            return []
        self._said_s = now - self._since
        return self.repeat(step, now)

    def repeat(self, step: int, now: float) -> list[StallReport]:
        """What was said, for a coordinator that is new."""
        if not self._said_s or self._since is None:
            return []
        return [StallReport(*self._life, step, [self._life[0]], step, KIND, now - self._since)]

    def over(self, now: float) -> float | None:
        """For how long it has hung, where that is too long; else None."""
        limit_s = self._limits.step_s
        hung = self._since is not None and limit_s > 0 and now - self._since >= limit_s
        return now - self._since if hung and self._since is not None else None
