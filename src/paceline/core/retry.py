"""The only timer that repeats: a word is said again until it is answered.

A message may be lost, and its receiver may be new. So whoever waits for an answer says its word again: soon at first,
in case it was lost, and then ever later, in case nobody is there. When to say it stands here; what is said, and what
counts as an answer, its owner knows.
"""

from __future__ import annotations

FIRST_S = 0.05
LONGEST_S = 1.0


class Retry:
    """When something must be said (again). `due`: that time, None while nothing is owed.

    `first_s`: from the first time to the second; each wait is twice the one before, up to `longest_s`.
    """

    __slots__ = ("_first_s", "_longest_s", "_wait_s", "due")

    def __init__(self, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> None:
        self.due: float | None = None
        self._first_s = first_s
        self._longest_s = longest_s
        self._wait_s = first_s

    def start(self, at: float) -> None:
        """It is owed from `at` on; what was waited before does not count."""
        self.due = at
        self._wait_s = self._first_s

    def stop(self) -> None:
        """It is answered, or nobody wants to know any more."""
        self.due = None

    def is_due(self, now: float) -> bool:
        return self.due is not None and now >= self.due

    def said(self, now: float) -> None:
        self.due = now + self._wait_s
        self._wait_s = min(self._wait_s * 2, self._longest_s)
