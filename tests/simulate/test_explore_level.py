"""What happens in many states at once is what happens in each of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from paceline.core.requests import ControlAction
from paceline.simulate.explore_level import Level
from paceline.simulate.explore_state import State
from paceline.simulate.explore_world import World

KEEP: tuple[ControlAction, ...] = ("keep", "resume")
WAIT: tuple[ControlAction, ...] = ("wait", "resume")
ABORT: tuple[ControlAction, ...] = ("abort", "resume")


@pytest.mark.parametrize(
    ("world", "most"),
    [
        (World(2, 1, 1, 1), 10_000),
        (World(2, 1, 1, 1, steps=2, sync_interval=2), 10_000),
        (World(3, 2, 1, 1), 10_000),
        (World(1, 2, 1, 2), 5_000),
        (World(2, 1, 1, 1, calls=KEEP), 10_000),
        (World(2, 1, 0, 1, calls=WAIT), 5_000),
        (World(2, 1, 1, 0, calls=ABORT), 5_000),
    ],
)
def test_many_states_at_once(world: World, most: int) -> None:
    level = Level(world)
    ahead = [world.initial()]
    seen = set(ahead)
    while ahead and len(seen) < most:
        states = np.asarray(ahead).T
        batch, rest = level.successors(states), level.at_rest(states)
        made: list[Counter[tuple[State, bool]]] = [Counter() for _ in ahead]
        for source, after, fair in zip(batch.sources.tolist(), batch.states.T.tolist(), batch.fair, strict=True):
            made[source][tuple(after), bool(fair)] += 1
        for state, moves, resting in zip(ahead, made, rest, strict=True):
            assert moves == Counter((after, action.fair) for action, after in world.successors(state))
            assert world.at_rest(state) == resting
        ahead = [after for moves in made for after, _ in moves if after not in seen]
        ahead = list(dict.fromkeys(ahead))
        seen.update(ahead)
