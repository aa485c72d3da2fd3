"""Every message that crosses a socket, one tagged union per direction.

A decoder for one link cannot be talked into accepting a message of another. On the wire a message is one frame, a
msgpack array whose first element is the tag (`codec.py`). A field may be appended to a message, with a default; nothing
else may change without a new `PROTOCOL_VERSION`.

Three identities:
- `rank`: its number in the whole deployment. `incarnation`: one life of one process, another number than before.
- `frontend`: one life of one front-end; as 8 little-endian bytes also its ZeroMQ routing id towards the ranks.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from paceline.core.binding import Ask, Grants, ReturnShares, SendNotice, Shares, Withdraw
from paceline.core.load import Load
from paceline.core.requests import (
    Address,
    ControlAction,
    Count,
    Identity,
    Message,
    Outcome,
    RankNumber,
    Refused,
    Revive,
    StampedWave,
    StartAgain,
    SuspendMode,
    UpdateWeights,
    Wave,
    Weights,
    WeightsOfRank,
)  # fmt: skip

PROTOCOL_VERSION = 1

MAX_NAMES = 65_536
"""Blocks that one KvDelta may name, of each kind."""
Names = Annotated[bytes, Meta(max_length=8 * MAX_NAMES)]

# Pausing, and who holds the group up (`coordinator/pause.py`, `epoch.py`) ---------------------


class Suspension(Message, frozen=True, tag="suspension"):
    """Suspend (odd `number`) or resume (even): the highest number counts. Each rank answers with a RankHello.

    `mode`: what becomes of requests: `keep` them as they are, `wait` until they are finished, `abort` them.
    `released`: work starts again, since all ranks know the even number (in lockstep), or without waiting for that.
    `weights`: with which; null where nobody has brought any.
    """

    number: Count
    mode: SuspendMode
    released: bool = False
    weights: Weights | None = None


class SuspensionState(Message, frozen=True):
    """The suspension in force, or the last one. Odd `number`: suspended; even: resumed; 0: there was none.

    `settled`: every rank has said so, of the weights too. `waiting_for`: the ranks that have not.
    """

    number: Count = 0
    mode: SuspendMode = "keep"
    settled: bool = True
    waiting_for: list[RankNumber] = []
    weights: Weights | None = None


class ControlRequest(Message, frozen=True, tag="control"):
    """Suspend in this mode, or resume. Repeated until it is answered; `call` is the front-end's number for it.

    `answered`: the number that a coordinator answered it with before, 0 for none. `known`, `mode`: of the newest
    suspension that the front-end has heard of, since the coordinator may be new and the ranks, too.
    """

    frontend: Identity
    call: Identity
    action: ControlAction
    answered: Count = 0
    known: StampedWave = 0
    mode: SuspendMode = "keep"


class ControlAnswer(Message, frozen=True, tag="control-answer"):
    """What a ControlRequest asks for holds once the suspension's number is at least `number` and settled; what an
    UpdateWeights does, once that of the weights is. `why`: it is refused.
    """

    coordinator: Identity
    frontend: Identity
    call: Identity
    number: Count
    why: Annotated[str, Meta(max_length=512)] = ""


class StallReport(Message, frozen=True, tag="stall"):
    """This rank has waited for others for longer than the stall timeout; repeated while it does.

    `ranks`: those whose part it lacks, empty once it has gone on; itself, where its own step does not return.
    `collective`: its number in the generation, `kind`: which one ("all_reduce", "step"). `seconds`: for how long.
    """

    rank: RankNumber
    incarnation: Identity
    step: Count
    ranks: list[RankNumber] = []
    collective: Count = 0
    kind: Annotated[str, Meta(max_length=32)] = ""
    seconds: Annotated[float, Meta(ge=0)] = 0.0


class Stall(Message, frozen=True):
    """A rank that holds others up: in which step and collective of theirs, for how long; `waiting`: those that wait."""

    rank: RankNumber
    step: Count
    collective: Count
    kind: str
    seconds: float
    waiting: list[RankNumber]

    @property
    def hangs(self) -> bool:
        """Whether its own step does not return."""
        return self.kind == "step"


# How many ranks there are (`coordinator/scaling.py`) ------------------------------------------

Size = Annotated[int, Meta(ge=1, le=65536)]
"""How many ranks a deployment can have."""


class Scaling(Message, frozen=True, tag="scaling"):
    """How many ranks there are: even `number`: `size`; odd: `size` becomes `target`. The highest number counts.

    `hosts`: (rank, node), where those ranks run that scaling has brought. `frontend`, `call`: who asked last, 0 for
    nobody. `drain_ms`: how long ranks that leave may take to end their requests. `startup_ms`: how long new ranks may
    take to load. `waiting_for`: ranks that have not done so. `outcome`: of the last change, once the number is even:
    "refused" is one that was not begun, "failed" and "late" are ones that were undone. `why`: what it says of that.
    """

    number: Count
    size: Size
    target: Size
    hosts: list[tuple[RankNumber, Identity]] = []
    frontend: Identity = 0
    call: Identity = 0
    drain_ms: Count = 0
    startup_ms: Count = 0
    waiting_for: list[RankNumber] = []
    outcome: Outcome = "done"
    why: Annotated[str, Meta(max_length=1024)] = ""

    @property
    def under_way(self) -> bool:
        """Whether the size is about to change."""
        return self.number % 2 == 1

    @property
    def limit(self) -> int:
        """Ranks below this may be there."""
        return max(self.size, self.target) if self.under_way else self.size

    @property
    def serving(self) -> int:
        """Ranks below this get new requests, once they are ready."""
        return min(self.size, self.target) if self.under_way else self.size

    def fits(self, most: int) -> bool:
        """Whether all that it says can be so where there are never more ranks than `most`."""
        lists = max(len(self.hosts), len(self.waiting_for))
        return max(self.size, self.target, lists) <= most

    @property
    def joining(self) -> range:
        """The ranks that are to come."""
        return range(self.size, self.limit)

    @property
    def leaving(self) -> range:
        """The ranks that are to go."""
        return range(self.serving, self.size)


class ScaleRequest(Message, frozen=True, tag="scale"):
    """Let the deployment have `size` ranks. Repeated until a Scaling names it; `call` is the front-end's number for it.

    `drain_ms`, `startup_ms`: as in Scaling.
    """

    frontend: Identity
    call: Identity
    size: Size
    drain_ms: Count
    startup_ms: Count


class NodeHello(Message, frozen=True, tag="node-hello"):
    """A node says that it is there, when it is asked, and that it has heard a Scaling.

    `node`: one life of one node's supervisor. `ranks`: those that run there, or are about to. `scaling`: the newest
    that it knows. `own_frontends`: its front-ends balance over its ranks alone (hybrid mode), so it must keep one.
    `fixed`: something outside balances (external mode), and nothing can be scaled.
    """

    version: Count
    node: Identity
    ranks: list[RankNumber]
    scaling: Scaling
    own_frontends: bool = False
    fixed: bool = False


class RankFailed(Message, frozen=True, tag="rank-failed"):
    """A rank that was to join has ended before it did; `number`: of the Scaling that brought it. `why`: one line."""

    node: Identity
    number: Count
    rank: RankNumber
    why: Annotated[str, Meta(max_length=512)] = ""


# Rank -> coordinator (PUSH -> PULL) -----------------------------------------------------------


class RankHello(Message, frozen=True, tag="rank-hello"):
    """A rank says that it is there, until it is admitted, and again when it is asked.

    `address`: where front-ends reach it. `ready`: it has been told the wave and takes requests.
    `suspension`, `mode`: the highest number it knows (Suspension). `held`: it starts nothing by itself.
    `group_address`: where the other ranks reach it for collectives, empty where it has none of ours.
    `generation`: the group that it is a member of, 0 for none. `told`: the highest that it was told to form.
    `once`: each life of it can be a member of one group only, of all ranks. `kv`: the number of its last KvDelta.
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
    once: bool = False
    weights: WeightsOfRank | None = None
    kv: Count = 0


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


class KvDelta(Message, frozen=True, tag="kv-delta"):
    """What this life of a rank holds KV of has changed: blocks of prompts, eight bytes each (`core/blocks.py`).

    `number` grows by one. `whole`: what was said before does not count; what is `stored` is all that it holds, and what
    the deltas behind this one add. Whoever lacks one asks for that (KvAsk).
    """

    rank: RankNumber
    incarnation: Identity
    number: Count
    stored: Names = b""
    removed: Names = b""
    whole: bool = False


FromRank = (
    RankHello | RankReport | StartWave | WaveComplete | StallReport | RankLeaving | KvDelta | NodeHello | RankFailed
)

# Front-end -> coordinator (XSUB -> XPUB) -------------------------------------------------------


class FrontendHello(Message, frozen=True, tag="front-end-hello"):
    """A front-end says that it is there. The coordinator answers all with Members and LoadView.

    `suspension`, `mode`: the highest number it knows (Suspension). `brokered`: its requests wait in the coordinator's
    queue, and it is given shares. `ranks`: those that it balances over, null for all. `scaling`: the newest that it
    knows, null where there was none; `weights` likewise.
    """

    version: Count
    frontend: Identity
    suspension: StampedWave = 0
    mode: SuspendMode = "keep"
    brokered: bool = False
    ranks: list[RankNumber] | None = None
    scaling: Scaling | None = None
    weights: Weights | None = None


class WakeNotice(Message, frozen=True, tag="wake-notice"):
    """The front-end sent a request, stamped `wave`, to `rank` while it believed the ranks paused."""

    frontend: Identity
    rank: RankNumber
    wave: StampedWave


class FrontendLeaving(Message, frozen=True, tag="front-end-leaving"):
    """This front-end ends in good order."""

    frontend: Identity


OfRequests = SendNotice | Ask | Withdraw | ReturnShares
"""What a front-end says of its requests: by far the most of what it says."""

Calls = ControlRequest | UpdateWeights | ScaleRequest | Revive
FromFrontend = FrontendHello | WakeNotice | OfRequests | Calls | FrontendLeaving


# Coordinator -> front-ends (XPUB -> XSUB) ------------------------------------------------------


class Member(Message, frozen=True):
    """One ready rank and where to reach it."""

    rank: RankNumber
    incarnation: Identity
    address: Address


class Members(Message, frozen=True, tag="members"):
    """All ready ranks, sent when one comes or goes, on a front-end's hello, and with the heartbeat.

    `missing`: ranks of the deployment that are not ready, so that a wait can name them.
    `ended`: (rank, incarnation) of lives known to be over. A rank that is neither a member nor ended is one that this
    coordinator has not heard yet. `scaling`: how many ranks there are, or are to be. `epoch`: the group's generation.
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
    epoch: Count = 0


class OnTheWire(Message, frozen=True):
    """Sends of one front-end to one rank that the rank's own counts do not hold yet.

    `last`: the number of the newest of them.
    """

    frontend: Identity
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
    is bound late, null where this coordinator has no queue. `queued`: requests that wait in it. `queues`: as in Grants.
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


ToFrontend = Members | LoadView | Grants | ControlAnswer


# Coordinator -> ranks (XPUB -> XSUB) -----------------------------------------------------------


class Identify(Message, frozen=True, tag="identify"):
    """The coordinator asks every rank to say who it is; each answers with a RankHello."""

    version: Count
    coordinator: Identity


class Admit(Message, frozen=True, tag="admit"):
    """Tells one rank the wave and the suspension. From here on it may call itself ready."""

    rank: RankNumber
    incarnation: Identity
    wave: Wave
    suspension: Suspension | None = None


class GroupMember(Message, frozen=True):
    """One rank of a generation, and where the others reach it."""

    rank: RankNumber
    incarnation: Identity
    address: Address


class Form(Message, frozen=True, tag="form"):
    """The ranks form this generation, in place of any before; a joining rank takes up the wave and may call itself
    ready when it has. Each member answers with a RankHello that names the generation.
    """

    generation: Count
    wave: Wave
    members: list[GroupMember]
    suspension: Suspension | None = None


class StartDPWave(Message, frozen=True, tag="start-dp-wave"):
    """Every paused rank starts running in `wave`, but for `exclude`, which runs already."""

    wave: Wave
    exclude: RankNumber | None = None


class KvAsk(Message, frozen=True, tag="kv-ask"):
    """Let this life of a rank say anew what it holds: a KvDelta was missed. Repeated until it has."""

    rank: RankNumber
    incarnation: Identity


ToRank = Identify | Admit | Form | Suspension | StartDPWave | KvAsk | Scaling | StartAgain | Refused
