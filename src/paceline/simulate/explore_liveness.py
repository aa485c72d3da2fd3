"""Liveness: from every state that there is, all can still be finished.

The walk hands over the fair moves between states as numbers. From the states at rest this goes back against them; a
state that is not met on the way is one from which no order of what happens by itself leads to rest.
"""

from __future__ import annotations

from array import array

import numpy as np

CHUNK = 1 << 16
"""Moves looked at together."""


def first_stuck(states: int, sources: array[int], targets: array[int], goals: array[int]) -> int | None:
    """The lowest-numbered of `states` from which no goal can be reached, or None.

    `sources`, `targets`: the fair moves, as two arrays ("I") of the same length. `goals`: numbers of states.
    Most moves of a walk lead to later states: a few rounds from the last move to the first do, and nothing is sorted.
    """
    reached = np.zeros(states, dtype=bool)
    reached[np.frombuffer(goals, dtype=np.uint32)] = True
    source = np.frombuffer(sources, dtype=np.uint32)
    target = np.frombuffer(targets, dtype=np.uint32)
    before = -1
    while before != (before := int(np.count_nonzero(reached))):
        for end in range(source.size, 0, -CHUNK):
            some = slice(max(0, end - CHUNK), end)
            while (more := source[some][reached[target[some]] & ~reached[source[some]]]).size:
                reached[more] = True
    stuck = np.flatnonzero(~reached)
    return int(stuck[0]) if stuck.size else None
