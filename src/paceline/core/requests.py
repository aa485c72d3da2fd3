"""What passes between front-ends and ranks: a request with its sampling, tokens back; and what all messages share."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

RankNumber = Annotated[int, Meta(ge=0, lt=65536)]
Identity = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Wave = Annotated[int, Meta(ge=0, lt=2**53)]
# What a front-end believes of the wave. Ranks take it up, so it is kept far from the largest Wave: a wild one
# must not bring the number to where nobody can decode it any more.
LARGEST_STAMP = 2**48 - 1
StampedWave = Annotated[int, Meta(ge=0, le=LARGEST_STAMP)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Address = Annotated[str, Meta(max_length=512)]
RequestName = Annotated[str, Meta(max_length=128)]
"""What a request is called in every log and timeline: its `X-Request-Id`, or what its front-end has called it."""
FinishReason = Literal["stop", "length", "abort", "error"]
SuspendMode = Literal["keep", "wait", "abort"]
ControlAction = Literal["keep", "wait", "abort", "resume"]


Outcome = Literal["done", "refused", "failed", "late"]
WeightVersion = Annotated[str, Meta(max_length=128)]
"""A trainer's name for weights; empty for those that a rank starts with."""
WeightSource = Annotated[str, Meta(max_length=1 << 16)]
"""Where an engine gets weights: an object, as JSON (`engines/weights.py`)."""
WeightAction = Literal["stage", "commit", "drop", "rename"]


class Message(Struct, frozen=True, array_like=True, gc=False):
    """Base of all that is on the wire: immutable, an array, never in a reference cycle."""


class StructuredOutput(Message, frozen=True):
    """What an answer's text must be. `text`: a JSON schema, a regular expression, a JSON array of texts of which it is
    one, or a grammar in Lark's or llama.cpp's notation (GBNF).
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str


class SamplingParams(Message, frozen=True):
    """How to choose tokens, and when to stop.

    `top_k` 0 is off, as are `top_p` 1, `min_p` 0 and the penalties at 0 (`repetition_penalty` at 1).
    `seed` null means a seed of the rank's choosing. `logprobs` null is none; k is the chosen token's
    and the k best; `prompt_logprobs` is the same of the prompt's tokens. `temperature` 0 is greedy.
    `min_tokens`: no end of the answer and no stop token before so many. `bad_words`: runs of tokens of which the
    last is never chosen behind the others. `allowed_token_ids` null is all. `structured_outputs`: the answer's form.
    `adapter`: the one that the model computes with, by its name; nothing for none.
    """

    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    logit_bias: dict[TokenId, float] = {}
    stop: list[Annotated[str, Meta(min_length=1, max_length=4096)]] = []
    stop_token_ids: list[TokenId] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=64)] | None = None
    skip_special_tokens: bool = True
    min_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    bad_words: list[list[TokenId]] = []
    allowed_token_ids: list[TokenId] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=64)] | None = None
    structured_outputs: StructuredOutput | None = None
    adapter: Annotated[str, Meta(max_length=512)] = ""


class TokenLogprob(Message, frozen=True):
    """One token, its text as raw bytes, and its natural-log probability."""

    token_id: TokenId
    piece: bytes
    logprob: float


class PositionLogprobs(Message, frozen=True):
    """The chosen token of one position, and the most likely ones there, best first."""

    chosen: TokenLogprob
    top: list[TokenLogprob] = []


# Front-end -> rank (DEALER -> ROUTER) ---------------------------------------------------------


class AddRequest(Message, frozen=True, tag="add"):
    """One request. `request`: the front-end's own id for it, unique in the front-end's life.

    `number`: 1 for the first send to this life of the rank, then one more each: the numbering on
    which the exact accounting rests. `incarnation`: the life meant; another one refuses the request.
    `wave`: the wave the front-end believes current. `priority`: lower goes first, as in vLLM.
    `made_token_ids`: the answer's first tokens, where another life of a rank has made them and its client has them:
    the next one is sampled behind them as if this rank had made them, and what was shown of them is not shown again.
    `name`: what logs call it.
    """

    request: Identity
    number: Count
    incarnation: Identity
    wave: StampedWave
    prompt_token_ids: list[TokenId]
    params: SamplingParams
    priority: int = 0
    made_token_ids: list[TokenId] = []
    name: RequestName = ""

    @property
    def tokens(self) -> int:
        """Tokens to compute before the next one of the answer."""
        return len(self.prompt_token_ids) + len(self.made_token_ids)


class AbortRequests(Message, frozen=True, tag="abort"):
    """These requests are not wanted any more. Unknown ones are ignored."""

    requests: list[Identity]


class CallEngine(Message, frozen=True, tag="call"):
    """Have the engine do something beside serving, between two steps; what it says comes as the text of an Output.

    `call`: the front-end's own number for it, which is none of its requests'. `incarnation`: the life meant; another
    one does nothing. `arguments`: an object, as JSON.
    """

    call: Identity
    incarnation: Identity
    method: Annotated[str, Meta(max_length=128)]
    arguments: Annotated[str, Meta(max_length=1 << 20)] = "{}"


FromFrontendToRank = AddRequest | AbortRequests | CallEngine


# Front-end -> coordinator -> nodes ------------------------------------------------------------


class Revive(Message, frozen=True, tag="revive"):
    """Start these ranks again, where they are not there: they had ended too often. Said again until they are back."""

    frontend: Identity
    ranks: list[RankNumber]


class StartAgain(Message, frozen=True, tag="start-again"):
    """What a Revive asks for, to the nodes."""

    ranks: list[RankNumber]


class Refused(Message, frozen=True, tag="refused"):
    """Tells a life of a rank, which goes on asking, that it has no place. `holder`: the address of the life that has
    it; empty where the deployment of `size` ranks has none of this number.
    """

    rank: RankNumber
    incarnation: Identity
    holder: Annotated[str, Meta(max_length=256)]
    size: Count


# Weights (`coordinator/weights.py`) -----------------------------------------------------------


class Weights(Message, frozen=True):
    """The weights that all ranks have, and what is to take their place: the highest `number` counts.

    Even `number`: each rank has `current` before its next step. Odd: all make `next` ready beside it, and none steps.
    `current`, `next`: the number that brought them, 0 for those that a rank starts with. `version`, `source`: of
    `current`, as with `next`. `keep_kv`: KV of requests under way stays, made by other weights. `commit`: `next` is put
    in force once all have it ready. `timeout_ms`: how long that may take. `outcome`, `why`: of the last update.
    """

    number: Count = 0
    current: Count = 0
    version: WeightVersion = ""
    source: WeightSource = ""
    next: Count = 0
    next_version: WeightVersion = ""
    next_source: WeightSource = ""
    keep_kv: bool = False
    commit: bool = True
    timeout_ms: Count = 0
    outcome: Outcome = "done"
    why: Annotated[str, Meta(max_length=1024)] = ""

    @property
    def under_way(self) -> bool:
        """Whether others are about to take their place."""
        return self.number % 2 == 1


class UpdateWeights(Message, frozen=True, tag="update-weights"):
    """Have all ranks make weights ready while they are paused, and put them in force (`commit`: at once); or `drop`
    them, or `rename` those in force. Repeated until a ControlAnswer says by which number; fields as in Weights.

    `answered`: as in ControlRequest. `known`: the newest that the front-end has heard of.
    """

    frontend: Identity
    call: Identity
    action: WeightAction
    version: WeightVersion = ""
    source: WeightSource = ""
    keep_kv: bool = False
    commit: bool = True
    timeout_ms: Count = 0
    answered: Count = 0
    known: Weights | None = None


class WeightsOfRank(Message, frozen=True):
    """What a rank says of weights: the newest word that it `known`s, those it `has`, and the ones it has `ready`
    beside them; `failed`: those that it cannot have, and `why`.
    """

    known: Weights
    has: Count = 0
    ready: Count = 0
    failed: Count = 0
    why: Annotated[str, Meta(max_length=1024)] = ""


class Receipt(Message, frozen=True):
    """What the queue found of a prompt's beginning when the request came (`dispatch/homes.py`).

    `home`: the rank that had best serve it of those that hold any, None for none; `held`: tokens of its prompt there,
    `by_key`: as its client's key promises. `home_ms`, `elsewhere_ms`: predicted time to its first token there, and at
    the best of the others, -1 where none could take it.
    """

    home: Annotated[int, Meta(ge=0, le=65535)] | None = None
    held: Count = 0
    by_key: bool = False
    home_ms: Annotated[int, Meta(ge=-1, lt=2**48)] = -1
    elsewhere_ms: Annotated[int, Meta(ge=-1, lt=2**48)] = -1


# Rank -> front-end (ROUTER -> DEALER) ---------------------------------------------------------


class Timing(Message, frozen=True):
    """What a rank's own clock says of a request: microseconds from its arrival until the engine had it, and from there
    to the first token that this rank made.
    """

    waited_us: Count
    computed_us: Count


class Output(Message, frozen=True):
    """What one step made for one request.

    `text` is what may be shown now: it never ends inside a character nor inside what may become a stop
    string, so it can be empty while `token_ids` is not. `finish_reason` is null until the last output.
    `stop_reason`: the stop string or token id that ended it, where one did. `error`: why, with "error", where
    `stop_reason` is "bad_request" if the request itself is wrong. The first one
    brings `prompt_logprobs` where asked for, of all tokens of the prompt (the first one's says nothing), and
    `cached_tokens`: how many of the prompt's were not computed, since their KV was there. `weight_version`: of the
    weights that chose these tokens. `embedding`: the prompt's, of length 1, as 32-bit floats. `timing`: in the first
    one of each rank.
    """

    request: Identity
    token_ids: list[TokenId]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionLogprobs] | None = None
    error: str | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    cached_tokens: Count = 0
    weight_version: WeightVersion = ""
    embedding: bytes = b""
    timing: Timing | None = None


class Outputs(Message, frozen=True, tag="outputs"):
    """All that one step made for one front-end: one message a step, however many requests. Without any, it asks
    whether the front-end is there.
    """

    rank: RankNumber
    incarnation: Identity
    outputs: list[Output]


ToFrontendFromRank = Outputs
