"""How slow this machine is right now: every deadline of the tests is stretched by it, so that a busy one fails none.

A deadline says how long something may take on a machine that has nothing else to do. Beside ten busy processes the same
work takes many times as long, and a machine that was quiet at a deadline's beginning need not be at its end: a deadline
that passes measures anew before it counts.
"""

from __future__ import annotations

import os
import time

MOST = 20.0
"""Times. What takes longer than so many times its deadline hangs."""

LOOP, LOOP_S = 200_000, 0.004
"""A loop, and about how long it takes on a core of its own."""

FRESH_S = 5.0

FAST = os.environ.get("HYPOTHESIS_PROFILE") == "fast"

_measured = (float("-inf"), 1.0)


def pace(anew: bool = False) -> float:
    """How many times longer work takes here now than on a quiet machine: from 1 to `MOST`."""
    global _measured
    at, value = _measured
    if anew or time.monotonic() - at > FRESH_S:
        # The loop sees a slow machine, the load average one on which many wait for few cores.
        begin = time.perf_counter()
        sum(range(LOOP))
        looped = (time.perf_counter() - begin) / LOOP_S
        crowded = os.getloadavg()[0] / (os.cpu_count() or 1)
        value = min(MOST, max(1.0, looped, 2 * crowded))
        _measured = (time.monotonic(), value)
    return value


def stretched(time: float, most: float = MOST) -> float:
    """A time-out for a client, a subprocess, a thread; or a time that a deployment is set to, by `most` at most."""
    return time * min(most, pace())


def examples(count: int) -> int:
    """So many examples of a property; a tenth of them in `make test-fast`."""
    return max(5, count // 10) if FAST else count


class Deadline:
    """So many seconds of a quiet machine from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.monotonic()
        self._end = self._begin + stretched(seconds)

    def over(self) -> bool:
        """Whether it has passed; measures the machine once more before it says so."""
        if time.monotonic() < self._end:
            return False
        self._end = max(self._end, self._begin + self.seconds * pace(anew=True))
        return time.monotonic() >= self._end
