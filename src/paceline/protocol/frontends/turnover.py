"""When somebody who was refused may come back: reckoned from how long requests take and how many were told to come.

A front-end's requests end as fast as there are some under way, divided by how long one takes (Little's law), and each
end leaves a place. Whoever is refused is promised the next place that nobody has been promised: told all the same time,
they would come back together, and all but one be refused again.
"""

from __future__ import annotations

from math import ceil

LONGEST_S = 60
"""OpenAI's clients take no longer time than this for a time to wait."""

RECENT = 64
"""Requests over which the time that one takes is averaged."""


class Turnover:
    """How fast the requests of one front-end end, and the places that were promised. Times in seconds."""

    def __init__(self) -> None:
        self._ended = 0
        self._takes_s = 0.0
        self._last = 0.0
        self._promised = float("-inf")

    def busy(self, now: float) -> None:
        """The first request is under way."""
        self._last = now

    def ended(self, took_s: float, now: float) -> None:
        """A request has ended, or was aborted: there is a place."""
        self._ended += 1
        self._takes_s += (took_s - self._takes_s) / min(self._ended, RECENT)
        self._last = now

    def no_queue(self) -> None:
        """Nobody waits: who was promised a place has had it, or has not come."""
        self._promised = float("-inf")

    def come_back_s(self, under_way: int, now: float) -> int:
        """When there will be a place for one more that is refused now, where so many are `under_way`."""
        if not under_way:
            return 1
        if self._ended:
            self._promised = max(self._promised, now) + self._takes_s / under_way
            self._promised = min(self._promised, now + LONGEST_S)
        # Where nothing has ended for long, the next end is likely to be as far.
        wait_s = max(self._promised - now, now - self._last)
        return max(1, min(LONGEST_S, ceil(wait_s)))
