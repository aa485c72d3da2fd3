"""The walk: nothing is wrong with the machines, and what is broken on purpose is found."""

from __future__ import annotations

import time

import pytest

from paceline.protocol.rules import RULES
from paceline.protocol.wave import GroupWave
from paceline.simulate.explore import Bound, Progress, walk
from paceline.simulate.explore_group import GroupedWorld
from paceline.simulate.explore_state import COORDINATOR, FIRST_BLOCK, State
from paceline.simulate.explore_world import World


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
def test_nothing_is_wrong_within_the_default_bound() -> None:
    # Of the processor's time: other processes are no part of what is measured.
    begin = time.process_time()
    result = walk(Bound())
    assert time.process_time() - begin < 60
    assert result.decided
    assert result.trace == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_left_out_is_found(rule: str) -> None:
    result = walk(Bound(without=frozenset({rule})))
    assert result.violations, f"nothing breaks without {rule}"
    assert result.trace[0].startswith("1. ")
    assert result.trace[-1] == result.violations[0]
    assert result.seconds < 20


def test_a_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupWave, "started", lambda *_: None)
    result = walk(Bound(ranks=2, requests=2, losses=0, crashes=0))
    assert result.trace[-1].startswith("Stuck: ")


def ends(world: World) -> tuple[set[object], set[object]]:
    """What ranks can be like, and what the deployment can be like at rest."""
    lives: set[object] = set()
    rests: set[object] = set()
    seen: set[State] = {world.initial()}
    ahead = list(seen)
    while ahead:
        state = ahead.pop()
        now = []
        for number in state[FIRST_BLOCK:]:
            life = world.blocks.life(number)
            now.append((life.machine.wave, life.machine.running, life.unfinished))
        lives.update(now)
        if world.at_rest(state):
            rests.add((world.common(state).unsent, world.coordinators.wave(state[COORDINATOR]), tuple(sorted(now))))
        for _, after in world.successors(state):
            if after not in seen:
                seen.add(after)
                ahead.append(after)
    return lives, rests


@pytest.mark.parametrize(("requests", "losses", "crashes"), [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_merging_hides_nothing(requests: int, losses: int, crashes: int) -> None:
    merged, plain = (World(2, requests, losses, crashes, merge=merge) for merge in (True, False))
    assert ends(merged) == ends(plain)


@pytest.mark.parametrize(("requests", "losses", "crashes"), [(1, 1, 0), (0, 0, 1)])
def test_merging_hides_nothing_of_generations(requests: int, losses: int, crashes: int) -> None:
    merged, plain = (GroupedWorld(2, requests, losses, crashes, merge=merge) for merge in (True, False))
    assert ends(merged) == ends(plain)


def test_a_walk_that_would_need_too_much_memory_is_not_decided() -> None:
    result = walk(Bound(ranks=2, requests=1, max_memory_mb=1))
    assert not result.decided
    assert result.violations == []


def test_progress_is_reported() -> None:
    seen: list[Progress] = []
    walk(Bound(ranks=2, requests=1, losses=0, crashes=0), seen.append)
    assert seen
    assert seen[0].depth == 0
