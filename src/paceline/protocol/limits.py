"""How large a message may be."""

from __future__ import annotations

MAX_CONTROL_BYTES = 4 * 1024 * 1024
"""Largest message to or from the coordinator: a view of 1,024 ranks and 64 front-ends fits twice."""

MAX_REQUEST_BYTES = 64 * 1024 * 1024
"""Largest message between a front-end and a rank: a prompt of ten million tokens fits."""
