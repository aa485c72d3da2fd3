"""The search of ranks that form epochs, and come and go: nothing is wrong, and what is broken on purpose is found."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.check.cli import model_of, without_rule
from paceline.check.epochs import Epochs as Model, Scaled
from paceline.check.parties import Bound
from paceline.check.search import Finding, search
from paceline.core.coordinator.epoch import Epochs
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.invariants import leaver_has_nothing, one_size_a_number
from paceline.core.messages import Scaling
from paceline.core.node import Node
from paceline.core.rank.machine import Rank

CRASH: dict[str, int] = {"requests": 0, "losses": 0, "crashes": 1}
SCALE: dict[str, int] = {"ranks": 1, "requests": 0, "losses": 0, "crashes": 0, "scales": 1}


def walked(**bound: Any) -> Finding:
    return search(model_of(Bound(grouped=True, notices=False, **bound)))


@pytest.mark.parametrize("bound", [CRASH | {"requests": 2, "losses": 1, "crashes": 0}, CRASH, SCALE])
def test_nothing_is_wrong(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story, found.decided) == ("", [], True)
    assert found.states > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "bound",
    [
        CRASH | {"losses": 1},
        CRASH | {"ranks": 3},
        SCALE | {"requests": 1},
        SCALE | {"losses": 1},
        SCALE | {"ranks": 2},
    ],
)
def test_nothing_is_wrong_in_larger_bounds(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story) == ("", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "violation", "told", "moves"),
    [
        ("behind-at-rest-told", "all is at rest, and the waves differ", "", 19),
        ("leaver-drained", "before its time is up, is ended while it has 1 request.", "", 4),
        ("scaling-repeated", "Stuck: ", "does not reach the node", 4),
    ],
)
def test_a_rule_that_is_left_out_is_found(rule: str, violation: str, told: str, moves: int) -> None:
    found = without_rule(rule)
    assert violation in found.violation
    assert any(told in line for line in found.story)
    assert len(found.story) == moves


def test_survivors_that_never_go_on_alone_are_no_different_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on without a dead rank within the search: without that there are fewer states."""
    with_it = walked(**CRASH)
    monkeypatch.setattr(Epochs, "_leave_out", lambda *_: None)
    without = walked(**CRASH)
    assert with_it.story == without.story == []
    assert with_it.states > without.states


def test_a_coordinator_that_holds_on_to_an_epoch_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Epochs, "_end", lambda *_: None)
    assert walked(**CRASH).violation.startswith("Stuck: ")


@pytest.mark.slow
def test_requests_of_a_dead_rank_that_go_nowhere_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    sends = Model.sends

    def only_new(model: Model, *given: Any, stranded: bool) -> Any:
        return iter(()) if stranded else sends(model, *given, stranded=False)

    monkeypatch.setattr(Model, "sends", only_new)
    found = walked(**CRASH | {"requests": 1})
    assert found.violation.startswith("Stuck: ")
    assert any("must go on elsewhere" in line for line in found.story)


@pytest.mark.slow
def test_ranks_that_count_their_steps_on_in_the_next_epoch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = Rank._on_formed

    def count_on(rank: Rank, epoch: int) -> Any:
        steps = rank.waves.steps
        effects = formed(rank, epoch)
        rank.waves.steps = steps
        return effects

    monkeypatch.setattr(Rank, "_on_formed", count_on)
    found = walked(**CRASH | {"requests": 1}, steps=2, sync_interval=2)
    assert "ranks are in different collectives" in found.violation
    assert any("dies" in line for line in found.story)


# Scaling ----------------------------------------------------------------------------------------


def test_the_walk_begins_at_rest() -> None:
    model = Scaled(Bound(2, 1, 1, 1, grouped=True, notices=False, scales=1))
    state = model.start()
    assert model.over(state)
    assert (state.scale.left, state.crashes, state.spare, state.unsent) == (1, 1, 1, 1)


@pytest.mark.slow
def test_a_node_that_ends_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    on_scaling = Node._on_scaling

    def without_ends(node: Node, scaling: Scaling) -> Any:
        return [effect for effect in on_scaling(node, scaling) if type(effect).__name__ != "StopRank"]

    monkeypatch.setattr(Node, "_on_scaling", without_ends)
    assert walked(**SCALE | {"ranks": 2}).violation.startswith("Stuck: ")


def test_a_rank_that_is_counted_on_before_it_has_loaded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeploymentScaling, "hello", lambda *_: None)
    assert walked(**SCALE).violation.startswith("Stuck: ")


def test_a_rank_ends_what_it_has_unless_something_went_wrong() -> None:
    assert leaver_has_nothing(0, trial=True, undisturbed=True) is None
    assert leaver_has_nothing(1, trial=False, undisturbed=False) is None
    assert "is to leave" in (leaver_has_nothing(1, trial=False, undisturbed=True) or "")
    assert "has not joined" in (leaver_has_nothing(2, trial=True, undisturbed=False) or "")


def test_one_number_has_one_size() -> None:
    before, up, failed = Scaling(0, 1, 1), Scaling(2, 2, 2), Scaling(2, 1, 2, outcome="failed")
    assert one_size_a_number({"a": before, "b": Scaling(0, 2, 2), "c": up}) is None
    assert one_size_a_number({"a": up, "b": failed}) == "by scaling 2 there are 2 ranks to a, and 1 to b"
