"""What a child process tells its supervisor, through its own pipe."""

from __future__ import annotations

from msgspec import Struct


class Progressed(Struct, frozen=True):
    """What the child is doing, and the share done, 0.0 to 1.0."""

    what: str
    share: float


class Waiting(Struct, frozen=True):
    """The child is up and waits for these ranks."""

    ranks: list[int]


class Ready(Struct, frozen=True):
    """The child does its work."""


class Failed(Struct, frozen=True):
    """The child cannot go on; why, in one line."""

    why: str


Status = Progressed | Waiting | Ready | Failed
