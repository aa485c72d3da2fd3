"""What happens to the coordinator's machine, and what it asks its shell to do (`coordinator.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from paceline.core.messages import FromFrontend, FromRank, OfRequests, RankReport, ToFrontend, ToRank

# Events ---------------------------------------------------------------------------------------


class Tick(Struct, frozen=True):
    """Time has passed."""


class RankSaid(Struct, frozen=True):
    message: FromRank


class RanksReported(Struct, frozen=True):
    """Reports of ranks, in the order in which they came: as RankSaid one after the other, but for less."""

    reports: Sequence[RankReport]


class FrontendSaid(Struct, frozen=True):
    message: FromFrontend


class FrontendsSaid(Struct, frozen=True):
    """What front-ends said of their requests, in the order in which it came: as RanksReported."""

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
    frontend: int


Event = (
    Tick | RankSaid | RanksReported | FrontendSaid | FrontendsSaid
    | RankSubscribed | RankGone | NodeGone | FrontendSubscribed | FrontendGone
)  # fmt: skip

# Effects --------------------------------------------------------------------------------------


class ToRanks(Struct, frozen=True):
    message: ToRank


class ToFrontends(Struct, frozen=True):
    message: ToFrontend


class Note(Struct, frozen=True):
    """Something for the log that an operator wants to read; `urgent` where something is wrong, `routine` where the log
    has it anyway. `rank`, `request`: what it is about, if any.
    """

    text: str
    urgent: bool = False
    rank: int | None = None
    routine: bool = False
    request: str = ""


Effect = ToRanks | ToFrontends | Note
