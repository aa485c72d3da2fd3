"""What happens to a front-end's machine, and what it asks its shell to do (`frontend.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from paceline.core.messages import FromFrontend, Member, Scaling, ToFrontend
from paceline.core.requests import (
    ControlAction,
    FromFrontendToRank,
    Output,
    Outputs,
    SamplingParams,
    WeightAction,
)  # fmt: skip
from paceline.core.routing.policy import Decision

# Events ---------------------------------------------------------------------------------------


class Submit(Struct, frozen=True, gc=False):
    """A client's request. `request`: a number not used before. `rank`: the rank it names, if any.

    `session`: its session's key, if it has one. `explain`: whether to say what the choice of its rank was based on.
    `blocks`: the names of its prompt's blocks, where they are known already (`core/blocks.py`). `name`: what logs call
    it. `tenant`, `weight`: as in binding.Descriptor. `deadline`: when its answer must be there, infinite for no time.
    """

    request: int
    prompt_token_ids: list[int]
    params: SamplingParams
    rank: int | None = None
    priority: int = 0
    session: str | None = None
    explain: bool = False
    blocks: tuple[int, ...] | None = None
    name: str = ""
    tenant: int = 0
    weight: float = 1.0
    deadline: float = float("inf")


class Abandon(Struct, frozen=True):
    requests: Sequence[int]


class CoordinatorSaid(Struct, frozen=True):
    message: ToFrontend


class RankSaid(Struct, frozen=True, gc=False):
    """All that one step of a rank made for this front-end."""

    message: Outputs


class Connected(Struct, frozen=True):
    """The connection to the coordinator has come up."""


class Control(Struct, frozen=True):
    """Somebody asks to pause (in this mode) or to resume, by a `call` of its own; it ends with `Controlled`."""

    call: int
    action: ControlAction


class Update(Struct, frozen=True):
    """Somebody has new weights, or says what becomes of those that are ready; ends with `Controlled`. As in
    messages.UpdateWeights.
    """

    call: int
    action: WeightAction
    version: str = ""
    source: str = ""
    keep_kv: bool = False
    commit: bool = True
    timeout_ms: int = 0


class Scale(Struct, frozen=True):
    """Somebody asks for another number of ranks; the call ends with `Scaled`. Times as in messages.Scaling."""

    call: int
    size: int
    drain_ms: int
    startup_ms: int


class CallRanks(Struct, frozen=True):
    """Have the engines of these ranks (None: all) do something; the call ends with `Called`. As in CallEngine."""

    call: int
    method: str
    arguments: str
    ranks: Sequence[int] | None = None


class Again(Struct, frozen=True):
    """Somebody wants these ranks started again that are not there; said again while they are not."""

    ranks: Sequence[int]


class ControlGivenUp(Struct, frozen=True):
    """Nobody waits for this call any more."""

    call: int


class Unsent(Struct, frozen=True):
    """A request that `ToRank` has (`request`: as the rank would know it) was not sent: the rank reads no more."""

    request: int


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
    Submit | Abandon | CoordinatorSaid | RankSaid | Connected | Control | Update | Scale | Again | CallRanks
    | ControlGivenUp | Unsent | LinkFailed | LinkDown | LinkUp | Tick
)  # fmt: skip

# Effects --------------------------------------------------------------------------------------

RefusalReason = Literal["unknown-rank", "no-rank", "overloaded", "suspended", "rank-lost", "misrouted", "late"]


class Connect(Struct, frozen=True):
    member: Member


class Disconnect(Struct, frozen=True):
    rank: int


class ToRank(Struct, frozen=True, gc=False):
    rank: int
    message: FromFrontendToRank


class ToCoordinator(Struct, frozen=True):
    message: FromFrontend


class Placed(Struct, frozen=True):
    """The request went to this rank. `decision`: what that was based on; with the alternatives where it was to be
    explained. `queued`: it has waited for the rank, of that `waited_ms` by the coordinator's word.
    """

    request: int
    rank: int
    decision: Decision | None = None
    queued: bool = False
    waited_ms: int = 0


class Moved(Struct, frozen=True):
    """The request goes on at this rank behind so many tokens of its answer. `why` it has left the one before."""

    request: int
    before: int
    rank: int
    tokens: int
    why: str
    name: str = ""


class Deliver(Struct, frozen=True, gc=False):
    outputs: list[Output]


class Refuse(Struct, frozen=True):
    """The request cannot be served; the client is told why, and in how many seconds it may try again."""

    request: int
    reason: RefusalReason
    text: str
    retry_after_s: int = 1


class Controlled(Struct, frozen=True):
    """What the call asked for is so at every rank, or, where `superseded`, somebody has asked for the contrary. `why`:
    the weights are as they were.
    """

    call: int
    number: int
    superseded: bool
    why: str = ""


class Called(Struct, frozen=True):
    """What the ranks have said to the call: JSON, or why there is none."""

    call: int
    said: dict[int, str]
    errors: dict[int, str]


class Scaled(Struct, frozen=True):
    """What came of the call. `before`: the size when it was made. `state`: None where another change was under way."""

    call: int
    before: int
    state: Scaling | None


Effect = (
    Connect | Disconnect | ToRank | ToCoordinator | Placed | Moved | Deliver | Refuse | Controlled | Scaled | Called
)  # fmt: skip
