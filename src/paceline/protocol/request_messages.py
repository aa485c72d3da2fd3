"""The messages between front-ends and ranks: requests one way, tokens the other (`messages.py` has the rules)."""

from __future__ import annotations

from paceline.protocol.sampling import (
    Count,
    FinishReason,
    Identity,
    Message,
    PositionLogprobs,
    RankNumber,
    SamplingParams,
    StampedWave,
    TokenId,
)

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


FromFrontEndToRank = AddRequest | AbortRequests


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


ToFrontEndFromRank = Outputs
