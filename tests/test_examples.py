"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pace import stretched
from tests.serving import deployment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_echo_engine() -> None:
    with deployment("--engine", "examples.echo_engine:EchoEngine", "-dp", "2") as running:
        answer = running.openai.completions.create(model="echo", prompt="hello", max_tokens=7)
        assert answer.choices[0].text == "hellohe"
        stream = running.openai.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "abc"}], max_tokens=3, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "abc"


@pytest.mark.slow
def test_split_policy() -> None:
    arguments = ["--routing", "examples.split_policy:SplitByLength", "--engine", "timed", "-dp", "2"]
    with deployment(*arguments, "--max-model-len", "8192") as running:
        for length, rank, reason in ((10, "0", "a short prompt"), (3000, "1", "a long prompt")):
            answer = running.http.post(
                "/v1/completions", json={"prompt": "a" * length, "max_tokens": 1}, headers={"X-Paceline-Routing": "1"}
            )
            assert answer.headers["x-data-parallel-rank"] == rank
            assert f'"reason":"{reason}"' in answer.headers["x-paceline-routing"]
            assert '"policy":"examples.split_policy:SplitByLength"' in answer.headers["x-paceline-routing"]


def test_echo_engine_is_short() -> None:
    lines = (ROOT / "examples" / "echo_engine.py").read_text().splitlines()
    assert len(lines) <= 60


@pytest.mark.slow
def test_trainer_changes_the_weights_under_load() -> None:
    """Answers are those of the weights that the last update wrote, at each rank in turn, and no request fails."""
    command = [sys.executable, str(ROOT / "examples" / "trainer.py"), "--updates", "40", "--streams", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=stretched(110))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 updates" in done.stdout
    assert "0 failed, 0 wrong answers" in done.stdout
    assert "stop " in done.stdout
    assert "restart " in done.stdout
