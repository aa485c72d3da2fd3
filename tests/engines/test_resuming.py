"""An answer that one rank has begun goes on at another as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer
from paceline.engines.timed import TimedEngine
from tests.engines import moe_runs
from tests.engines.llama_runs import greedy
from tests.engines.resuming import check_resumes, outputs_of

DRAWN = {"temperature": 1.0, "seed": 7}
EVERYTHING = {
    **DRAWN, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.2,
    "logprobs": 3,
}  # fmt: skip


@pytest.mark.parametrize("params", [{}, DRAWN, EVERYTHING, {**DRAWN, "max_tokens": 2}], ids=str)
def test_moe(params: dict[str, Any]) -> None:
    settings = {"tokens": 14, **{"tokens" if name == "max_tokens" else name: v for name, v in params.items()}}
    check_resumes(moe_runs.make_engine, moe_runs.request(1, **settings))


def test_moe_stops_at_a_stop_string_that_lies_across_the_cut() -> None:
    whole = outputs_of(moe_runs.make_engine(), moe_runs.request(1, tokens=30))
    text = "".join(output.text for output in whole)
    stop = text[10:16]
    stopped = moe_runs.request(1, tokens=30, stop=[stop])
    assert outputs_of(moe_runs.make_engine(), stopped)[-1].stop_reason == stop
    check_resumes(moe_runs.make_engine, stopped)
    check_resumes(moe_runs.make_engine, moe_runs.request(1, tokens=30, stop=[stop], include_stop_str_in_output=True))


def test_moe_counts_the_tokens_made_as_work_and_towards_the_length() -> None:
    engine = moe_runs.make_engine()
    request = replace(moe_runs.request(1, tokens=8), made_token_ids=[97, 98, 99])
    engine.add(request)
    assert engine.load().prefill_tokens == len(request.prompt_token_ids) + 3
    assert len(moe_runs.run_alone(engine)) == 5


def test_moe_refuses_what_was_whole_already() -> None:
    (output,) = outputs_of(
        moe_runs.make_engine(), replace(moe_runs.request(1, tokens=2), made_token_ids=[97, 98])
    )  # fmt: skip
    assert (output.finish_reason, output.error) == ("error", "the 2 tokens made already are the whole answer")


def test_timed() -> None:
    make = lambda: TimedEngine.create(EngineSettings(options={"step_ms": "0"}), lambda what, share: None)  # noqa: E731
    check_resumes(make, EngineRequest(1, [1] * 9, SamplingParams(12)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "params", [greedy(24), SamplingParams(24, ignore_eos=True, **EVERYTHING)], ids=["greedy", "everything"]
)
def test_llama(engine: LlamaEngine, tokenizer: LlamaTokenizer, params: SamplingParams) -> None:
    prompt = tokenizer.encode("The capital of France is 🗼, and in Japanese: 東京は日本の")
    check_resumes(lambda: engine, EngineRequest(1, prompt, params), cuts=range(0, 24, 3))
