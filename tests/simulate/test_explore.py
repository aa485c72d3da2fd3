"""The walk: nothing is wrong with the machines, and what is broken on purpose is found."""

from __future__ import annotations

import time

import pytest

from paceline.core.coordinator.wave import GroupWave
from paceline.core.rules import RULES
from paceline.simulate.explore import Bound, Progress, walk


@pytest.mark.parametrize(
    "bound",
    [
        Bound(ranks=2, requests=2, losses=1, crashes=0),
        Bound(ranks=2, requests=1, losses=1, crashes=1),
        Bound(ranks=3, requests=2, losses=1, crashes=0),
        Bound(ranks=2, requests=2, losses=0, crashes=0, steps=2, sync_interval=2),
        *(
            Bound(ranks=2, requests=1, losses=0, crashes=0, suspensions=1, mode=mode)
            for mode in ("keep", "wait", "abort")
        ),
    ],
)
def test_nothing_is_wrong(bound: Bound) -> None:
    result = walk(bound)
    assert result.decided
    assert result.trace == []
    assert result.violations == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_wrong_within_the_default_bound() -> None:
    # Of the processor's time: other processes are no part of what is measured.
    begin = time.process_time()
    result = walk(Bound())
    assert (result.decided, result.violations, result.trace) == (True, [], [])
    assert result.states > 1_000_000
    assert time.process_time() - begin < 60


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_wrong_where_somebody_dies_while_all_is_suspended() -> None:
    result = walk(Bound(ranks=2, requests=1, losses=0, crashes=1, suspensions=1))
    assert (result.decided, result.violations, result.trace) == (True, [], [])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_left_out_is_found(rule: str) -> None:
    begin = time.process_time()
    result = walk(Bound(without=frozenset({rule})))
    assert result.violations, f"nothing breaks without {rule}"
    assert result.trace[0].startswith("1. ")
    assert result.trace[-1] == result.violations[0]
    assert time.process_time() - begin < 20


def test_a_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupWave, "started", lambda *_: None)
    result = walk(Bound(ranks=2, requests=2, losses=0, crashes=0))
    assert result.trace[-1].startswith("Stuck: ")


def test_a_broken_invariant_is_found_among_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupWave, "joiners_wave", 0)
    result = walk(Bound(ranks=2, requests=2, losses=1, crashes=1))
    assert "a rank that joins is told wave 0" in result.trace[-1]
    assert any("dies" in line for line in result.trace)


def test_a_walk_that_would_need_too_much_memory_is_not_decided() -> None:
    result = walk(Bound(ranks=2, requests=1, max_memory_mb=1))
    assert not result.decided
    assert result.violations == []


def test_progress_is_reported() -> None:
    seen: list[Progress] = []
    walk(Bound(ranks=2, requests=1, losses=0, crashes=0), seen.append)
    assert seen
    assert seen[0].depth == 0
