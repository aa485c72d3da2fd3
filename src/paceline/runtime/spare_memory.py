"""Memory that a burst has taken goes back to the system when it is over.

What ZeroMQ's thread reads comes into an arena of its own, and is freed by another thread, here and there. malloc gives
back only what lies at an arena's end: a process that once fell behind for a second would stay as large for ever.
"""

from __future__ import annotations

import ctypes
import os

LOOK_S = 2.0
"""Between two looks at how large the process is."""
GROWN_BYTES = 4 << 20
"""So much more than after the last time is worth the milliseconds that it takes."""

# Where the C library is not glibc there is none.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class SpareMemory:
    """The free memory of this process. Its owner looks whenever it has nothing to do."""

    def __init__(self) -> None:
        self._look_at = 0.0
        self._least = resident_bytes()
        self.times = 0
        """How often memory was given back."""

    def look(self, now: float) -> None:
        """Give free memory back where the process has grown. Costs nothing within LOOK_S of the last time."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        resident = resident_bytes()
        if _trim is not None and resident > self._least + GROWN_BYTES:
            _trim(0)
            self.times += 1
            # What is left is in use: it is no reason to try again.
            self._least = resident_bytes()
        else:
            self._least = min(self._least, resident)


def resident_bytes() -> int:
    """How large this process is in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0
