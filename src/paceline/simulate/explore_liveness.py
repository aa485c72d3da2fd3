"""Liveness: from every state that there is, all can still be finished.

The walk hands over the fair moves between states as numbers. From the states at rest this goes back against them; a
state that is not met on the way is one from which no order of what happens by itself leads to rest.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np


def first_stuck(states: int, sources: array[int], targets: array[int], goals: array[int]) -> int | None:
    """The lowest-numbered of `states` from which no goal can be reached, or None.

    `sources`, `targets`: the fair moves, as two arrays ("I") of the same length. `goals`: numbers of states.
    """
    reached = np.zeros(states, dtype=bool)
    source = np.frombuffer(sources, dtype=np.uint32)
    target = np.frombuffer(targets, dtype=np.uint32)
    order = np.argsort(target, kind="stable")
    source = source[order]
    first = np.searchsorted(target[order], np.arange(states + 1))
    frontier: np.ndarray[Any, Any] = np.unique(np.frombuffer(goals, dtype=np.uint32)).astype(np.int64)
    while frontier.size:
        reached[frontier] = True
        counts = first[frontier + 1] - first[frontier]
        offsets = np.repeat(first[frontier] - np.concatenate(([0], np.cumsum(counts)[:-1])), counts)
        before = np.unique(source[offsets + np.arange(counts.sum())])
        frontier = before[~reached[before]].astype(np.int64)
    stuck = np.flatnonzero(~reached)
    return int(stuck[0]) if stuck.size else None
