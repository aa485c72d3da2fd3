"""The walk: every state of a small deployment, breadth first, and what is wrong in any of them.

    result = walk(Bound(ranks=3, front_ends=2, requests=3, losses=1, crashes=1))

Safety is asked of every move by the parts themselves (`protocol/invariants.py`). Liveness is asked at the end: from
every state, without another request or fault, everything that was sent can still be answered and all come to rest.
Breadth first means that the story of what goes wrong is a shortest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.requests import ControlAction, SuspendMode
from paceline.core.rules import OF_GENERATIONS, OF_SCALING
from paceline.simulate.explore_group import GroupedWorld
from paceline.simulate.explore_scaling import ScaledWorld
from paceline.simulate.explore_story import tell
from paceline.simulate.explore_walk import Found, Progress as Progress, SingleWalk, WideWalk
from paceline.simulate.explore_world import World


class Bound(Struct, frozen=True):
    """How much of each: `losses` of a broadcast to one receiver, `crashes` of the coordinator or of a rank.

    `front_ends` changes nothing: what is walked is any number of them (`explore_world`).

    `suspensions`: that an operator asks for, each in `mode` and resumed afterwards. `steps`: engine steps of a request.
    `sync_interval`: steps between agreements. `without`: rules (`protocol/rules.py`) left out. `merge`: whether states
    that behave alike are one. `grouped`: whether ranks form generations, so that one may die in a wave. `scales`: how
    often somebody asks for a rank more or one fewer, which brings generations with it. `backlog`:
    messages of one rank that the coordinator may leave unread while the ranks go on to their next step.
    `notices`: whether front-ends' notices come through; None for
    yes where ranks form no generations, and else no: they do no more than save a hop, and there are ten times as many
    states with them. `max_memory_mb`: of this process, all in all.
    """

    ranks: int = 3
    front_ends: int = 2
    requests: int = 3
    losses: int = 1
    crashes: int = 1
    steps: int = 1
    sync_interval: int = 1
    suspensions: int = 0
    mode: SuspendMode = "keep"
    without: frozenset[str] = frozenset()
    merge: bool = True
    grouped: bool = False
    scales: int = 0
    backlog: int = 3
    notices: bool | None = None
    max_memory_mb: int = 4096


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


def walk(bound: Bound, report: Callable[[Progress], None] = lambda _: None) -> Result:
    """Walk every state within the bound. `report` is called now and then.

    Where rules are left out, smaller bounds come first: what goes wrong within one of them goes wrong within all that
    are larger, and its story is shorter.
    """
    bound = bound_for(bound)
    for smaller in smaller_bounds(bound) if bound.without else ():
        result = _walk(smaller, report)
        if result.violations:
            return result
    return _walk(bound, report)


def bound_for(bound: Bound) -> Bound:
    """`bound` with what the rules that are left out are about: without, nothing of theirs occurs."""
    scales = max(bound.scales, int(bool(bound.without & OF_SCALING)))
    grouped = bound.grouped or bool(scales) or bool(bound.without & OF_GENERATIONS)
    return replace(bound, grouped=grouped, scales=scales)


def smaller_bounds(bound: Bound) -> Iterator[Bound]:
    """Bounds within `bound`, of two ranks, fewer requests and the fewest faults first."""
    # What this rule is about does not occur without one.
    suspensions = max(bound.suspensions, int("suspension-number" in bound.without))
    faults = product(range(bound.losses + 1), range(bound.crashes + 1), range(suspensions + 1))
    scaled = bool(bound.without & OF_SCALING)
    by_requests = product(sorted(faults, key=lambda fault: (sum(fault), fault)), range(not scaled, bound.requests + 1))
    # A second rank is needed where one is to leave. Where the size changes, a crash makes more states than a loss.
    ranks = min(bound.ranks, 1 if "scaling-repeated" in bound.without else 2)
    order = sorted(by_requests, key=lambda one: (sum(one[0]) + one[1], scaled * one[0][1]))
    for (losses, crashes, suspended), requests in order:
        yield replace(
            bound, ranks=ranks, requests=requests, losses=losses, crashes=crashes, suspensions=suspended
        )  # fmt: skip


def _walk(bound: Bound, report: Callable[[Progress], None]) -> Result:
    begin = time.perf_counter()
    calls: tuple[ControlAction, ...] = (bound.mode, "resume") * bound.suspensions
    kind = partial(ScaledWorld, scales=bound.scales) if bound.scales else GroupedWorld if bound.grouped else World
    world: World = kind(
        bound.ranks, bound.requests, bound.losses, bound.crashes, calls=calls, steps=bound.steps,
        sync_interval=bound.sync_interval, without=bound.without, merge=bound.merge,
        backlog=bound.backlog, notices=not bound.grouped if bound.notices is None else bound.notices,
    )  # fmt: skip
    many = world.commute and not bound.grouped
    walked = (WideWalk if many else SingleWalk)(world, bound.max_memory_mb, report)
    violations: list[str] = []
    trace: list[str] = []
    decided = True
    try:
        decided = walked.go()
    except Found as found:
        trace = tell(world, walked.path(found.state), found.why)
        violations = [trace[-1]]
    seconds = time.perf_counter() - begin
    return Result(len(walked), walked.moves, walked.depth, seconds, violations, trace, decided)
