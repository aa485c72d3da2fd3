"""What happens to vLLM's coordinator, and what it asks its shell to do (`vllm_translation.py`)."""

from __future__ import annotations

from msgspec import Struct

from paceline.integrations.vllm_codec import Notice, RankMessage, Scale
from paceline.protocol.coordinator_events import Note as Note, Tick as Tick

# Events ---------------------------------------------------------------------------------------


class RankSaid(Struct, frozen=True):
    """A message from a rank."""

    message: RankMessage


class RanksReported(Struct, frozen=True):
    """Load reports that came together, and nothing about waves: at most one of each rank."""

    reports: list[RankMessage]


class RankSubscribed(Struct, frozen=True):
    """A rank listens; which one, it does not say."""


class RankUnsubscribed(Struct, frozen=True):
    """A rank's connection has ended."""


class FrontEndSaid(Struct, frozen=True):
    """A message from a front-end."""

    message: Notice | Scale


class FrontEndSubscribed(Struct, frozen=True):
    """A front-end listens."""


Event = RankSaid | RanksReported | RankSubscribed | RankUnsubscribed | FrontEndSaid | FrontEndSubscribed | Tick

# Effects --------------------------------------------------------------------------------------


class Greet(Struct, frozen=True):
    """Broadcast READY to ranks."""


class Wake(Struct, frozen=True):
    """Broadcast START_DP_WAVE to ranks."""

    wave: int
    exclude: bytes | int | None


class View(Struct, frozen=True):
    """Broadcast to front-ends; `counts` by rank, or None where none are said."""

    counts: list[list[int | float]] | None
    wave: int
    running: bool


class Memory(Struct, frozen=True):
    """What the ranks cannot be asked for again: kept outside, for the coordinator that takes this one's place.

    `size`: ranks, scaling included. `wave`, `running`: as last published. `greeted`: READY has been said.
    """

    size: int
    wave: int = 0
    running: bool = False
    greeted: bool = False


class Remember(Struct, frozen=True):
    """Keep this outside the process, before anything that follows is sent."""

    memory: Memory


Effect = Greet | Wake | View | Remember | Note
