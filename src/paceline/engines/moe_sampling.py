"""Choosing tokens for the `moe` engine, by the logits, the request's seed and the position, and nothing else.

So a step that is made anew chooses the same, and so does another rank. Plain Python: for 258 tokens that costs less
than the forward pass, and its order of additions is written down here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

from paceline.engines.moe_tokenizer import piece
from paceline.protocol.sampling import PositionLogprobs, SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""


class Sampler:
    """One request's way to choose. Without state but for what it was made from."""

    def __init__(self, params: SamplingParams, prompt_length: int, seed: int) -> None:
        self._params = params
        self._prompt_length = prompt_length
        self._seed = seed

    def choose(self, logits: Sequence[float], tokens: Sequence[int]) -> int:
        """The next token behind `tokens`, the prompt's and the answer's so far."""
        params = self._params
        scores = self._penalised(logits, tokens)
        # The most likely first; of equals the lower number.
        if params.temperature < GREEDY_BELOW:
            return scores.index(max(scores))
        order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[: params.top_k or None]
        best = scores[order[0]]
        weights = [math.exp((scores[token] - best) / params.temperature) for token in order]
        # Before the temperature, as top_p is in llama.cpp's chain: it then keeps the same tokens at any.
        kept = _kept([math.exp(scores[token] - best) for token in order], params.top_p, params.min_p)
        sums = list(accumulate(weights[:kept]))
        threshold = sums[-1] * _uniform(self._seed, len(tokens) - self._prompt_length)
        return next((token for token, end in zip(order, sums, strict=False) if end > threshold), order[0])

    def logprobs(self, logits: Sequence[float], chosen: int) -> PositionLogprobs:
        """The chosen token's log-probability and the best ones', by the logits as the model gave them."""
        best = max(logits)
        normaliser = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
        order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        top = [_logprob(token, logits[token] - normaliser) for token in order[: self._params.logprobs or 0]]
        return PositionLogprobs(_logprob(chosen, logits[chosen] - normaliser), top)

    def _penalised(self, logits: Sequence[float], tokens: Sequence[int]) -> list[float]:
        params, scores = self._params, list(logits)
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        if params.repetition_penalty != 1.0:
            for token in set(tokens):
                penalty = params.repetition_penalty
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if params.frequency_penalty or params.presence_penalty:
            for token, count in Counter(tokens[self._prompt_length :]).items():
                scores[token] -= params.frequency_penalty * count + params.presence_penalty
        return scores


def _kept(weights: Sequence[float], top_p: float, min_p: float) -> int:
    """How many of `weights`, largest first and that one 1, are still to be chosen from."""
    kept = sum(weight >= min_p for weight in weights) or 1
    if top_p < 1.0:
        enough = top_p * sum(weights)
        reached = next((index for index, total in enumerate(accumulate(weights)) if total >= enough), len(weights) - 1)
        kept = min(kept, reached + 1)
    return kept


def _uniform(seed: int, position: int) -> float:
    """A number from 0 to 1, 1 excluded, for one position of one request."""
    digest = blake2b(f"{seed}.{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _logprob(token: int, value: float) -> TokenLogprob:
    return TokenLogprob(token, piece(token, special=True), value)
