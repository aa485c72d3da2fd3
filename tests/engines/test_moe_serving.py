"""The moe engine in real processes: the same texts as one engine alone, and weights that are changed below them."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.engines.base import EngineSettings
from paceline.engines.moe import MoeConfig
from paceline.engines.moe_model import write_weights
from tests.engines.moe_runs import asked_together, said_alone
from tests.serving import deployment

pytestmark = pytest.mark.slow

MOE = ("--engine", "paceline.engines.moe:MoeEngine")
PROMPTS = [f"request {number} {'x' * number}" for number in range(12)]
TOKENS = 24


def expected(seed: int) -> list[str]:
    return said_alone(EngineSettings(options={"weights_seed": str(seed)}), PROMPTS, TOKENS)


def test_ranks_in_lockstep_say_what_one_engine_says(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, MoeConfig(), 1)
    with deployment(*MOE, "-dp", "3", "--engine-option", f"weights={path}") as running:
        assert asked_together(running, PROMPTS, TOKENS) == expected(1)
        # Nobody runs now. Every rank has the new weights with its next step.
        write_weights(path, MoeConfig(), 2)
        assert asked_together(running, PROMPTS, TOKENS) == expected(2)
