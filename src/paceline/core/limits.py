"""How large a message may be, and a deployment."""

from __future__ import annotations

MAX_CONTROL_BYTES = 4 * 1024 * 1024
"""Largest message to or from the coordinator: a view of 1,024 ranks and 64 front-ends fits twice."""

MAX_REQUEST_BYTES = 64 * 1024 * 1024
"""Largest message between a front-end and a rank: a prompt of ten million tokens fits."""


def most_ranks(size: int) -> int:
    """What a deployment that began with `size` ranks may have where nothing is set: enough for most who ask for more,
    and no more than a slip of the hand can start."""
    return max(16, 4 * size)
