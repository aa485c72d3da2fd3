"""The walk: every state of a small deployment, breadth first, and what is wrong in any of them.

    result = walk(Bound(ranks=3, front_ends=2, requests=3, losses=1, crashes=1))

Safety is asked of every move by the parts themselves (`protocol/invariants.py`). Liveness is asked at the end: from
every state, without another request or fault, everything that was sent can still be answered and all come to rest.
Breadth first means that the story of what goes wrong is a shortest one.
"""

from __future__ import annotations

import resource
import time
from array import array
from collections.abc import Callable, Iterator
from itertools import product

from msgspec import Struct
from msgspec.structs import replace

from paceline.protocol.sampling import ControlAction, SuspendMode
from paceline.simulate.explore_block import Broken
from paceline.simulate.explore_group import GroupedWorld
from paceline.simulate.explore_liveness import first_stuck
from paceline.simulate.explore_state import State
from paceline.simulate.explore_story import tell
from paceline.simulate.explore_world import World

LOOK_EVERY = 4096


class Bound(Struct, frozen=True):
    """How much of each: `losses` of a broadcast to one receiver, `crashes` of the coordinator or of a rank.

    `front_ends` changes nothing: what is walked is any number of them (`explore_world`).

    `suspensions`: that an operator asks for, each in `mode` and resumed afterwards. `steps`: engine steps of a request.
    `sync_interval`: steps between agreements. `without`: rules (`protocol/rules.py`) left out. `merge`: whether states
    that behave alike are one. `grouped`: whether ranks form generations, so that one may die in a wave. `backlog`:
    messages of one rank that the coordinator may leave unread while the ranks go on to their next step.
    `max_memory_mb`: of this process, all in all.
    """

    ranks: int = 3
    front_ends: int = 2
    requests: int = 2
    losses: int = 1
    crashes: int = 1
    steps: int = 1
    sync_interval: int = 1
    suspensions: int = 0
    mode: SuspendMode = "keep"
    without: frozenset[str] = frozenset()
    merge: bool = True
    grouped: bool = False
    backlog: int = 3
    max_memory_mb: int = 4096


class Progress(Struct, frozen=True):
    """How far the walk is: states met, of these not looked at yet, and steps from the start."""

    states: int
    frontier: int
    depth: int


class Result(Struct, frozen=True):
    """What was found. `trace`: the shortest story of the violation, a line a step; empty where there is none.

    `decided`: False where memory ran out before either verdict.
    """

    states: int
    moves: int
    depth: int
    seconds: float
    violations: list[str]
    trace: list[str]
    decided: bool = True


class _Found(Exception):
    def __init__(self, state: int, why: str) -> None:
        self.state = state
        self.why = why


class _Walk:
    def __init__(self, world: World, bound: Bound, report: Callable[[Progress], None]) -> None:
        self._world = world
        self._bound = bound
        self._report = report
        self.states: list[State] = []
        self.parents = array("I")
        self.moves = 0
        self.depth = 0
        self._numbers: dict[State, int] = {}
        # Of the fair moves, for liveness; and the states at rest.
        self._sources = array("I")
        self._targets = array("I")
        self._resting = array("I")

    def go(self) -> bool:
        """Walk all states. Returns whether it came to the end; raises _Found."""
        self._meet(self._world.initial(), 0)
        begin = 0
        while begin < len(self.states):
            end = len(self.states)
            for number in range(begin, end):
                self._look(number)
                if number % LOOK_EVERY == 0:
                    self._report(Progress(len(self.states), len(self.states) - number, self.depth))
                    if self._memory_mb() > self._bound.max_memory_mb:
                        return False
            begin = end
            self.depth += 1
        stuck = first_stuck(len(self.states), self._sources, self._targets, self._resting)
        if stuck is not None:
            raise _Found(stuck, "")
        return True

    def path(self, number: int) -> list[State]:
        """The states from the start to this one."""
        path = [self.states[number]]
        while number:
            number = self.parents[number]
            path.append(self.states[number])
        return path[::-1]

    def _look(self, number: int) -> None:
        state = self.states[number]
        numbers = self._numbers
        try:
            if self._world.at_rest(state):
                self._resting.append(number)
            for action, after in self._world.successors(state):
                self.moves += 1
                target = numbers.get(after)
                if target is None:
                    target = self._meet(after, number)
                if action.fair:
                    self._sources.append(number)
                    self._targets.append(target)
        except Broken as broken:
            raise _Found(number, str(broken)) from broken

    def _meet(self, state: State, parent: int) -> int:
        number = self._numbers[state] = len(self.states)
        self.states.append(state)
        self.parents.append(parent)
        return number

    def _memory_mb(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def walk(bound: Bound, report: Callable[[Progress], None] = lambda _: None) -> Result:
    """Walk every state within the bound. `report` is called now and then.

    Where rules are left out, smaller bounds come first: what goes wrong within one of them goes wrong within all that
    are larger, and its story is shorter.
    """
    for smaller in smaller_bounds(bound) if bound.without else ():
        result = _walk(smaller, report)
        if result.violations:
            return result
    return _walk(bound, report)


def smaller_bounds(bound: Bound) -> Iterator[Bound]:
    """Bounds within `bound`, of two ranks, fewer requests and the fewest faults first."""
    # What this rule is about does not occur without one.
    suspensions = max(bound.suspensions, int("suspension-number" in bound.without))
    faults = product(range(bound.losses + 1), range(bound.crashes + 1), range(suspensions + 1))
    by_requests = product(sorted(faults, key=lambda fault: (sum(fault), fault)), range(1, bound.requests + 1))
    for (losses, crashes, suspended), requests in sorted(by_requests, key=lambda one: sum(one[0]) + one[1]):
        yield replace(
            bound, ranks=min(2, bound.ranks), requests=requests, losses=losses, crashes=crashes, suspensions=suspended
        )


def _walk(bound: Bound, report: Callable[[Progress], None]) -> Result:
    begin = time.perf_counter()
    calls: tuple[ControlAction, ...] = (bound.mode, "resume") * bound.suspensions
    world = (GroupedWorld if bound.grouped else World)(
        bound.ranks, bound.requests, bound.losses, bound.crashes, calls=calls, steps=bound.steps,
        sync_interval=bound.sync_interval, without=bound.without, merge=bound.merge,
        backlog=bound.backlog,
    )  # fmt: skip
    walked = _Walk(world, bound, report)
    violations: list[str] = []
    trace: list[str] = []
    decided = True
    try:
        decided = walked.go()
    except _Found as found:
        trace = tell(world, walked.path(found.state), found.why)
        violations = [trace[-1]]
    seconds = time.perf_counter() - begin
    return Result(len(walked.states), walked.moves, walked.depth, seconds, violations, trace, decided)
