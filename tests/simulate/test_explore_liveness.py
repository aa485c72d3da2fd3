"""Going back from the goals: on graphs drawn by hand."""

from __future__ import annotations

from array import array

import pytest

from paceline.simulate.explore_liveness import first_stuck

CHAIN = [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("states", "moves", "goals", "stuck"),
    [
        (4, CHAIN, [3], None),
        (4, CHAIN, [2], 3),
        (4, CHAIN, [], 0),
        # A way round a circle leads to the goal as long as there is a way out of it.
        (4, [(0, 1), (1, 0), (1, 2), (2, 3)], [3], None),
        (5, [(0, 1), (1, 2), (2, 1), (0, 3), (3, 4)], [4], 1),
        (3, [(0, 1), (0, 1), (1, 2), (1, 2)], [2], None),
        (1, [], [0], None),
    ],
)
def test_first_stuck(states: int, moves: list[tuple[int, int]], goals: list[int], stuck: int | None) -> None:
    sources, targets = array("I", [a for a, _ in moves]), array("I", [b for _, b in moves])
    assert first_stuck(states, sources, targets, array("I", goals)) == stuck
