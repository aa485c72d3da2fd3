"""When a process that has ended is started again: at once the first time, then ever later, then not at all.

A process that served for a while and died met an accident; one that dies each time it is up will do so again, and
starting it in a circle costs its neighbours. So what is counted is restarts in a row: a life that served for `steady_s`
begins the count anew.

It imports nothing: the watchdog under vLLM, which must not die itself, has it too.
"""

from __future__ import annotations

STEADY_S = 10.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class Restarts:
    """The restarts of one process. `limit`: in a row, before it is given up; None for never.

    `first_s`: before the second restart in a row; each wait is twice the one before, up to `longest_s`.
    """

    def __init__(
        self, limit: int | None = None, *, first_s: float = FIRST_WAIT_S, longest_s: float = LONGEST_WAIT_S,
        steady_s: float = STEADY_S,
    ) -> None:  # fmt: skip
        self.in_a_row = 0
        self._limit = limit
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s

    def ended(self, served_s: float, now: float) -> float | None:
        """It has ended at `now`, `served_s` seconds after it was ready, 0 where it never was.

        Returns when to start it again, or None where it is given up.
        """
        if served_s >= self._steady_s:
            self.in_a_row = 0
        if self._limit is not None and self.in_a_row >= self._limit:
            return None
        self.in_a_row += 1
        if self.in_a_row == 1:
            return now
        # From some restart on the wait is the longest, and the power would only grow.
        return now + min(self._first_s * 2.0 ** min(self.in_a_row - 2, 32), self._longest_s)
