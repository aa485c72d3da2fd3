"""The moe engine in real processes: the same texts as one engine alone, and weights that are changed below them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.moe import MoeConfig, MoeEngine
from paceline.engines.moe_model import write_weights
from tests.engines.moe_runs import run_alone, text_of
from tests.serving import Command, deployment

pytestmark = pytest.mark.slow

MOE = ("--engine", "paceline.engines.moe:MoeEngine")
PROMPTS = [f"request {number} {'x' * number}" for number in range(12)]
TOKENS = 24


def expected(seed: int) -> list[str]:
    settings = EngineSettings(options={"weights_seed": str(seed)})
    engine = MoeEngine.create(settings, lambda what, share: None)
    for key, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        engine.add(EngineRequest(key, MoeEngine.tokenizer(settings).encode(prompt), params))
    outputs = run_alone(engine)
    return [text_of(outputs, key) for key in range(len(PROMPTS))]


def ask(running: Command) -> list[str]:
    """What a deployment says, asked all at a time."""

    def ask_one(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = running.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(ask_one, PROMPTS))


def test_ranks_in_lockstep_say_what_one_engine_says(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, MoeConfig(), 1)
    with deployment(*MOE, "-dp", "3", "--engine-option", f"weights={path}") as running:
        assert ask(running) == expected(1)
        # Nobody runs now. Every rank has the new weights with its next step.
        write_weights(path, MoeConfig(), 2)
        assert ask(running) == expected(2)
