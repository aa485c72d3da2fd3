"""`python -m bench.replay`: others' ways to choose ranks by the flags of `paceline simulate --trace`, and a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from bench.replay import app
from typer.testing import CliRunner, Result

from tests.sim.test_trace_cli import TRACE


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("routing", ["least-load", "vllm-0.32", "oracle"])
def test_figures_by_whoever_chooses(trace: str, routing: str) -> None:
    done = run("--trace", trace, "--json", "--routing", routing, "--requests", "30", "--front-ends", "2")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert (figures["routing"], figures["requests"], figures["ranks"], figures["front_ends"]) == (routing, 30, 8, 2)


@pytest.mark.parametrize("flags", [("--routing", "best"), ("--routing", "bf-io"), ("--ranks", "0")])
def test_a_flag_that_cannot_be_is_named(trace: str, flags: tuple[str, str]) -> None:
    done = run("--trace", trace, *flags)
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"paceline: {flags[0]}: ")


def test_a_plot_is_drawn_or_what_is_missing_is_named(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    done = run("--trace", trace, "--plot", str(path))
    if importlib.util.find_spec("matplotlib") is None:
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert "--plot: needs matplotlib" in done.output
    else:
        assert done.exit_code == 0, done.output
        assert path.read_bytes().startswith(b"\x89PNG")
