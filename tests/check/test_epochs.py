"""The search of ranks that form epochs: nothing is wrong, and what is broken on purpose is found."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.check.cli import without_rule
from paceline.check.epochs import Epochs as Model
from paceline.check.parties import Bound
from paceline.check.search import Finding, search
from paceline.core.coordinator.epoch import Epochs
from paceline.core.rank.machine import Rank


def walked(requests: int = 0, losses: int = 0, crashes: int = 1, **more: Any) -> Finding:
    bound = Bound(requests=requests, losses=losses, crashes=crashes, grouped=True, notices=False, **more)
    return search(Model(bound))


@pytest.mark.parametrize("bound", [{"requests": 2, "losses": 1, "crashes": 0}, {}])
def test_nothing_is_wrong(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story, found.decided) == ("", [], True)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [{"losses": 1}, {"ranks": 3}])
def test_nothing_is_wrong_in_larger_bounds(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story) == ("", [])


@pytest.mark.slow
def test_a_rank_that_rests_behind_and_is_not_told_is_found() -> None:
    found = without_rule("behind-at-rest-told")
    assert "all is at rest, and the waves differ" in found.violation
    assert len(found.story) == 19


def test_survivors_that_never_go_on_alone_are_no_different_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on without a dead rank within the search: without that there are fewer states."""
    with_it = walked()
    monkeypatch.setattr(Epochs, "_leave_out", lambda *_: None)
    without = walked()
    assert with_it.story == without.story == []
    assert with_it.states > without.states


def test_a_coordinator_that_holds_on_to_an_epoch_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Epochs, "_end", lambda *_: None)
    assert walked().violation.startswith("Stuck: ")


@pytest.mark.slow
def test_requests_of_a_dead_rank_that_go_nowhere_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    sends = Model.sends

    def only_new(model: Model, *given: Any, stranded: bool) -> Any:
        return iter(()) if stranded else sends(model, *given, stranded=False)

    monkeypatch.setattr(Model, "sends", only_new)
    found = walked(requests=1)
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
    found = walked(requests=1, steps=2, sync_interval=2)
    assert "ranks are in different collectives" in found.violation
    assert any("dies" in line for line in found.story)
