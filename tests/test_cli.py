"""The command line: help, versions, and errors that are one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paceline import __version__
from tests.pace import stretched


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


@pytest.mark.parametrize(
    "flag",
    ["--data-parallel-size", "--data-parallel-size-local", "--data-parallel-address", "--data-parallel-rpc-port",
     "--data-parallel-start-rank", "--data-parallel-hybrid-lb", "--data-parallel-external-lb", "--data-parallel-rank",
     "--api-server-count", "--headless", "--startup-timeout", "--drain-timeout", "--max-waiting"],
)  # fmt: skip
def test_serve_has_the_flag(flag: str) -> None:
    from typer.testing import CliRunner

    from paceline.cli import app

    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert f"{flag} " in help_text


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["serve", "--nonsense"], ["nonsense"], ["serve", "--port", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


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
    from typer.testing import CliRunner

    from paceline import cli
    from paceline.settings import DeploymentConfig

    configs: list[DeploymentConfig] = []
    monkeypatch.setattr(cli, "_serve", configs.append)
    done = CliRunner().invoke(cli.app, ["serve", "--engine", "vllm", *typed])
    assert done.exit_code == 0, done.output
    (config,) = configs
    assert config.engine.model == model
    assert list(config.engine.arguments) == theirs
    assert config.parallel.data_parallel_size == size
    assert CliRunner().invoke(cli.app, ["serve", *typed]).exit_code == 2
