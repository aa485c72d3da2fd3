"""The walk of brokered binding: nothing is found in the machines as they are, and every rule left out is missed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paceline.check_cli import app
from paceline.core.rules import BINDING_RULES
from paceline.simulate.explore_binding import Numbers, explore
from paceline.simulate.explore_binding_world import Limits

QUIET = {"aborts": 0, "losses": 0, "crashes": 0}


def test_requests_that_come_and_end() -> None:
    found = explore(Limits(**QUIET))
    assert (found.violation, found.story) == ("", [])
    assert found.states > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["aborts", "losses", "crashes"])
def test_nothing_is_found_with_each_fault(fault: str) -> None:
    found = explore(Limits(**QUIET | {fault: 1}))
    assert found.violation == "", "\n".join(found.story)


BREAKS = {
    "grants-count": ({"requests": 3}, "rank 0 has 2 requests and room for 1"),
    "grants-repeated": ({"losses": 1}, "a request can never come to its end any more"),
    "unsent-asked-again": ({"crashes": 1}, "a request can never come to its end any more"),
}


def test_every_rule_has_a_walk_that_misses_it() -> None:
    assert BREAKS.keys() == BINDING_RULES.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", BREAKS)
def test_a_rule_that_is_left_out_is_missed(rule: str) -> None:
    bounds, violation = BREAKS[rule]
    found = explore(Limits(**QUIET | bounds, without=frozenset({rule})))
    assert found.violation == violation
    assert len(found.story) > 3


def test_numbers_that_compare_alike_are_one() -> None:
    assert list(Numbers([5, 6, 9, 30]).values()) == list(Numbers([40, 41, 43, 100]).values()) == [2, 3, 5, 7]
    assert list(Numbers([0, 1, 2]).values()) == [0, 1, 2]
    assert list(Numbers([7]).values()) == [2]


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["--binding", "--json", "--requests", "1", "--losses", "0"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["violations"], found["trace"], found["decided"]) == (0, [], True)
    done = CliRunner().invoke(app, ["--binding", "--requests", "3", "--losses", "0", "--without", "grants-count"])
    assert done.exit_code == 1
    assert "request 1 comes" in done.stdout
    assert "A violation was found." in done.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--binding", "--grouped"], "--grouped"),
        (["--binding", "--suspensions", "1"], "--suspensions"),
        (["--binding", "--max-memory-mb", "100"], "--max-memory-mb"),
        (["--binding", "--without", "own-report"], "own-report: not with --binding"),
        (["--without", "grants-count"], "grants-count: only with --binding"),
    ],
)
def test_what_the_walk_would_not_look_at_is_refused(flags: list[str], named: str) -> None:
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 2
    assert named in done.output
