"""What happens to a front-end's machine, and what it asks its shell to do (`frontend.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from paceline.core.messages import FromFrontend, Member, Scaling, ToFrontend
from paceline.core.requests import ControlAction, FromFrontendToRank, Output, Outputs, SamplingParams
from paceline.core.routing.policy import Decision

# Events ---------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, gc=False):
    """A client's request. `request`: a number not used before. `rank`: the rank it names, if any.

    `session`: its session's key, if it has one. `explain`: whether to say what the choice of its rank was based on.
    """

    request: int
    prompt_token_ids: list[int]
    params: SamplingParams
    rank: int | None = None
    priority: int = 0
    session: str | None = None
    explain: bool = False


class Abandon(Struct, frozen=True):
    """The clients of these requests have gone."""

    requests: Sequence[int]


class CoordinatorSaid(Struct, frozen=True):
    """A message from the coordinator."""

    message: ToFrontend


class RankSaid(Struct, frozen=True, gc=False):
    """All that one step of a rank made for this front-end."""

    message: Outputs


class Connected(Struct, frozen=True):
    """The connection to the coordinator has come up."""


class Control(Struct, frozen=True):
    """Somebody asks to pause (in this mode) or to resume; again, with the same `call`, until it is `Controlled`."""

    call: int
    action: ControlAction


class Scale(Struct, frozen=True):
    """Somebody asks for another number of ranks; again, with the same `call`, until it is `Scaled`.

    `drain_ms`, `startup_ms`: as in messages.Scaling.
    """

    call: int
    size: int
    drain_ms: int
    startup_ms: int


class ControlGivenUp(Struct, frozen=True):
    """Nobody waits for this call any more."""

    call: int


class LinkFailed(Struct, frozen=True):
    """The rank's address cannot be connected to: what `Connect` asked for is not there."""

    rank: int


class Tick(Struct, frozen=True):
    """Time has passed."""


class LinkDown(Struct, frozen=True):
    """The connection to this rank has ended, or its peer has been silent for the rank timeout: it is dead, or will be
    there again (`LinkUp`)."""

    rank: int


class LinkUp(Struct, frozen=True):
    """The connection to this life of the rank has come up, again or for the first time."""

    rank: int


Event = (
    Submit
    | Abandon
    | CoordinatorSaid
    | RankSaid
    | Connected
    | Control
    | Scale
    | ControlGivenUp
    | LinkFailed
    | LinkDown
    | LinkUp
    | Tick
)

# Effects --------------------------------------------------------------------------------------

RefusalReason = Literal["unknown-rank", "no-rank", "overloaded", "suspended", "rank-lost", "misrouted"]


class Connect(Struct, frozen=True):
    """Open a connection to this life of a rank."""

    member: Member


class Disconnect(Struct, frozen=True):
    """Close the connection to a rank."""

    rank: int


class ToRank(Struct, frozen=True, gc=False):
    """Send to a connected rank."""

    rank: int
    message: FromFrontendToRank


class ToCoordinator(Struct, frozen=True):
    """Send to the coordinator."""

    message: FromFrontend


class Placed(Struct, frozen=True):
    """The request went to this rank. `decision`: what that was based on, where it was to be explained."""

    request: int
    rank: int
    decision: Decision | None = None


class Deliver(Struct, frozen=True, gc=False):
    """Hand these outputs to their clients."""

    outputs: list[Output]


class Refuse(Struct, frozen=True):
    """The request cannot be served; the client is told why, and in how many seconds it may try again."""

    request: int
    reason: RefusalReason
    text: str
    retry_after_s: int = 1


class Controlled(Struct, frozen=True):
    """What the call asked for is so at every rank, or, where `superseded`, somebody has asked for the contrary."""

    call: int
    number: int
    superseded: bool


class Scaled(Struct, frozen=True):
    """What has become of the call. `before`: the size when it was made. `state`: how it ended, None where another
    change was under way.
    """

    call: int
    before: int
    state: Scaling | None


Effect = Connect | Disconnect | ToRank | ToCoordinator | Placed | Deliver | Refuse | Controlled | Scaled
