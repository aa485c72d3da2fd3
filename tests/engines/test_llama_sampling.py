"""Sampling on the real model: seeds, penalties, biases, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given, strategies as st

from paceline.core.requests import SamplingParams
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import RANDOM_SEED, LlamaTokenizer, read_logprobs
from tests.engines.llama_runs import Answer, answer_all, answer_one, greedy


@pytest.fixture(scope="session")
def prompt(tokenizer: LlamaTokenizer) -> list[int]:
    """A prompt with more than one good answer."""
    return tokenizer.encode("My favourite animals are")


def drawn(engine: LlamaEngine, prompt: list[int], **changes: Any) -> Answer:
    """An answer of eight tokens at temperature 1."""
    return answer_one(engine, prompt, SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **changes}))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_in_any_company(engine: LlamaEngine, prompt: list[int]) -> None:
    params = SamplingParams(max_tokens=8, seed=7, ignore_eos=True)
    together = answer_all(engine, dict.fromkeys(range(4), prompt), params)
    assert len({tuple(answer.tokens) for answer in together.values()}) == 1
    assert drawn(engine, prompt, seed=7).tokens == together[0].tokens
    assert drawn(engine, prompt, seed=8).tokens != together[0].tokens


@pytest.mark.slow
def test_no_seed_means_another_text_each_time(engine: LlamaEngine, prompt: list[int]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.5)
    together = answer_all(engine, dict.fromkeys(range(4), prompt), params)
    assert len({tuple(answer.tokens) for answer in together.values()}) == 4


@pytest.mark.slow
def test_the_seed_that_llama_cpp_takes_for_none_is_a_seed_like_any_other(
    engine: LlamaEngine, prompt: list[int]
) -> None:
    assert drawn(engine, prompt, seed=RANDOM_SEED).tokens == drawn(engine, prompt, seed=RANDOM_SEED).tokens


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_the_narrowest_choice_is_greedy(engine: LlamaEngine, prompt: list[int], narrow: dict[str, float]) -> None:
    assert drawn(engine, prompt, **narrow).tokens == answer_one(engine, prompt, greedy(8)).tokens


@pytest.mark.slow
def test_a_bias_forces_and_forbids_also_at_temperature_0(engine: LlamaEngine, prompt: list[int]) -> None:
    first = answer_one(engine, prompt, greedy(1)).tokens[0]
    assert answer_one(engine, prompt, greedy(3, logit_bias={4521: 100.0})).tokens == [4521] * 3
    assert first not in answer_one(engine, prompt, greedy(4, logit_bias={first: -100.0})).tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_frequency_and_presence_count_the_answer_only(engine: LlamaEngine, name: str) -> None:
    prompt = [2, *[4521] * 30]
    plain = answer_one(engine, prompt, greedy(2, logprobs=2))
    assert plain.tokens == [4521] * 2, "a prompt of one word is expected to go on with it"
    best, second = plain.logprobs[1].top
    lead = best.logprob - second.logprob
    # Were the prompt counted, the first token would be another already.
    assert answer_one(engine, prompt, greedy(2, **{name: lead + 0.1})).tokens == [4521, second.token_id]
    assert answer_one(engine, prompt, greedy(2, **{name: lead - 0.1})).tokens == [4521, 4521]


@pytest.mark.slow
def test_the_repetition_penalty_counts_the_prompt(engine: LlamaEngine) -> None:
    prompt = [2, *[4521] * 30]
    assert answer_one(engine, prompt, greedy(3, repetition_penalty=5.0)).tokens[0] != 4521


@pytest.mark.slow
def test_logprobs_are_those_of_the_model_before_any_sampler(engine: LlamaEngine, prompt: list[int]) -> None:
    plain = answer_one(engine, prompt, greedy(3, logprobs=5))
    assert len(plain.logprobs) == 3
    for token, position in zip(plain.tokens, plain.logprobs, strict=True):
        values = [best.logprob for best in position.top]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert position.chosen.token_id == token == position.top[0].token_id
        assert 0 < sum(math.exp(value) for value in values) < 1
        assert b"".join([position.chosen.piece]).decode()
    forced = answer_one(engine, prompt, greedy(1, logprobs=5, logit_bias={4521: 100.0}))
    assert forced.logprobs[0].top == plain.logprobs[0].top
    assert forced.logprobs[0].chosen.token_id == 4521
    assert forced.logprobs[0].chosen.logprob < plain.logprobs[0].top[4].logprob
    assert answer_one(engine, prompt, greedy(1, logprobs=0)).logprobs[0].top == []


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=1200),
    chosen=st.integers(0, 1199),
    best=st.integers(0, 64),
)
def test_logprobs_are_a_softmax_and_the_best_are_the_best(logits: list[float], chosen: int, best: int) -> None:
    chosen %= len(logits)
    value, top = read_logprobs(logits, chosen, best)
    exact = numpy.array(logits, dtype=numpy.float64)
    normaliser = exact.max() + math.log(numpy.exp(exact - exact.max()).sum())
    assert value == pytest.approx(logits[chosen] - normaliser, abs=1e-4)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    assert [token for token, _ in top] == order[:best]
    for token, logprob in top:
        assert logprob == pytest.approx(logits[token] - normaliser, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.3}, {"frequency_penalty": 1.5}, {"presence_penalty": 2.0}]
)
def test_a_penalty_holds_for_drawn_tokens_as_for_greedy_ones(
    engine: LlamaEngine, prompt: list[int], penalty: dict[str, float]
) -> None:
    certain = drawn(engine, prompt, top_k=1, max_tokens=16, **penalty).tokens
    assert certain == answer_one(engine, prompt, greedy(16, **penalty)).tokens
    assert certain != answer_one(engine, prompt, greedy(16)).tokens


# What may not come, and what alone may ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_word_never_comes(engine: LlamaEngine, prompt: list[int], temperature: float) -> None:
    sampling = {"temperature": temperature, "seed": 3, "repetition_penalty": 1.1}
    free = drawn(engine, prompt, **sampling).tokens
    whole, pair = [[free[0]]], [free[2:4]]
    assert drawn(engine, prompt, bad_words=whole, **sampling).tokens[0] != free[0]
    held = drawn(engine, prompt, bad_words=pair, **sampling).tokens
    assert held[:3] == free[:3], "the pair's first alone is no bad word"
    assert held[3] != free[3]
    assert drawn(engine, prompt, bad_words=[[free[3], free[2]]], **sampling).tokens == free


@pytest.mark.slow
def test_no_end_comes_before_min_tokens(engine: LlamaEngine, tokenizer: LlamaTokenizer, prompt: list[int]) -> None:
    ends = {"logit_bias": {1: 100.0}, "ignore_eos": False}
    assert len(drawn(engine, prompt, **ends).tokens) == 1
    assert len(drawn(engine, prompt, **ends, min_tokens=5).tokens) == 6
    stop = drawn(engine, prompt, temperature=0.0).tokens[0]
    answer = drawn(engine, prompt, temperature=0.0, stop_token_ids=[stop], min_tokens=3)
    assert stop not in answer.tokens[:3]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_come(engine: LlamaEngine, prompt: list[int], temperature: float) -> None:
    allowed = [300, 400, 500]
    answer = drawn(engine, prompt, allowed_token_ids=allowed, temperature=temperature, repetition_penalty=1.5)
    assert set(answer.tokens) <= set(allowed)


@pytest.mark.slow
def test_the_prompt_s_logprobs_are_those_of_choosing_it(engine: LlamaEngine, prompt: list[int]) -> None:
    made = answer_one(engine, prompt, greedy(4, logprobs=2))
    longer = [*prompt, *made.tokens]
    read = answer_one(engine, longer, greedy(1, prompt_logprobs=2)).prompt_logprobs
    assert [one.chosen.token_id for one in read] == longer
    for one, chosen in zip(read[len(prompt) :], made.logprobs, strict=True):
        assert one.chosen.logprob == pytest.approx(chosen.chosen.logprob, abs=1e-4)
        assert [token.token_id for token in one.top] == [token.token_id for token in chosen.top]
    together = answer_all(engine, dict.fromkeys(range(3), longer), greedy(1, prompt_logprobs=0))
    assert all(len(answer.prompt_logprobs) == len(longer) for answer in together.values())
