"""What happens to the coordinator's machine, and what it asks its shell to do (`coordinator.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from paceline.core.messages import FromFrontend, FromRank, OfRequests, RankReport, ToFrontend, ToRank

# Events ---------------------------------------------------------------------------------------


class Tick(Struct, frozen=True):
    """Time has passed."""


class RankSaid(Struct, frozen=True):
    """A message from a rank."""

    message: FromRank


class RanksReported(Struct, frozen=True):
    """Reports of ranks, in the order in which they came: as RankSaid one after the other, but for less."""

    reports: Sequence[RankReport]


class FrontendSaid(Struct, frozen=True):
    """A message from a front-end."""

    message: FromFrontend


class FrontendsSaid(Struct, frozen=True):
    """What front-ends said of their requests, in the order in which it came: as FrontendSaid one after the other, but
    for less.
    """

    messages: Sequence[OfRequests]


class RankSubscribed(Struct, frozen=True):
    """A rank's connection for broadcasts has come up: what was sent before, it has not heard.

    `rank`, `incarnation`: which life's, where that is known.
    """

    rank: int = -1
    incarnation: int = -1


class RankGone(Struct, frozen=True):
    """The connection of this life of a rank has ended: it has died, or will be back and say hello again."""

    rank: int
    incarnation: int


class NodeGone(Struct, frozen=True):
    """The connection of a node has ended: it has died, or will be back and say hello again."""

    node: int


class FrontendSubscribed(Struct, frozen=True):
    """a front-end's."""


class FrontendGone(Struct, frozen=True):
    """A front-end's connection has ended."""

    frontend: int


Event = (
    Tick | RankSaid | RanksReported | FrontendSaid | FrontendsSaid
    | RankSubscribed | RankGone | NodeGone | FrontendSubscribed | FrontendGone
)  # fmt: skip

# Effects --------------------------------------------------------------------------------------


class ToRanks(Struct, frozen=True):
    """Broadcast to all ranks."""

    message: ToRank


class ToFrontends(Struct, frozen=True):
    """Broadcast to all front-ends."""

    message: ToFrontend


class Note(Struct, frozen=True):
    """Something for the log that an operator wants to read; `urgent` where something is wrong."""

    text: str
    urgent: bool = False


Effect = ToRanks | ToFrontends | Note
