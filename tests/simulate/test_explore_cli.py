"""`paceline check`: what it prints, and its exit status."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from paceline.check_cli import check

SMALL = ["--ranks", "2", "--requests", "1", "--losses", "0", "--crashes", "0"]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(check)
    return app


def test_nothing_wrong_is_status_0(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, SMALL)
    assert done.exit_code == 0
    assert "No violation" in done.output


def test_ranks_with_generations_are_walked(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*SMALL, "--crashes", "1", "--requests", "0", "--grouped"])
    assert done.exit_code == 0
    assert "No violation" in done.output


def test_a_violation_is_status_1_and_a_story(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*SMALL, "--without", "finished-waves-ignored"])
    assert done.exit_code == 1
    assert done.output.startswith("1. ")
    assert "the wave of a rank went down" in done.output


def test_json_has_what_a_program_asks_for(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*SMALL, "--without", "own-report", "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 1
    assert found.keys() >= {"states", "violations", "seconds", "trace"}
    assert len(found["violations"]) == 1
    assert found["trace"][-1] == found["violations"][0]


def test_a_rule_that_there_is_not_is_named(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [*SMALL, "--without", "gravity"])
    assert done.exit_code == 2
    assert "gravity" in done.output


def test_too_little_memory_is_not_decided(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.simulate.explore_walk.Walk._memory_mb", lambda _: 65.0)
    done = CliRunner().invoke(app, [*SMALL, "--max-memory-mb", "64"])
    assert done.exit_code == 2
    assert "Not decided" in done.output
