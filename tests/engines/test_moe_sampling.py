"""Choosing tokens: by the logits, the seed and the position alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.moe import Sampler

LOGITS = [0.0, 3.0, 1.0, 3.0, -2.0, 2.0]


def sampler(seed: int = 1, prompt_length: int = 0, **params: Any) -> Sampler:
    return Sampler(SamplingParams(max_tokens=9, **params), prompt_length, seed)


def draws(made: Sampler, count: int = 2000) -> Counter[int]:
    """What it chooses at many positions of an answer of nothing but token 4."""
    return Counter(made.choose(LOGITS, [4] * position) for position in range(count))


def test_greedy_takes_the_best_and_the_lower_of_equals() -> None:
    assert sampler(temperature=0.0).choose(LOGITS, []) == 1
    assert sampler(temperature=0.0, logit_bias={1: -1.0}).choose(LOGITS, []) == 3


def test_frequencies_are_the_probabilities() -> None:
    counts = draws(sampler(temperature=1.0))
    total = sum(math.exp(logit) for logit in LOGITS)
    for token, logit in enumerate(LOGITS):
        assert counts[token] / 2000 == pytest.approx(math.exp(logit) / total, abs=0.03)


def test_seed_and_position_decide() -> None:
    first = [sampler(1).choose(LOGITS, [0] * position) for position in range(50)]
    assert first == [sampler(1).choose(LOGITS, [0] * position) for position in range(50)]
    assert first != [sampler(2).choose(LOGITS, [0] * position) for position in range(50)]
    # The prompt's length does not count, the answer's does.
    assert first[:40] == [sampler(1, prompt_length=7).choose(LOGITS, [0] * (7 + place)) for place in range(40)]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.3}, {1, 3, 5}),
        ({"min_p": 1.0}, {1, 3}),
        ({"temperature": 1e-3}, {1, 3}),
    ],
)
def test_only_what_is_kept_is_chosen(params: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(sampler(**params))) == kept


def test_penalties() -> None:
    greedy = {"temperature": 0.0, "prompt_length": 2}
    tokens = [1, 3, 5, 5]
    assert sampler(**greedy).choose(LOGITS, tokens) == 1
    # Only the prompt has 1 and 3; repetition counts the prompt, the other two the answer.
    assert sampler(repetition_penalty=4.0, **greedy).choose(LOGITS, tokens) == 2
    assert sampler(presence_penalty=2.0, logit_bias={5: 2.0}, **greedy).choose(LOGITS, tokens) == 1
    assert sampler(frequency_penalty=0.6, logit_bias={5: 2.0}, **greedy).choose(LOGITS, tokens) == 1
    assert sampler(frequency_penalty=0.4, logit_bias={5: 2.0}, **greedy).choose(LOGITS, tokens) == 5


def test_logprobs() -> None:
    found = sampler(logprobs=6).logprobs(LOGITS, 5)
    assert [one.token_id for one in found.top] == [1, 3, 5, 2, 0, 4]
    assert math.fsum(math.exp(one.logprob) for one in found.top) == pytest.approx(1)
    assert found.chosen == found.top[2]
    assert sampler(logprobs=0).logprobs(LOGITS, 5).top == []


def test_logits_that_are_no_numbers() -> None:
    # Weights that are being rewritten may give anything; a token comes out all the same.
    for temperature in (0.0, 1.0):
        assert sampler(temperature=temperature).choose([math.nan] * 4, []) in range(4)
        assert sampler(temperature=temperature).choose([1.0, math.nan, math.inf, -math.inf], []) in range(4)
