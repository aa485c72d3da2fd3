"""What a walk leaves out hides nothing: against one that does without."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest

from paceline.core.requests import ControlAction
from paceline.simulate.explore_group import GroupedWorld
from paceline.simulate.explore_state import COORDINATOR, FIRST_BLOCK, State
from paceline.simulate.explore_walk import SingleWalk, Walk, WideWalk
from paceline.simulate.explore_world import World

KEEP: tuple[ControlAction, ...] = ("keep", "resume")


def all_states(world: World) -> set[State]:
    """Those that a search without any numbers, losses or order comes through."""
    seen = {world.initial()}
    ahead = list(seen)
    while ahead:
        for _, after in world.successors(ahead.pop()):
            if after not in seen:
                seen.add(after)
                ahead.append(after)
    return seen


def ends(world: World, states: Iterable[State]) -> tuple[set[object], set[object]]:
    """What ranks can be like, and what the deployment can be like at rest."""
    lives: set[object] = set()
    rests: set[object] = set()
    for state in states:
        now = []
        for number in state[FIRST_BLOCK:]:
            life = world.blocks.life(number)
            now.append((life.machine.wave, life.machine.running, life.unfinished))
        lives.update(now)
        if world.at_rest(state):
            rests.add((world.common(state).unsent, world.coordinators.wave(state[COORDINATOR]), tuple(sorted(now))))
    return lives, rests


def walked(walk: type[Walk], world: World) -> set[State]:
    """The states that a walk met."""
    walking = walk(world, 4096, lambda _: None)
    assert walking.go()
    return {walking.state(number) for number in range(len(walking))}


@pytest.mark.parametrize(("requests", "losses", "crashes"), [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 2, 0), (1, 0, 1)])
def test_merging_hides_nothing(requests: int, losses: int, crashes: int) -> None:
    merged, plain = (World(2, requests, losses, crashes, merge=merge) for merge in (True, False))
    met = walked(WideWalk, merged)
    assert len(met) < len(every := all_states(plain))
    assert ends(merged, met) == ends(plain, every)


@pytest.mark.parametrize(("requests", "losses", "crashes"), [(1, 1, 0), (0, 0, 1)])
def test_merging_hides_nothing_of_generations(requests: int, losses: int, crashes: int) -> None:
    merged, plain = (GroupedWorld(2, requests, losses, crashes, merge=merge) for merge in (True, False))
    assert ends(merged, walked(SingleWalk, merged)) == ends(plain, all_states(plain))


@pytest.mark.parametrize("walk", [SingleWalk, WideWalk])
@pytest.mark.parametrize(("requests", "losses", "crashes", "calls"), [(2, 1, 1, ()), (1, 2, 0, ()), (0, 1, 1, KEEP)])
def test_every_state_is_met_with_as_many_losses_left_or_more(
    walk: type[Walk], requests: int, losses: int, crashes: int, calls: tuple[ControlAction, ...]
) -> None:
    world = World(2, requests, losses, crashes, calls=calls)
    every = all_states(world)
    met = walked(walk, world)
    assert met < every
    most: dict[State, int] = {}
    for state in met:
        bare = without_losses(world, state)
        most[bare] = max(most.get(bare, 0), world.common(state).losses)
    assert all(most.get(without_losses(world, state), -1) >= world.common(state).losses for state in every)


def without_losses(world: World, state: State) -> State:
    """The same where no losses are left."""
    common = world.number(world.common(state)._replace(losses=0))
    return (state[COORDINATOR], common, *state[FIRST_BLOCK:])


def test_a_path_leads_from_the_start_move_by_move() -> None:
    world = World(2, 2, 1, 1)
    walk = WideWalk(world, 4096, lambda _: None)
    assert walk.go()
    path = walk.path(len(walk) - 1)
    assert path[0] == world.initial()
    assert len(path) == walk.depth
    for before, after in pairwise(path):
        assert after in [target for _, target in world.successors(before)]
