"""The search of a deployment whose size changes: nothing is wrong, and what is broken on purpose is found."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.check.cli import without_rule
from paceline.check.parties import Bound
from paceline.check.scaling import Scaled
from paceline.check.search import Finding, search
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.invariants import leaver_has_nothing, one_size_a_number
from paceline.core.messages import Scaling
from paceline.core.node import Node


def walked(ranks: int = 1, requests: int = 0, losses: int = 0, crashes: int = 0) -> Finding:
    bound = Bound(ranks, requests, losses, crashes, grouped=True, notices=False, scales=1)
    return search(Scaled(bound))


def test_nothing_is_wrong() -> None:
    found = walked()
    assert (found.violation, found.story, found.decided) == ("", [], True)
    assert found.states > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("bound", [{"requests": 1}, {"losses": 1}, {"ranks": 2}])
def test_nothing_is_wrong_in_larger_bounds(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story) == ("", [])


def test_the_walk_begins_at_rest() -> None:
    model = Scaled(Bound(2, 1, 1, 1, grouped=True, notices=False, scales=1))
    state = model.start()
    assert model.over(state)
    assert (state.scale.left, state.crashes, state.losses, state.unsent) == (1, 1, 1, 1)


@pytest.mark.slow
def test_a_rank_that_is_ended_with_its_requests_is_found() -> None:
    found = without_rule("leaver-drained")
    assert found.violation == "Then: a rank that is to leave, before its time is up, is ended while it has 1 request."
    assert len(found.story) == 4


@pytest.mark.slow
def test_a_node_that_is_told_once_is_found() -> None:
    found = without_rule("scaling-repeated")
    assert found.violation.startswith("Stuck: ")
    assert any("does not reach the node" in line for line in found.story)


@pytest.mark.slow
def test_a_node_that_ends_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_scaling = Node._on_scaling

    def without_ends(node: Node, scaling: Scaling) -> Any:
        return [effect for effect in on_scaling(node, scaling) if type(effect).__name__ != "StopRank"]

    monkeypatch.setattr(Node, "_on_scaling", without_ends)
    assert walked(ranks=2).violation.startswith("Stuck: ")


def test_a_rank_that_is_counted_on_before_it_has_loaded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeploymentScaling, "hello", lambda *_: None)
    assert walked().violation.startswith("Stuck: ")


def test_a_rank_ends_what_it_has_unless_something_went_wrong() -> None:
    assert leaver_has_nothing(0, trial=True, undisturbed=True) is None
    assert leaver_has_nothing(1, trial=False, undisturbed=False) is None
    assert "is to leave" in (leaver_has_nothing(1, trial=False, undisturbed=True) or "")
    assert "has not joined" in (leaver_has_nothing(2, trial=True, undisturbed=False) or "")


def test_one_number_has_one_size() -> None:
    before, up, failed = Scaling(0, 1, 1), Scaling(2, 2, 2), Scaling(2, 1, 2, outcome="failed")
    assert one_size_a_number({"a": before, "b": Scaling(0, 2, 2), "c": up}) is None
    assert one_size_a_number({"a": up, "b": failed}) == "by scaling 2 there are 2 ranks to a, and 1 to b"
