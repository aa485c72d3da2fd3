"""Running requests through an engine, for the tests of the llama engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.core.requests import PositionLogprobs, SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.gguf import GGUFHeader
from paceline.engines.llama import LlamaEngine, make_context, pooling_of
from paceline.engines.llama_text import plan_memory

MOST_STEPS = 2000


@dataclass
class Answer:
    """All outputs of one request together."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    stop: str | int | None = None
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    error: str | None = None


class Makes:
    """Makes engines of any settings over one loaded model."""

    def __init__(self, model: Any, header: GGUFHeader) -> None:
        self._model = model
        self._header = header

    def engine(self, **changes: Any) -> LlamaEngine:
        """An engine of 16 slots of 512 tokens, but for `changes`. One thread: two that must wait for each other
        take many times longer where other tests keep the cores busy."""
        settings = EngineSettings(**{"max_model_len": 512, "threads": 1, **changes})
        plan, pooling = plan_memory(settings, self._header), pooling_of(self._header)
        pooling = pooling if settings.task == "embed" else None
        return LlamaEngine(self._model, make_context(self._model, settings, plan, pooling), settings, plan, pooling)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    """The likeliest token each time, and on after the end of an answer."""
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **changes})


def advance(engine: LlamaEngine, answers: dict[int, Answer]) -> None:
    for output in engine.step().outputs:
        answer = answers.setdefault(output.key, Answer())
        assert answer.reason is None, "an output after the last one"
        answer.tokens += output.token_ids
        answer.text += output.text
        answer.reason, answer.stop, answer.error = output.finish_reason, output.stop_reason, output.error
        answer.logprobs += output.logprobs or []
        answer.prompt_logprobs += output.prompt_logprobs or []


def finish(engine: LlamaEngine, answers: dict[int, Answer] | None = None) -> dict[int, Answer]:
    """Step until nothing is left to do; the memory must be free then."""
    answers = {} if answers is None else answers
    for _ in range(MOST_STEPS):
        if not engine.has_work():
            break
        advance(engine, answers)
    load = engine.load()
    assert (load.waiting, load.running, load.prefill_tokens, load.kv_used) == (0, 0, 0, 0)
    return answers


def answer_all(engine: LlamaEngine, prompts: Mapping[int, Sequence[int]], params: SamplingParams) -> dict[int, Answer]:
    for key, prompt in prompts.items():
        engine.add(EngineRequest(key, prompt, params))
    return finish(engine)


def answer_one(engine: LlamaEngine, prompt: Sequence[int], params: SamplingParams) -> Answer:
    return answer_all(engine, {1: prompt}, params)[1]
