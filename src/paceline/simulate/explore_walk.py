"""Two ways to walk a world breadth first: state by state, and many states at once.

Both give the states their numbers in the order in which they are met, and ask at the end whether all can be finished
from every one. A state that differs from one met before only in that fewer losses are left is not looked at: whatever
can happen in it can happen in the other. (Its number is then the other's.) What happens by itself is the same in both,
so liveness is asked of the other too; and since the other was met no later, a shortest story stays one.
"""

from __future__ import annotations

import resource
from array import array
from collections.abc import Callable

import numpy as np
from msgspec import Struct

from paceline.simulate.explore_block import Broken
from paceline.simulate.explore_level import Level
from paceline.simulate.explore_liveness import first_stuck
from paceline.simulate.explore_seen import Index, Prints, Rows, fingerprints
from paceline.simulate.explore_state import COMMON, FIRST_BLOCK, State
from paceline.simulate.explore_tables import Bools, Ints
from paceline.simulate.explore_world import World

LOOK_EVERY = 4096
AT_ONCE = 1 << 16
"""States looked at together, at most."""


class Progress(Struct, frozen=True):
    """How far the walk is: states met, of these not looked at yet, and steps from the start."""

    states: int
    frontier: int
    depth: int


class Found(Exception):
    """A state from which something is wrong: with a move from it (`why`), or, where that is empty, it is stuck."""

    def __init__(self, state: int, why: str) -> None:
        self.state = state
        self.why = why


class Walk:
    """One walk. `max_memory_mb`: of this process, all in all. `report`: is called now and then."""

    def __init__(self, world: World, max_memory_mb: int, report: Callable[[Progress], None]) -> None:
        self._world = world
        self._max_memory_mb = max_memory_mb
        self._report = report
        self.moves = 0
        self.depth = 0
        # Of the fair moves, for liveness; and the states at rest.
        self._parents = array("I")
        self._sources = array("I")
        self._targets = array("I")
        self._resting = array("I")

    def __len__(self) -> int:
        raise NotImplementedError

    def state(self, number: int) -> State:
        """A state that was met."""
        raise NotImplementedError

    def go(self) -> bool:
        """Walk all states. Returns whether it came to the end; raises Found."""
        begin = 0
        while begin < len(self):
            end = len(self)
            for number in range(begin, end, self._at_once):
                self._look(number, min(number + self._at_once, end))
                if number % LOOK_EVERY == 0 or self._at_once > 1:
                    self._report(Progress(len(self), len(self) - number, self.depth))
                    if self._memory_mb() > self._max_memory_mb:
                        return False
            begin = end
            self.depth += 1
        stuck = first_stuck(len(self), self._sources, self._targets, self._resting)
        if stuck is not None:
            raise Found(stuck, "")
        return True

    def path(self, number: int) -> list[State]:
        """The states from the start to this one."""
        path = [self.state(number)]
        while number:
            number = self._parents[number]
            path.append(self.state(number))
        return path[::-1]

    _at_once = 1

    def _look(self, begin: int, end: int) -> None:
        """At all that can happen in the states with these numbers."""
        raise NotImplementedError

    def _memory_mb(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class SingleWalk(Walk):
    """State by state."""

    def __init__(self, world: World, max_memory_mb: int, report: Callable[[Progress], None]) -> None:
        super().__init__(world, max_memory_mb, report)
        self._states: list[State] = []
        self._numbers: dict[State, int] = {}
        self._more_losses: dict[int, list[int]] = {}
        first = world.initial()
        self._losses = world.common(first).losses
        self._meet(first, 0)

    def __len__(self) -> int:
        return len(self._states)

    def state(self, number: int) -> State:
        """A state that was met."""
        return self._states[number]

    def _look(self, begin: int, _: int) -> None:
        numbers = self._numbers
        try:
            if self._world.at_rest(self._states[begin]):
                self._resting.append(begin)
            for action, after in self._world.successors(self._states[begin]):
                self.moves += 1
                target = numbers.get(after)
                if target is None:
                    target = self._with_more_losses(after)
                if target is None:
                    target = self._meet(after, begin)
                if action.fair:
                    self._sources.append(begin)
                    self._targets.append(target)
        except Broken as broken:
            raise Found(begin, str(broken)) from broken

    def _with_more_losses(self, state: State) -> int | None:
        """The number of a state met that differs from this in that more losses are left; None where there is none."""
        commons = self._more_losses.get(state[COMMON])
        if commons is None:
            one = self._world.commons[state[COMMON]]
            more = [one._replace(losses=losses) for losses in range(one.losses + 1, self._losses + 1)]
            commons = self._more_losses[state[COMMON]] = [self._world.number(common) for common in more]
        for common in commons:
            number = self._numbers.get((*state[:COMMON], common, *state[FIRST_BLOCK:]))
            if number is not None:
                return number
        return None

    def _meet(self, state: State, parent: int) -> int:
        number = self._numbers[state] = len(self._states)
        self._states.append(state)
        self._parents.append(parent)
        return number


class WideWalk(Walk):
    """Many states at once; of worlds without generations whose equal states are merged, with all rules."""

    _at_once = AT_ONCE

    def __init__(self, world: World, max_memory_mb: int, report: Callable[[Progress], None]) -> None:
        super().__init__(world, max_memory_mb, report)
        self._level = Level(world)
        self._rows = Rows(FIRST_BLOCK + world.ranks)
        # By fingerprints without the losses, of the state with the most.
        self._index = Index()
        self._meet(np.asarray([world.initial()]).T, np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def state(self, number: int) -> State:
        """A state that was met."""
        return tuple(self._rows[np.asarray([number])][:, 0].tolist())

    def _look(self, begin: int, end: int) -> None:
        states = self._rows[begin:end]
        try:
            self._resting.extend((np.flatnonzero(self._level.at_rest(states)) + begin).tolist())
            batch = self._level.successors(states)
        except Broken as broken:
            self._look_singly(begin, end)
            raise AssertionError(f"only many states at once are broken: {broken}") from broken
        self.moves += batch.sources.size
        targets = self._meet(batch.states, batch.sources + begin)
        self._sources.frombytes((batch.sources[batch.fair] + begin).astype(np.uint32).tobytes())
        self._targets.frombytes(targets[batch.fair].astype(np.uint32).tobytes())

    def _look_singly(self, begin: int, end: int) -> None:
        for number in range(begin, end):
            try:
                self._world.at_rest(self.state(number))
                for _ in self._world.successors(self.state(number)):
                    pass
            except Broken as broken:
                raise Found(number, str(broken)) from broken

    def _meet(self, states: Ints, parents: Ints) -> Ints:
        """The numbers of states, which are new where they were not met yet. `parents`: the states before."""
        losses = self._level.common.losses(states[COMMON])
        bare = states.copy()
        bare[COMMON] = self._level.common.without_losses(states[COMMON])
        prints = fingerprints(bare)
        order = np.lexsort((-losses, prints))
        prints = prints[order]
        first = np.ones(prints.size, bool)
        first[1:] = prints[1:] != prints[:-1]
        heads, group = order[first], np.cumsum(first) - 1
        self._same(bare[:, order], bare[:, heads[group]])
        numbers = self._index.find(prints[first])
        met = np.flatnonzero(numbers >= 0)
        before = self._rows[numbers[met]]
        enough = self._level.common.losses(before[COMMON]) >= losses[heads[met]]
        before[COMMON] = self._level.common.without_losses(before[COMMON])
        self._same(bare[:, heads[met]], before)
        fresh = np.ones(heads.size, bool)
        fresh[met[enough]] = False
        self._add(fresh, prints[first], states[:, heads], parents[heads], numbers)
        targets = np.empty(order.size, np.int64)
        targets[order] = numbers[group]
        return targets

    def _add(self, fresh: Bools, prints: Prints, states: Ints, parents: Ints, numbers: Ints) -> None:
        """Give the fresh ones numbers."""
        some = np.flatnonzero(fresh)
        numbers[some] = len(self._rows) + np.arange(some.size)
        self._index.put(prints[some], numbers[some])
        self._rows.add(states[:, some])
        self._parents.frombytes(parents[some].astype(np.uint32).tobytes())

    def _same(self, states: Ints, others: Ints) -> None:
        if not np.array_equal(states, others):
            raise AssertionError("two states have the same fingerprint")
