"""What happens to the coordinator's machine, and what it asks its shell to do (`coordinator.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from paceline.core.messages import FromFrontEnd, FromRank, OfRequests, RankReport, ToFrontEnd, ToRank

# Events ---------------------------------------------------------------------------------------


class Tick(Struct, frozen=True):
    """Time has passed."""


class RankSaid(Struct, frozen=True):
    """A message from a rank."""

    message: FromRank


class RanksReported(Struct, frozen=True):
    """Reports of ranks, in the order in which they came: as RankSaid one after the other, but for less."""

    reports: Sequence[RankReport]


class FrontEndSaid(Struct, frozen=True):
    """A message from a front-end."""

    message: FromFrontEnd


class FrontEndsSaid(Struct, frozen=True):
    """What front-ends said of their requests, in the order in which it came: as FrontEndSaid one after the other, but
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


class FrontEndSubscribed(Struct, frozen=True):
    """Likewise a front-end's."""


class FrontEndGone(Struct, frozen=True):
    """A front-end's connection has ended."""

    front_end: int


Event = (
    Tick | RankSaid | RanksReported | FrontEndSaid | FrontEndsSaid
    | RankSubscribed | RankGone | NodeGone | FrontEndSubscribed | FrontEndGone
)  # fmt: skip

# Effects --------------------------------------------------------------------------------------


class ToRanks(Struct, frozen=True):
    """Broadcast to all ranks."""

    message: ToRank


class ToFrontEnds(Struct, frozen=True):
    """Broadcast to all front-ends."""

    message: ToFrontEnd


class Note(Struct, frozen=True):
    """Something for the log that an operator wants to read; `urgent` where something is wrong."""

    text: str
    urgent: bool = False


Effect = ToRanks | ToFrontEnds | Note
