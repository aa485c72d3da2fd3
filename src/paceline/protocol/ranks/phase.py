"""A rank's life, from loading to leaving."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a rank is in its life; waves are a matter of READY alone."""

    LOADING = "loading"
    JOINING = "joining"
    READY = "ready"
    LEFT = "left"
