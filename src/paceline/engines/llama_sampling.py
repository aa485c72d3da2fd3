"""Choosing tokens: one chain of llama.cpp's samplers a request, and log-probabilities where asked for.

The order is llama.cpp's: logit_bias, penalties, top_k, top_p, min_p, temperature, then the draw.

Penalties. OpenAI's and vLLM's frequency and presence penalties count generated tokens only; the repetition
penalty counts the prompt as well. llama.cpp's one sampler has one window for all three, so two are
used, and the prompt is shown to the chain while only the first is in it. The window must be given in
tokens: -1, documented as the context's size, is none at all.

The draw at each position has random numbers of its own, made from the request's seed and the position and nothing else:
so another rank that goes on with a half-written answer draws what this one would have drawn. llama.cpp keeps one
generator a chain, which nothing can move on but drawing; so each draw gets a copy of the chain with a generator of its
own, in 10 us.

Cost, over 262,144 tokens on one thread: greedy 0.5 ms, top_k 0.5, min_p 0.7, all of them 1.0; plain
temperature 3.5 and top_p 4.5, as every token's probability must be computed. A row of a decoding batch
costs 14 ms, so nothing is gained by greedy sampling of our own.

Logits come out of cyllama as a list of floats, 5 ms, and 6 more as an array; the rest of the work on
log-probabilities is 1 ms. So they are read for requests that ask, and for no others.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from paceline.engines.llama_library import library
from paceline.protocol.sampling import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: dividing by them overflows."""
RANDOM_SEED = 0xFFFFFFFF
"""What llama.cpp takes for "a random seed", so that no draw's seed must be it."""
SEED_INSTEAD = 0x9E3779B9
ROW = 512


class Sampler:
    """One request's sampler. Keeps its counts of tokens over the request's life.

    `window`: how many tokens back penalties look; as many as a request may have.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary_size: int, window: int, seed: int
    ) -> None:
        chain = library().LlamaSampler()
        if params.logit_bias:
            chain.add_logit_bias(vocabulary_size, list(params.logit_bias.items()))
        if params.repetition_penalty != 1.0:
            chain.add_penalties(window, params.repetition_penalty, 0.0, 0.0)
            for token in prompt:
                chain.accept(token)
        if params.frequency_penalty or params.presence_penalty:
            chain.add_penalties(window, 1.0, params.frequency_penalty, params.presence_penalty)
        self._greedy = params.temperature < GREEDY_BELOW
        if self._greedy:
            chain.add_greedy()
        else:
            _narrow(chain, params)
        self._chain = chain
        self._seed = seed
        self._position = 0

    def accept(self, token: int) -> None:
        """Count a token of the answer that was chosen elsewhere."""
        self._chain.accept(token)
        self._position += 1

    def sample(self, context: Any, row: int) -> int:
        """Choose a token by the logits of the batch's token at `row`, and count it."""
        if self._greedy:
            return int(self._chain.sample(context, row))
        draw = self._chain.clone()
        draw.add_dist(_seed_at(self._seed, self._position))
        token = int(draw.sample(context, row))
        draw.close()
        self.accept(token)
        return token

    def close(self) -> None:
        """Free the chain."""
        self._chain.close()


def read_logprobs(logits: Sequence[float], chosen: int, best: int) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's natural-log probability, and the `best` most likely tokens with theirs, best first.

    `logits` as the model gave them, before any sampler.
    """
    # Here and not at the top: front-ends import this package's engines, and need no numpy.
    numpy: Any = importlib.import_module("numpy")
    values = numpy.fromiter(logits, numpy.float32, len(logits))
    greatest = values.max()
    normaliser = float(greatest) + float(numpy.log(numpy.exp(values - greatest).sum(dtype=numpy.float64)))
    tokens = _best_tokens(numpy, values, best) if best else []
    return float(values[chosen]) - normaliser, [(token, float(values[token]) - normaliser) for token in tokens]


def _best_tokens(numpy: Any, values: Any, best: int) -> list[int]:
    """The tokens of the greatest values, greatest first, lower numbers first among equals.

    The k best lie within the k rows whose maxima are greatest: a tenth of a partition's time.
    """
    best = min(best, len(values))
    padded = numpy.full(-(-len(values) // ROW) * ROW, -numpy.inf, numpy.float32)
    padded[: len(values)] = values
    maxima = padded.reshape(-1, ROW).max(axis=1)
    rows = numpy.argsort(-maxima, kind="stable")[:best]
    rows.sort()
    candidates = (rows[:, None] * ROW + numpy.arange(ROW)).ravel()
    order = numpy.argsort(-padded[candidates], kind="stable")[:best]
    return [int(token) for token in candidates[order]]


def _seed_at(seed: int, position: int) -> int:
    """The seed of the draw at one position of one request."""
    digest = blake2b(f"{seed}.{position}".encode(), digest_size=4).digest()
    made = int.from_bytes(digest, "little")
    return SEED_INSTEAD if made == RANDOM_SEED else made


def _narrow(chain: Any, params: SamplingParams) -> None:
    if params.top_k:
        chain.add_top_k(params.top_k)
    if params.top_p < 1.0:
        chain.add_top_p(params.top_p, 1)
    if params.min_p > 0.0:
        chain.add_min_p(params.min_p, 1)
    chain.add_temp(params.temperature)
