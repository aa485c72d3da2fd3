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
FinishReason = Literal["stop", "length", "abort", "error"]
SuspendMode = Literal["keep", "wait", "abort"]
ControlAction = Literal["keep", "wait", "abort", "resume"]


class Message(Struct, frozen=True, array_like=True, gc=False):
    """Base of all that is on the wire: immutable, an array, never in a reference cycle."""


class SamplingParams(Message, frozen=True):
    """How to choose tokens, and when to stop.

    `top_k` 0 is off, as are `top_p` 1, `min_p` 0 and the penalties at 0 (`repetition_penalty` at 1).
    `seed` null means a seed of the rank's choosing. `logprobs` null is none; k is the chosen token's
    and the k best. `temperature` 0 is greedy.
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
    """

    request: Identity
    number: Count
    incarnation: Identity
    wave: StampedWave
    prompt_token_ids: list[TokenId]
    params: SamplingParams
    priority: int = 0
    made_token_ids: list[TokenId] = []

    @property
    def tokens(self) -> int:
        """Tokens to compute before the next one of the answer."""
        return len(self.prompt_token_ids) + len(self.made_token_ids)


class AbortRequests(Message, frozen=True, tag="abort"):
    """These requests are not wanted any more. Unknown ones are ignored."""

    requests: list[Identity]


FromFrontendToRank = AddRequest | AbortRequests


# Rank -> front-end (ROUTER -> DEALER) ---------------------------------------------------------


class Output(Message, frozen=True):
    """What one step made for one request.

    `text` is what may be shown now: it never ends inside a character nor inside what may become a stop
    string, so it can be empty while `token_ids` is not. `finish_reason` is null until the last output.
    `stop_reason`: the stop string or token id that ended it, where one did. `error`: why, with "error".
    """

    request: Identity
    token_ids: list[TokenId]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[PositionLogprobs] | None = None
    error: str | None = None


class Outputs(Message, frozen=True, tag="outputs"):
    """All that one step made for one front-end: one message a step, however many requests. Without any, it asks
    whether the front-end is there.
    """

    rank: RankNumber
    incarnation: Identity
    outputs: list[Output]


ToFrontendFromRank = Outputs
