"""`paceline check`: what it prints, its exit status, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paceline.check.cli import SETS, app

SMALL = ["--requests", "1", "--losses", "0", "--crashes", "0"]


def ran(*flags: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == status, done.output
    # Progress goes to the other stream.
    return done.output if status else done.stdout


def test_nothing_wrong_is_status_0() -> None:
    assert "No violation" in ran(*SMALL)


@pytest.mark.parametrize(
    "flags",
    [
        ["--grouped", *SMALL],
        ["--scales", "1", "--ranks", "1", *SMALL, "--requests", "0"],
        ["--answers", "--crashes", "0"],
        ["--answers", "--scales", "1", "--crashes", "0"],
        ["--binding", "--requests", "1", "--losses", "0"],
    ],
)
def test_as_json(flags: list[str]) -> None:
    found = json.loads(ran(*flags, "--json"))
    assert (found["violations"], found["trace"], found["decided"]) == (0, [], True)
    assert found["states"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--without", "finished-waves-ignored"], "Then: the wave of a rank went down"),
        (["--binding", "--requests", "3", "--losses", "0", "--without", "grants-count"], "request 1 comes"),
    ],
)
def test_a_violation_is_status_1_and_told(flags: list[str], told: str) -> None:
    output = ran(*flags, status=1)
    assert told in output
    assert "A violation was found" in output
    assert json.loads(ran(*flags, "--json", status=1))["violations"] == 1


def test_too_little_memory_is_status_2() -> None:
    assert "Not decided" in ran(*SMALL, "--max-memory-mb", "64", status=2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--binding", "--grouped"], "--grouped"),
        (["--binding", "--suspensions", "1"], "--suspensions"),
        (["--binding", "--scales", "1"], "--scales"),
        (["--binding", "--max-memory-mb", "100"], "--max-memory-mb"),
        (["--binding", "--without", "own-report"], "own-report: not with --binding"),
        (["--without", "grants-count"], "grants-count: only with --binding"),
        (["--without", "nonsense"], "nonsense is not a rule"),
        (["--answers", "--losses", "1"], "--losses"),
        (["--answers", "--front-ends", "2"], "--front-ends"),
        (["--answers", "--without", "own-report"], "--without"),
        (["--mode", "nonsense"], "--mode"),
    ],
)
def test_what_the_walk_would_not_look_at_is_refused(flags: list[str], named: str) -> None:
    assert named in ran(*flags, status=2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--grouped"], ["--scales", "1"], ["--binding"], ["--answers"]])
def test_the_defaults_find_nothing(flags: list[str]) -> None:
    found = json.loads(ran(*flags, "--json"))
    assert (found["violations"], found["trace"], found["decided"]) == (0, [], True)


def test_the_defaults_hold_a_loss_a_crash_and_a_pause() -> None:
    for name in ("requests", "losses", "crashes", "suspensions"):
        assert any(one[name] for one in SETS["waves"])
