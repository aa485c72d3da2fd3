"""The walk of what clients are given: nothing is lost, nothing comes twice, and what is broken on purpose is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.check_cli import app
from paceline.core.coordinator.membership import Membership
from paceline.core.frontend.failover import Stranded
from paceline.core.frontend.inflight import Flight, Flights
from paceline.core.requests import Outputs
from paceline.simulate.explore_answers import AnswersWorld
from paceline.simulate.explore_answers_place import Bounds
from paceline.simulate.explore_search import Finding, search


def walked(bounds: Bounds) -> Finding:
    return search(AnswersWorld(bounds))


@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nothing_comes_twice_where_one_dies() -> None:
    found = walked(Bounds(crashes=1))
    assert (found.violation, found.story) == ("", [])
    assert found.states > 1_000


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bounds", [Bounds(cuts=1, crashes=0), Bounds(requests=2, tokens=1)])
def test_nor_where_more_goes_wrong(bounds: Bounds) -> None:
    found = walked(bounds)
    assert (found.violation, found.story) == ("", [])


def forgotten_with_its_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stranded, "move", lambda *_: [])


def begun_anew(patch: pytest.MonkeyPatch) -> None:
    real = Flights.send_again

    def send_again(self: Flights, flight: Flight, rank: int) -> Any:
        flight.made.clear()
        return real(self, flight, rank)

    patch.setattr(Flights, "send_again", send_again)


def under_its_old_name_from_whichever_life(patch: pytest.MonkeyPatch) -> None:
    """A request keeps its number at the next rank, and what a life said that is over counts as the next one's."""
    again, outputs = Flights.send_again, Flights.outputs

    def send_again(self: Flights, flight: Flight, rank: int) -> Any:
        self._next_resend = flight.submit.request
        return again(self, flight, rank)

    def any_life(self: Flights, message: Outputs, *rest: Any) -> Any:
        link = next(iter(self.links.values()), None)
        if link is not None:
            message = Outputs(link.rank, link.incarnation, message.outputs)
        return outputs(self, message, *rest)

    patch.setattr(Flights, "send_again", send_again)
    patch.setattr(Flights, "outputs", any_life)


@pytest.mark.parametrize(
    ("breakage", "found"),
    [
        (forgotten_with_its_rank, "requests have not ended, and the front-end knows 0"),
        (begun_anew, "goes on behind 0 of 1 tokens"),
        (under_its_old_name_from_whichever_life, "got tokens"),
    ],
)
def test_a_breakage_is_found(breakage: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    finding = walked(Bounds(crashes=1))
    assert found in finding.violation
    assert any("dies" in line for line in finding.story)


@pytest.mark.timeout(300)
def test_a_rank_that_is_never_a_member_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "is_ready", lambda self, rank: False)
    finding = walked(Bounds(crashes=1))
    assert finding.violation == AnswersWorld.stuck


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["--answers", "--json", "--crashes", "0"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["violations"], found["trace"], found["decided"]) == (0, [], True)


@pytest.mark.parametrize(
    "flag", [("--grouped",), ("--losses", "1"), ("--without", "own-report"), ("--front-ends", "2")]
)
def test_what_the_walk_would_not_look_at_is_refused(flag: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["--answers", *flag])
    assert done.exit_code == 2
    assert flag[0] in done.output
