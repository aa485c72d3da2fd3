"""The prefill quota in real processes: the same tokens as without, and it can be seen."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.engines.base import EngineSettings
from paceline.operate import loads_app as app
from tests.engines.moe_runs import asked_together, said_alone
from tests.serving import Command, command, deployment, wait_until

pytestmark = pytest.mark.slow

OPTIONS = {"layers": "1", "d_model": "16", "heads": "2", "experts": "4", "expert_hidden": "16"}
FLAGS = [flag for name, value in OPTIONS.items() for flag in ("--engine-option", f"{name}={value}")]
PROMPTS = [f"request {number} {'long ' * (40 if number % 3 == 0 else 2)}" for number in range(16)]
TOKENS = 40


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return said_alone(EngineSettings(options=OPTIONS), PROMPTS, TOKENS)


@pytest.mark.parametrize("quota", ["auto", "off", "3"])
def test_four_ranks_say_with_any_quota_what_one_engine_says(quota: str, expected: list[str]) -> None:
    moe = ("--engine", "paceline.engines.moe:MoeEngine", "-dp", "4", "--max-num-seqs", "4", *FLAGS)
    with deployment(*moe, "--max-num-batched-tokens", "64", "--prefill-quota", quota) as running:
        assert asked_together(running, PROMPTS, TOKENS) == expected
        assert asked_together(running, PROMPTS, TOKENS) == expected
        seen = shown_quotas(running)
        assert len(seen) == 4
        if quota != "auto":
            assert seen == [None if quota == "off" else 3] * 4


def shown_quotas(running: Command) -> list[Any]:
    done = CliRunner().invoke(app, ["--url", running.url, "--json"])
    assert done.exit_code == 0, done.output
    return [entry["prefill_quota"] for entry in json.loads(done.stdout)["ranks"]]


def test_the_quota_that_ranks_have_agreed_on_is_shown_while_they_run() -> None:
    timed = ("--engine", "paceline.engines.timed:TimedLockstepEngine", "-dp", "2", "--prefill-quota", "auto")
    with deployment(*timed) as running, ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(running.http.post, "/v1/completions", json={"prompt": "x" * 2000, "max_tokens": 300})
            for _ in range(2)
        ]
        wait_until(lambda: any(quota is not None for quota in shown_quotas(running)), "a quota is shown")
        assert [answer.result().status_code for answer in answers] == [200, 200]


def test_a_number_is_for_lockstep_alone() -> None:
    with command("serve", "--engine", "timed", "--prefill-quota", "64") as refused:
        assert refused.wait_end() == 1
        assert "--prefill-quota 64: only for engines in lockstep, which timed is not" in refused.output
        assert "Traceback" not in refused.output
