"""Every message that crosses a socket, one tagged union per direction (others: `*_messages.py`).

There are four directions, and each has its own union, so a decoder for one link cannot be talked
into accepting a message of another. On the wire a message is one frame: a msgpack array whose first
element is the tag (`codec.py`; `docs/PROTOCOL.md` is generated from this file).

A field may be appended to a message, with a default: old readers ignore it, new readers fill it in.
Nothing else about a message may change without a new `PROTOCOL_VERSION`.

Three identities appear throughout:

- `rank`: the rank's number in the whole deployment.
- `incarnation`: one life of one process, a number that its predecessor did not have.
- `front_end`: one life of one front-end. It is also, as 8 little-endian bytes, the front-end's
  ZeroMQ routing id towards the ranks, so a rank never has to be told who sent something.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from paceline.protocol.binding_messages import (
    Ask as Ask,
    Descriptor as Descriptor,
    Grant as Grant,
    Grants as Grants,
    ReturnShares as ReturnShares,
    Share as Share,
    Shares as Shares,
    Withdraw as Withdraw,
)
from paceline.protocol.control_messages import (
    ControlAnswer as ControlAnswer,
    ControlRequest as ControlRequest,
    Stall as Stall,
    StallReport as StallReport,
    Suspension as Suspension,
    SuspensionState as SuspensionState,
)
from paceline.protocol.request_messages import (
    AbortRequests as AbortRequests,
    AddRequest as AddRequest,
    FromFrontEndToRank as FromFrontEndToRank,
    Output as Output,
    Outputs as Outputs,
    ToFrontEndFromRank as ToFrontEndFromRank,
)
from paceline.protocol.sampling import (
    Address,
    Count,
    Identity,
    Message,
    RankNumber,
    StampedWave,
    SuspendMode,
    Wave,
)
from paceline.protocol.scaling_messages import (
    NodeHello as NodeHello,
    RankFailed as RankFailed,
    ScaleRequest as ScaleRequest,
    Scaling as Scaling,
)
from paceline.protocol.to_rank_messages import (
    Admit as Admit,
    Form as Form,
    GroupMember as GroupMember,
    Identify as Identify,
    StartDPWave as StartDPWave,
    ToRank as ToRank,
)

PROTOCOL_VERSION = 1

# What a rank has queued ---------------------------------------------------------------------


class Load(Message, frozen=True):
    """What a rank has queued, and how fast it works it off.

    `waiting`, `running`: requests. `slots`: how many can run at once. `prefill_tokens`: prompt
    tokens not yet computed, of waiting and running requests. `kv_used`, `kv_total`: tokens.
    `prefill_rate`, `decode_rate`: tokens a second, the rank's own moving averages, 0 until known.
    `finished`: requests this incarnation has ended, however they ended. `step_s`, `prompt_token_s`,
    `answer_token_s`: what a step costs, by the rank's own measurement: so many seconds, and more for each prompt
    token and for each token of an answer; all 0 until known. `step_tokens`: tokens that a step computes at most,
    0 for any number. `decoding`: running requests that are past their prompts. `kv_reserved`: tokens of KV that the
    running requests may come to need. `answers_left`: tokens that the running requests' answers are expected to lack,
    together. `first_end`: tokens that the one lacks which ends first. `answer_tokens`: the expected length of one
    answer, a mean over all requests there. `kv_waiting`: tokens of KV that the waiting requests may come to need.
    `startable_tokens`: those of `prefill_tokens` that the next step could compute, of running requests and of those
    for which there is a slot and memory; null where the engine does not say. `prefill_quota`: prompt tokens that a
    lockstep step computed at most when this was reported, null for no limit; that it has changed is no reason for a
    report.
    """

    waiting: Count = 0
    running: Count = 0
    slots: Count = 1
    prefill_tokens: Count = 0
    kv_used: Count = 0
    kv_total: Count = 0
    prefill_rate: Annotated[float, Meta(ge=0)] = 0.0
    decode_rate: Annotated[float, Meta(ge=0)] = 0.0
    finished: Count = 0
    step_s: Annotated[float, Meta(ge=0)] = 0.0
    prompt_token_s: Annotated[float, Meta(ge=0)] = 0.0
    answer_token_s: Annotated[float, Meta(ge=0)] = 0.0
    step_tokens: Count = 0
    decoding: Count = 0
    kv_reserved: Count = 0
    answers_left: Count = 0
    first_end: Count = 0
    answer_tokens: Count = 0
    kv_waiting: Count = 0
    startable_tokens: Count | None = None
    prefill_quota: Count | None = None


# Rank -> coordinator (PUSH -> PULL) -----------------------------------------------------------


class RankHello(Message, frozen=True, tag="rank-hello"):
    """A rank says that it is there, until it is admitted, and again when it is asked.

    `address`: where front-ends reach it. `ready`: it has been told the wave and takes requests.
    `suspension`, `mode`: the highest number it knows (Suspension). `held`: it starts nothing by itself.
    `group_address`: where the other ranks reach it for collectives, empty where it has none of ours.
    `generation`: the group that it is a member of, 0 for none. `told`: the highest that it was told to form.
    """

    version: Count
    rank: RankNumber
    incarnation: Identity
    address: Address
    ready: bool
    wave: Wave = 0
    running: bool = False
    suspension: Count = 0
    mode: SuspendMode = "keep"
    held: bool = False
    group_address: Address = ""
    generation: Count = 0
    told: Count = 0


class RankReport(Message, frozen=True, tag="rank-report"):
    """A rank's load and state, before and after a step when they changed. The latest one wins.

    `step`: the rank's own step counter. `taken`: per front-end, how many of its sends this rank has
    taken in; the load counts exactly those. `wave`, `running`: the wave it is in, or will run next.
    """

    rank: RankNumber
    incarnation: Identity
    step: Count
    wave: Wave
    running: bool
    load: Load
    taken: dict[Identity, Count] = {}


class StartWave(Message, frozen=True, tag="start-wave"):
    """A paused rank took a request and now runs in `wave`: the others must be woken."""

    rank: RankNumber
    incarnation: Identity
    wave: Wave


class WaveComplete(Message, frozen=True, tag="wave-complete"):
    """This rank has paused: `wave` is finished and `wave + 1` comes next."""

    rank: RankNumber
    incarnation: Identity
    wave: Wave


class RankLeaving(Message, frozen=True, tag="rank-leaving"):
    """This rank ends in good order. Nothing more comes from this incarnation."""

    rank: RankNumber
    incarnation: Identity


FromRank = RankHello | RankReport | StartWave | WaveComplete | StallReport | RankLeaving | NodeHello | RankFailed


# Front-end -> coordinator (XSUB -> XPUB) -------------------------------------------------------


class FrontEndHello(Message, frozen=True, tag="front-end-hello"):
    """A front-end says that it is there. The coordinator answers all with Members and LoadView.

    `suspension`, `mode`: the highest number it knows (Suspension). `brokered`: its requests wait in the coordinator's
    queue, and it is given shares. `ranks`: those that it balances over, null for all. `scaling`: the newest that it
    knows, null where there was none.
    """

    version: Count
    front_end: Identity
    suspension: StampedWave = 0
    mode: SuspendMode = "keep"
    brokered: bool = False
    ranks: list[RankNumber] | None = None
    scaling: Scaling | None = None


class WakeNotice(Message, frozen=True, tag="wake-notice"):
    """The front-end sent a request, stamped `wave`, to `rank` while it believed the ranks paused."""

    front_end: Identity
    rank: RankNumber
    wave: StampedWave


class Send(Message, frozen=True):
    """One request sent: to which rank and life of it, its number there, its prompt tokens.

    `answer_tokens`: that its answer may come to have. `request`: as in Descriptor, of a request that waited; else 0.
    """

    rank: RankNumber
    incarnation: Identity
    number: Count
    tokens: Count
    answer_tokens: Count = 0
    request: Identity = 0


class SendNotice(Message, frozen=True, tag="send-notice"):
    """What this front-end has just sent, so that the others see it before the rank reports it.

    `told`: how many sends, to whichever rank, this front-end has told of in its life, these included.
    """

    front_end: Identity
    sends: list[Send]
    told: Count = 0


class FrontEndLeaving(Message, frozen=True, tag="front-end-leaving"):
    """This front-end ends in good order."""

    front_end: Identity


OfRequests = SendNotice | Ask | Withdraw | ReturnShares
"""What a front-end says of its requests: by far the most of what it says."""

FromFrontEnd = FrontEndHello | WakeNotice | OfRequests | ControlRequest | ScaleRequest | FrontEndLeaving


# Coordinator -> front-ends (XPUB -> XSUB) ------------------------------------------------------


class Member(Message, frozen=True):
    """One ready rank and where to reach it."""

    rank: RankNumber
    incarnation: Identity
    address: Address


class Members(Message, frozen=True, tag="members"):
    """All ready ranks, sent when one comes or goes, on a front-end's hello, and with the heartbeat.

    `missing`: ranks of the deployment that are not ready, so that a wait can name them.
    `ended`: (rank, incarnation) of lives known to be over. A rank that is neither a member nor ended is one
    that this coordinator has not heard yet. `scaling`: how many ranks there are, or are to be.
    """

    version: Count
    coordinator: Identity
    wave: Wave
    running: bool
    members: list[Member]
    missing: list[RankNumber] = []
    ended: list[tuple[RankNumber, Identity]] = []
    stalls: list[Stall] = []
    scaling: Scaling | None = None


class OnTheWire(Message, frozen=True):
    """Sends of one front-end to one rank that the rank's own counts do not hold yet.

    `last`: the number of the newest of them.
    """

    front_end: Identity
    last: Count
    requests: Count
    tokens: Count


class RankView(Message, frozen=True):
    """One rank in the load view: its latest report, and what is known to be on its way."""

    rank: RankNumber
    incarnation: Identity
    step: Count
    load: Load
    taken: dict[Identity, Count] = {}
    on_the_wire: list[OnTheWire] = []


class LoadView(Message, frozen=True, tag="load-view"):
    """All ranks' loads, the wave, and whether the ranks run. `ranks` is null where none are published.

    `number` grows by one with each view of one coordinator. `heard`: per front-end, the `told` of its last
    SendNotice: the view knows that front-end's sends up to there, at every rank alike. `shares`: of each front-end that
    is brokered, null where this coordinator has no queue. `queued`: requests that wait in it. `queues`: as in Grants.
    """

    coordinator: Identity
    number: Count
    wave: Wave
    running: bool
    ranks: list[RankView] | None = None
    heard: dict[Identity, Count] = {}
    suspension: SuspensionState = SuspensionState()
    shares: list[Shares] | None = None
    queued: Count = 0
    queues: dict[Identity, Count] = {}


ToFrontEnd = Members | LoadView | Grants | ControlAnswer


UNIONS: dict[str, object] = {
    "rank → coordinator": FromRank,
    "coordinator → ranks": ToRank,
    "front-end → coordinator": FromFrontEnd,
    "coordinator → front-ends": ToFrontEnd,
    "front-end → rank": FromFrontEndToRank,
    "rank → front-end": ToFrontEndFromRank,
}
"""Direction to its union; the table in `docs/PROTOCOL.md` follows this order."""


def tag_of(message: type[Message]) -> str | None:
    """The tag of a message class, or None for a part of one (Load, Member, …)."""
    tag = msgspec.inspect.type_info(message).tag  # type: ignore[attr-defined]
    return tag if isinstance(tag, str) else None
