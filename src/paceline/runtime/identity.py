"""Numbers by which a life of a process is told from all others."""

from __future__ import annotations

import time


def new_identity(index: int = 0) -> int:
    """A number that no process of this deployment has had: the time, and `index` among those started together.

    It is odd: as a ZeroMQ routing id its first byte must not be zero.
    """
    return time.time_ns() // 1024 * 1024 + index % 512 * 2 + 1
