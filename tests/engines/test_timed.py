"""The engine without a model: its schedule, its time, and its bounds."""

from __future__ import annotations

import time
from typing import Any

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineError, EngineRequest, EngineSettings, StepResult
from paceline.engines.chat import Conversation
from paceline.engines.timed import ByteTokenizer, CostModel, TimedEngine, read_costs, word

FREE = CostModel(step_ms=0, prefill_ms=0, decode_ms=0)


def engine(costs: CostModel = FREE, **settings: Any) -> TimedEngine:
    return TimedEngine(EngineSettings(**settings), costs)


def request(key: int, prompt: int = 4, tokens: int = 3) -> EngineRequest:
    return EngineRequest(key, [1] * prompt, SamplingParams(max_tokens=tokens))


def run(made: TimedEngine) -> list[StepResult]:
    results = []
    while made.has_work():
        results.append(made.step())
    return results


def text_of(results: list[StepResult], key: int) -> str:
    return "".join(output.text for result in results for output in result.outputs if output.key == key)


def test_answer_is_the_words_in_order() -> None:
    made = engine()
    made.add(request(1, tokens=5))
    results = run(made)
    assert text_of(results, 1) == "".join(word(index) for index in range(5))
    assert [output.finish_reason for result in results for output in result.outputs] == [None] * 4 + ["length"]


def test_prompts_are_computed_in_chunks_within_the_budget() -> None:
    made = engine(max_num_batched_tokens=8)
    made.add(request(1, prompt=20, tokens=2))
    results = run(made)
    assert [result.prefilled_tokens for result in results] == [8, 8, 4, 0]
    assert [result.decoded_tokens for result in results] == [0, 0, 1, 1]


def test_decoding_goes_before_prompts() -> None:
    made = engine(max_num_batched_tokens=4)
    made.add(request(1, prompt=4, tokens=3))
    made.step()
    made.add(request(2, prompt=6, tokens=1))
    results = run(made)
    assert [result.prefilled_tokens for result in results] == [3, 3]
    assert text_of(results, 1) == word(1) + word(2)


def test_more_requests_than_slots_wait_and_all_finish() -> None:
    made = engine(max_num_seqs=2)
    for key in range(7):
        made.add(request(key))
    assert made.load().waiting == 7
    made.step()
    assert (made.load().waiting, made.load().running) == (5, 2)
    results = run(made)
    assert all(text_of(results, key).endswith(word(2)) for key in range(7))
    assert made.load().kv_used == 0


def test_kv_is_reserved_and_given_back() -> None:
    made = engine(kv_cache_tokens=20)
    made.add(request(1, prompt=10, tokens=5))
    made.add(request(2, prompt=10, tokens=5))
    made.step()
    assert (made.load().running, made.load().waiting) == (1, 1)
    made.abort(1)
    made.step()
    assert (made.load().running, made.load().waiting) == (1, 0)
    made.abort(2)
    assert not made.has_work()
    assert made.load().kv_used == 0


def test_request_that_never_fits_ends_with_an_error() -> None:
    made = engine(kv_cache_tokens=20)
    made.add(request(1, prompt=10, tokens=50))
    ((output,),) = [result.outputs for result in run(made)]
    assert output.finish_reason == "error"
    assert "60 tokens" in (output.error or "")


def test_step_lasts_as_the_cost_model_says() -> None:
    made = engine(CostModel(step_ms=20, prefill_ms=1, decode_ms=5))
    made.add(request(1, prompt=10, tokens=2))
    begin = time.monotonic()
    run(made)
    lasted_ms = (time.monotonic() - begin) * 1000
    assert lasted_ms >= 20 + 10 + 5 + 20 + 5


@pytest.mark.parametrize("options", [{"speed": "1"}, {"step_ms": "x"}, {"step_ms": "-1"}, {"step_ms": "nan"}])
def test_option_that_cannot_be(options: dict[str, str]) -> None:
    with pytest.raises(EngineError, match=f"--engine-option {next(iter(options))}: "):
        read_costs(options)


def test_tokenizer() -> None:
    tokenizer = ByteTokenizer(EngineSettings(max_model_len=99))
    assert tokenizer.max_model_len == 99
    assert tokenizer.decode(tokenizer.encode("naïve ✓")) == "naïve ✓"
    assert tokenizer.chat(Conversation([{"role": "user", "content": "hi"}])) == ["User: hi\nAssistant:"]
