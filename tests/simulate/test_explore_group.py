"""The walk of ranks that form generations: nothing is wrong, and what is broken on purpose is found."""

from __future__ import annotations

import time
from typing import Any

import pytest

from paceline.core.coordinator.epoch import Generations
from paceline.core.rank.machine import Rank
from paceline.simulate.explore import Bound, walk


@pytest.mark.parametrize(
    "bound",
    [
        Bound(ranks=2, requests=2, losses=1, crashes=0, grouped=True),
        Bound(ranks=2, requests=0, losses=1, crashes=1, grouped=True),
        Bound(ranks=3, requests=0, losses=0, crashes=1, grouped=True),
    ],
)
def test_nothing_is_wrong(bound: Bound) -> None:
    result = walk(bound)
    assert result.decided
    assert result.trace == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_wrong_where_a_rank_dies_in_a_wave() -> None:
    begin = time.process_time()
    result = walk(Bound(ranks=2, requests=1, losses=0, crashes=1, grouped=True))
    assert time.process_time() - begin < 120
    assert result.decided
    assert result.trace == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requests_of_a_dead_rank_that_go_nowhere_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.simulate.explore_group.ways_without_notice", lambda *_: [])
    result = walk(Bound(ranks=2, requests=1, losses=0, crashes=1, grouped=True))
    assert result.trace[-1].startswith("Stuck: ")
    assert any("must go on elsewhere" in line for line in result.trace)


def test_survivors_that_never_go_on_alone_are_no_different_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on without a dead rank within the walk: without that there are fewer states."""
    bound = Bound(ranks=2, requests=0, losses=0, crashes=1, grouped=True)
    with_it = walk(bound)
    monkeypatch.setattr(Generations, "_leave_out", lambda *_: None)
    without = walk(bound)
    assert with_it.trace == without.trace == []
    assert with_it.states > without.states


@pytest.mark.slow
def test_ranks_that_count_their_steps_on_in_the_next_generation_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = Rank._on_formed

    def count_on(rank: Rank, generation: int) -> Any:
        steps = rank.waves.steps
        effects = formed(rank, generation)
        rank.waves.steps = steps
        return effects

    monkeypatch.setattr(Rank, "_on_formed", count_on)
    result = walk(Bound(ranks=2, requests=1, losses=0, crashes=1, steps=2, sync_interval=2, grouped=True))
    assert "ranks are in different collectives" in result.trace[-1]
    assert any("dies" in line for line in result.trace)


def test_a_coordinator_that_holds_on_to_a_generation_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generations, "_end", lambda *_: None)
    result = walk(Bound(ranks=2, requests=0, losses=0, crashes=1, grouped=True))
    assert result.trace[-1].startswith("Stuck: ")
