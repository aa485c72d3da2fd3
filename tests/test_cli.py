"""The command line: help, versions, and errors that are one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paceline import __version__, cli
from paceline.cli import ELSEWHERE, app
from paceline.settings import DeploymentConfig
from tests.pace import stretched

FLAGS = (
    "--data-parallel-size", "--data-parallel-size-local", "--data-parallel-address", "--data-parallel-rpc-port",
    "--data-parallel-start-rank", "--data-parallel-hybrid-lb", "--data-parallel-external-lb", "--data-parallel-rank",
    "--api-server-count", "--headless", "--startup-timeout", "--drain-timeout", "--max-waiting",
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline", *arguments],
        capture_output=True,
        text=True,
        timeout=stretched(60),
        check=False,
    )


@pytest.mark.slow
def test_version() -> None:
    assert run("--version").stdout.strip() == f"paceline {__version__}"


def invoke(*arguments: str, **how: Any) -> Result:
    """A command that ends before anything is started, in this process."""
    return CliRunner().invoke(app, list(arguments), **how)


def test_serve_has_the_flags() -> None:
    text = invoke("serve", "--help", env={"COLUMNS": "200"}).output
    missing = [flag for flag in FLAGS if f"{flag} " not in text]
    assert not missing


# `paceline vllm` is the command of vLLM, where that is installed.
@pytest.mark.parametrize("command", [None, "serve", *sorted(ELSEWHERE.keys() - {"vllm"})])
def test_every_command_has_its_short_help(command: str | None) -> None:
    done = invoke(*([command] if command else []), "-h", env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert (command or "serve") in done.stdout


@pytest.mark.parametrize("arguments", [["serve", "--nonsense"], ["nonsense"], ["serve", "--port", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-dp", "2", "-dpl", "3"], "--data-parallel-size-local"),
        (["-dp", "2", "--data-parallel-rank", "2"], "--data-parallel-rank"),
        (["--data-parallel-external-lb"], "--data-parallel-external-lb"),
        (["--routing", "magic"], "--routing"),
        (["--port", "70000"], "--port"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--engine-option", "x"], "--engine-option"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--model", ""], "--model: names no model"),
        ([""], "--model: names no model"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_flag(arguments: list[str], text: str) -> None:
    done = invoke("serve", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"paceline: error: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-dp", "0"], "--data-parallel-size"),
        (["--min-stats-update-interval-ms", "-1"], "--min-stats-update-interval-ms"),
        (["-dp", "4", "--max-data-parallel-size", "3"], "--max-data-parallel-size: must be 4 to 65536"),
        (["--back-output-address", "nowhere"], "cannot bind nowhere"),
    ],
)
def test_coordinator_that_cannot_be(arguments: list[str], text: str) -> None:
    done = run("coordinator", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("paceline: error: ")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("typed", "model", "theirs", "size"),
    [
        (["m", "--tensor-parallel-size", "2", "-dp", "3"], "m", ["--tensor-parallel-size", "2"], 3),
        (["--enforce-eager", "m"], None, ["--enforce-eager", "m"], 2),
        (["m", "--x=-1", "-y", "-1", "--data_parallel_size=4"], "m", ["--x=-1", "-y", "-1"], 4),
        (["--lora-modules", "a=b", "c=d", "-dp", "1", "m"], "m", ["--lora-modules", "a=b", "c=d"], 1),
        (["--json.key", "v", "--port", "0", "m"], "m", ["--json.key", "v"], 2),
    ],
)
def test_flags_of_the_engine_s_own(
    typed: list[str], model: str | None, theirs: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[DeploymentConfig] = []
    monkeypatch.setattr(cli, "_serve", configs.append)
    done = invoke("serve", "--engine", "vllm", *typed)
    assert done.exit_code == 0, done.output
    (config,) = configs
    assert config.engine.model == model
    assert list(config.engine.arguments) == theirs
    assert config.parallel.data_parallel_size == size
    assert invoke("serve", *typed).exit_code == 2
