"""When a process that has ended is started again: at once the first time, then ever later, then not at all.

A process that served for a while and died met an accident; one that dies each time it is up will do so again, and
starting it in a circle costs its neighbours. So what is counted is restarts in a row: a life that served for
`STEADY_S` begins the count anew.
"""

from __future__ import annotations

STEADY_S = 10.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class Restarts:
    """The restarts of one process. `limit`: in a row, before it is given up; None for never."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.in_a_row = 0

    def ended(self, served_s: float) -> float | None:
        """It has ended, `served_s` seconds after it was ready, 0 where it never was.

        Returns after how many seconds to start it again, or None where it is given up.
        """
        if served_s >= STEADY_S:
            self.in_a_row = 0
        if self.limit is not None and self.in_a_row >= self.limit:
            return None
        self.in_a_row += 1
        if self.in_a_row == 1:
            return 0.0
        return float(min(FIRST_WAIT_S * 2 ** (self.in_a_row - 2), LONGEST_WAIT_S))
