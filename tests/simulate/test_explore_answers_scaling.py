"""The walk of what clients are given as ranks come and go: nothing is lost or comes twice, and a breakage is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.check_cli import app
from paceline.core.frontend.control import FrontEndScaling
from paceline.core.frontend.inflight import Flight, Flights
from paceline.core.frontend.machine import FrontEnd
from paceline.core.frontend.ranks import RankLink
from paceline.core.messages import Members
from paceline.core.node import Node
from paceline.simulate.explore_answers_place import Bounds
from paceline.simulate.explore_answers_scaling import ScaledAnswersWorld, ScaledPlace
from paceline.simulate.explore_search import Finding, search

BOUNDS = Bounds(crashes=0, scales=1)


def walked(bounds: Bounds = BOUNDS) -> Finding:
    return search(ScaledAnswersWorld(bounds))


@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nothing_comes_twice_as_ranks_come_and_go() -> None:
    found = walked()
    assert (found.violation, found.story) == ("", [])
    assert found.states > 500


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [{"cuts": 1, "crashes": 0}, {"crashes": 1}])
def test_nor_with_a_fault_meanwhile(fault: dict[str, int]) -> None:
    found = walked(Bounds(tokens=1, scales=1, **fault))
    assert (found.violation, found.story) == ("", [])
    assert found.states > 1_000


def test_a_rank_more_serves_once_it_has_loaded() -> None:
    world = ScaledAnswersWorld(BOUNDS)
    place = world.start()
    assert isinstance(place, ScaledPlace)
    place.ask(3)
    assert not world.over(place)
    place.start_rank(2)
    while place.for_front_end:
        place.front_end_hears()
    assert place.machine.ready_ranks() == [0, 1, 2]
    assert world.over(place)


def forgotten_where_it_left(patch: pytest.MonkeyPatch) -> None:
    real = Flights.lose

    def lose(self: Flights, link: RankLink) -> list[Flight]:
        leaves = link.rank in self.leaving
        flights = real(self, link)
        return [] if leaves else flights

    patch.setattr(Flights, "lose", lose)


def moved_while_it_answers(patch: pytest.MonkeyPatch) -> None:
    real = FrontEnd._learn_scaling

    def learn_scaling(self: FrontEnd, message: Members, now: float) -> Any:
        effects, flights = real(self, message, now), self._flights
        left = [flights._flights[wire] for link in flights.leaving.values() for wire in sorted(link.in_flight)]
        return [*effects, *self._stranded.move(left, now)]

    patch.setattr(FrontEnd, "_learn_scaling", learn_scaling)


def sent_to_who_leaves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FrontEndScaling, "takes_new", lambda *_: True)


@pytest.mark.parametrize(
    ("breakage", "found"),
    [
        (forgotten_where_it_left, "1 requests have not ended, and the front-end knows 0"),
        (moved_while_it_answers, "request 1 goes to rank 0 too; rank 1 has it"),
        (sent_to_who_leaves, "request 1 goes to rank 1, which is to leave"),
    ],
)
def test_a_breakage_is_found(breakage: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breakage(monkeypatch)
    finding = walked()
    assert found in finding.violation
    assert any("an operator asks for so many ranks: 1" in line for line in finding.story)


@pytest.mark.timeout(300)
def test_a_rank_that_is_never_ended_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_scaling = Node._on_scaling

    def without_ends(node: Node, scaling: Any) -> Any:
        return [effect for effect in on_scaling(node, scaling) if type(effect).__name__ != "StopRank"]

    monkeypatch.setattr(Node, "_on_scaling", without_ends)
    assert walked().violation == ScaledAnswersWorld.stuck


@pytest.mark.timeout(300)
def test_the_command() -> None:
    done = CliRunner().invoke(app, ["--answers", "--scales", "1", "--crashes", "0", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["violations"], found["trace"], found["decided"]) == (0, [], True)
    assert found["states"] > 500
