"""What happens to a rank's machine, and what it asks its shell to do (`rank.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.messages import FromRank, GroupMember, Identify, StartDPWave, Suspension, ToRank
from paceline.core.requests import AddRequest, CallEngine, FinishReason, FromFrontendToRank, Outputs, PositionLogprobs


class Phase(Enum):
    """Where a rank is in its life; waves are a matter of READY alone."""

    LOADING = "loading"
    JOINING = "joining"
    READY = "ready"
    LEFT = "left"


class StepOutput(Struct, frozen=True, gc=False):
    """What one step made for one request, by the rank's own `key`; else the fields of `messages.Output`."""

    key: int
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionLogprobs] | None = None
    error: str | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    cached_tokens: int = 0
    embedding: bytes = b""


class KvChange(Struct, frozen=True, gc=False):
    """Names of blocks (`core/blocks.py`) that an engine holds the KV of since it was last asked, and holds no more."""

    stored: Sequence[int] = ()
    removed: Sequence[int] = ()


# Events ---------------------------------------------------------------------------------------


class Loaded(Struct, frozen=True):
    """The engine is there; the rank wants to join."""


class CoordinatorSaid(Struct, frozen=True):
    message: ToRank


class FrontendSaid(Struct, frozen=True, gc=False):
    """`arrived`: when, by the clock of `now`, where somebody has looked."""

    frontend: int
    message: FromFrontendToRank
    arrived: float | None = None


class FrontendGone(Struct, frozen=True):
    """A front-end cannot be reached any more: nobody waits for its requests."""

    frontend: int


class Turn(Struct, frozen=True):
    """All that has arrived is handled; what now? `load`, `has_work`: the engine's, at this moment. `kv`: what it holds
    that it did not at the turn before, None where it does not say.
    """

    load: Load
    has_work: bool
    kv: KvChange | None = None


class Stepped(Struct, frozen=True, gc=False):
    """A step, or dummy step, is done. `seconds`: the time it took.

    `urged`: some rank's `Urge` came with it; the same at all ranks of the epoch.
    """

    outputs: Sequence[StepOutput]
    load: Load
    has_work: bool
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    seconds: float = 0.0
    urged: bool = False


class Agreed(Struct, frozen=True):
    """The ranks' agreement: whether any has work, and the highest of their waves and of their pauses.

    `quota`: their parts in the common prefill quota, reduced; empty where the agreement does not carry them.
    """

    any_work: bool
    wave: int
    suspension: int = 0
    quota: Sequence[int] = ()


class Formed(Struct, frozen=True):
    epoch: int


class Met(Struct, frozen=True):
    """The members of this epoch are connected, and the engine begins in it: `Formed` when it has."""

    epoch: int


class EpochEnded(Struct, frozen=True):
    """A collective cannot complete, since a member is gone: in place of `Stepped`, `Agreed`, `Met` or `Formed`."""


class Waited(Struct, frozen=True):
    """The rank has waited in a collective for longer than the stall timeout, or (`ranks` empty) no longer waits.

    `ranks`, `collective`, `kind`, `seconds`: as in `StallReport`. Sends only, so it may come in mid-step.
    """

    ranks: Sequence[int]
    collective: int = 0
    kind: str = ""
    seconds: float = 0.0


class Invoked(Struct, frozen=True):
    """What the engine has said to a front-end's call, as JSON; or why it could not."""

    frontend: int
    call: int
    text: str
    error: str | None = None


class WeightsDone(Struct, frozen=True):
    """What has come of StageWeights or (`used`) UseWeights; `error`: why it could not be. `outputs`: of steps that were
    still under way in the engine. `spoils`: the weights that the engine had are gone.
    """

    number: int
    used: bool
    error: str = ""
    outputs: Sequence[StepOutput] = ()
    spoils: bool = False


class Looked(Struct, frozen=True):
    """Somebody has looked in, perhaps in mid-step. `progress`: changes where the engine gets on; `waits`: the engine is
    in a collective, for its peers. As with `Waited`, what comes of it only sends, or ends this life.
    """

    progress: int = 0
    waits: bool = False


class Leave(Struct, frozen=True):
    """The rank ends in good order."""


Event = (
    Loaded
    | CoordinatorSaid
    | FrontendSaid
    | FrontendGone
    | Turn
    | Stepped
    | Agreed
    | Met
    | Formed
    | EpochEnded
    | Waited
    | Invoked
    | WeightsDone
    | Looked
    | Leave
)

IN_MID_STEP = (Identify, Suspension, StartDPWave)
"""What the coordinator says that is handled at once, also in mid-step, in the order in which it was said: a rank that
waits for the others in a collective must be heard, or nobody wakes them; and a rank that said that it holds a
pause must have taken in every wake from before. Their effects only send. All else waits its turn."""


# Effects --------------------------------------------------------------------------------------


class Take(Struct, frozen=True, gc=False):
    key: int
    request: AddRequest


class Drop(Struct, frozen=True):
    key: int


class ToCoordinator(Struct, frozen=True):
    message: FromRank


class ToFrontend(Struct, frozen=True, gc=False):
    frontend: int
    message: Outputs


class Step(Struct, frozen=True):
    """Run one engine step. `prefill_quota`: prompt tokens that it may compute; None for what the engine can."""

    prefill_quota: int | None = None


class DummyStep(Struct, frozen=True):
    """Take part in the others' step with nothing of one's own."""


class Agree(Struct, frozen=True):
    """All-reduce: whether this rank has work (or), its wave (max), and the pause that it knows (max).

    `quota`: its part in the common prefill quota, reduced as `quota.REDUCTIONS` says.
    """

    has_work: bool
    wave: int
    suspension: int = 0
    quota: Sequence[int] = ()


class Urge(Struct, frozen=True):
    """Let all ranks agree after this step or the next, where the group can carry that. Sends only."""


class FormGroup(Struct, frozen=True):
    """Leave the group, if there is one, and form this one; `Formed` when it is."""

    epoch: int
    members: Sequence[GroupMember]


class Again(Struct, frozen=True):
    """Ask again at once: the engine's load has changed."""


class Invoke(Struct, frozen=True):
    """Have the engine do this; `Invoked` when it has."""

    frontend: int
    message: CallEngine


class StageWeights(Struct, frozen=True):
    """Have the engine make these weights ready beside those that it has; `WeightsDone` when it has, or cannot."""

    number: int
    source: str


class UseWeights(Struct, frozen=True):
    """Have the engine compute with these weights from here on; as with StageWeights. `keep_kv`: as in Weights."""

    number: int
    source: str
    keep_kv: bool


class StartAgain(Struct, frozen=True):
    """End this life at once, whatever its engine is in. `why`: what is wrong with it; empty where nothing is, but its
    epoch has ended and it can be a member of no other.
    """

    why: str = ""


class Wait(Struct, frozen=True):
    """Nothing to do until something arrives, or until `until` (None: for ever)."""

    until: float | None


Effect = (
    Take
    | Drop
    | ToCoordinator
    | ToFrontend
    | Step
    | DummyStep
    | Agree
    | Urge
    | FormGroup
    | Again
    | Invoke
    | StageWeights
    | UseWeights
    | StartAgain
    | Wait
)
