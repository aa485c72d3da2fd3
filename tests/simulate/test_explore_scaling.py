"""The walk of a deployment whose size changes: nothing is wrong, and what is broken on purpose is found."""

from __future__ import annotations

import time
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.check_cli import app
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.invariants import leaver_has_nothing, one_size_a_number
from paceline.core.messages import Scaling
from paceline.core.node import Node
from paceline.simulate.explore import Bound, walk
from paceline.simulate.explore_scaling import ScaledWorld


@pytest.mark.parametrize(
    "bound",
    [
        Bound(ranks=1, requests=1, losses=0, crashes=0, scales=1),
        Bound(ranks=1, requests=0, losses=1, crashes=0, scales=1),
        Bound(ranks=2, requests=0, losses=0, crashes=0, scales=1),
    ],
)
def test_nothing_is_wrong(bound: Bound) -> None:
    begin = time.process_time()
    result = walk(bound)
    # Of the processor's time: other processes are no part of what is measured.
    assert time.process_time() - begin < 15
    assert result.decided
    assert result.trace == []
    assert result.states > 1_000


def test_the_walk_begins_at_rest() -> None:
    world = ScaledWorld(2, 1, 1, 1, scales=1)
    state = world.initial()
    assert world.at_rest(state)
    assert world.common(state).scale is not None
    assert world.common(state).crashes == world.common(state).losses == world.common(state).unsent == 1


def test_a_rank_that_is_ended_with_its_requests_is_found() -> None:
    result = walk(Bound(without=frozenset({"leaver-drained"})))
    assert result.trace[-1] == "Then: a rank that is to leave, before its time is up, is ended while it has 1 request."


def test_a_node_that_is_told_once_is_found() -> None:
    result = walk(Bound(without=frozenset({"scaling-repeated"})))
    assert result.trace[-1].startswith("Stuck: ")
    assert any("does not reach the node" in line for line in result.trace)


def test_a_node_that_ends_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_scaling = Node._on_scaling

    def without_ends(node: Node, scaling: Scaling) -> Any:
        return [effect for effect in on_scaling(node, scaling) if type(effect).__name__ != "StopRank"]

    monkeypatch.setattr(Node, "_on_scaling", without_ends)
    result = walk(Bound(ranks=2, requests=0, losses=0, crashes=0, scales=1))
    assert result.trace[-1].startswith("Stuck: ")


def test_a_rank_that_is_counted_on_before_it_has_loaded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeploymentScaling, "hello", lambda *_: None)
    result = walk(Bound(ranks=1, requests=0, losses=0, crashes=0, scales=1))
    assert result.trace[-1].startswith("Stuck: ")


def test_the_command() -> None:
    flags = ["--scales", "1", "--ranks", "1", "--requests", "0", "--losses", "0", "--crashes", "0"]
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0
    assert "No violation" in done.output


def test_it_is_no_flag_of_the_walk_of_binding() -> None:
    done = CliRunner().invoke(app, ["--binding", "--scales", "1"])
    assert done.exit_code == 2
    assert "--scales" in done.output


def test_a_rank_ends_what_it_has_unless_something_went_wrong() -> None:
    assert leaver_has_nothing(0, trial=True, undisturbed=True) is None
    assert leaver_has_nothing(1, trial=False, undisturbed=False) is None
    assert "is to leave" in (leaver_has_nothing(1, trial=False, undisturbed=True) or "")
    assert "has not joined" in (leaver_has_nothing(2, trial=True, undisturbed=False) or "")


def test_one_number_has_one_size() -> None:
    before, up, failed = Scaling(0, 1, 1), Scaling(2, 2, 2), Scaling(2, 1, 2, outcome="failed")
    assert one_size_a_number({"a": before, "b": Scaling(0, 2, 2), "c": up}) is None
    assert one_size_a_number({"a": up, "b": failed}) == "by scaling 2 there are 2 ranks to a, and 1 to b"
