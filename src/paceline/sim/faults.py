"""What clients ask for in a run, what operators do and what goes wrong: all drawn from the seed before it begins."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.messages import StartDPWave
from paceline.core.requests import ControlAction
from paceline.sim.deployment import Deployment

FaultKind = Literal[
    "coordinator-crash",
    "rank-crash",
    "front-end-crash",
    "slow-rank",
    "cut-off",
    "unheard",
    "lost-wake",
    "link-down",
    "hang",
]
"""`link-down`: a front-end's connection to a rank that lives ends, and comes up again. `cut-off`: a rank hears the
coordinator late. `unheard`: the coordinator hears it late. `hang`: a step does not return. The rank is named and ended.
"""
MODES: tuple[ControlAction, ...] = ("keep", "wait", "abort")
CRASHES: tuple[FaultKind, ...] = ("coordinator-crash", "rank-crash", "front-end-crash")
TROUBLES: tuple[FaultKind, ...] = ("slow-rank", "cut-off", "unheard", "lost-wake", "link-down", "hang")
MAX_PROMPT_TOKENS = 4096
MAX_ANSWER_TOKENS = 300


class Period(Struct, frozen=True):
    """When it all happens (seconds), and to how many."""

    begin_s: float
    duration_s: float
    ranks: int
    frontends: int


class Arrival(Struct, frozen=True):
    """One request: when it comes (seconds from the start), to which front-end, and its sizes in tokens.

    `rank`: the rank that it names, if any. `patience_s`: after how many seconds its client hangs up, None for never.
    """

    at: float
    frontend: int
    prompt_tokens: int
    answer_tokens: int
    rank: int | None = None
    patience_s: float | None = None


class Fault(Struct, frozen=True):
    """One fault: when it begins and how long it lasts (seconds), at whom, how much longer a slow rank's steps last.

    `aimed`: at the first rank from there on that has requests, if any has.
    """

    at: float
    kind: FaultKind
    number: int
    seconds: float
    factor: float = 1.0
    aimed: bool = False

    @property
    def process(self) -> tuple[str, int]:
        if self.kind == "coordinator-crash":
            return "coordinator", 0
        return "front-end" if self.kind == "front-end-crash" else "rank", self.number


class NewWeights(Struct, frozen=True):
    """`bad_at`: the rank that cannot have them, if any."""

    bad_at: int | None = None


class Call(Struct, frozen=True):
    """An operator's call: when (seconds), at which front-end, what: a pause or its end, how many ranks, or weights."""

    at: float
    frontend: int
    what: ControlAction | int | NewWeights


# Drawing ----------------------------------------------------------------------------------------


def draw_arrivals(stream: Random, requests: int, period: Period) -> list[Arrival]:
    """So many arrivals: singles, bursts and quiet times between, so that waves begin and end."""
    arrivals: list[Arrival] = []
    while len(arrivals) < requests:
        at = stream.random() * period.duration_s
        burst = stream.choice((1, 1, 1, 2, 4, 8, 16))
        width_s = stream.choice((0.0, 0.002, 0.05, 0.5))
        for _ in range(min(burst, requests - len(arrivals))):
            arrivals.append(_arrival(stream, at + stream.random() * width_s, period))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrival(stream: Random, at: float, period: Period) -> Arrival:
    return Arrival(
        at,
        stream.randrange(period.frontends),
        _size(stream, 120, 1.2, MAX_PROMPT_TOKENS),
        _size(stream, 12, 1.0, MAX_ANSWER_TOKENS),
        stream.randrange(period.ranks) if stream.random() < 0.2 else None,
        stream.random() * 0.5 if stream.random() < 0.05 else None,
    )


def _size(stream: Random, median: float, spread: float, largest: int) -> int:
    return min(largest, max(1, round(median * math.exp(spread * stream.gauss(0.0, 1.0)))))


def draw_scales(stream: Random, per_second: float, period: Period) -> list[Call]:
    """So many changes of the size a second, at any moment: by an eighth of the ranks more or fewer, at most."""
    calls: list[Call] = []
    at, most = period.begin_s + stream.expovariate(per_second), max(1, period.ranks // 8)
    while at < period.begin_s + period.duration_s:
        calls.append(Call(at, stream.randrange(period.frontends), max(1, period.ranks + stream.randint(-most, most))))
        at += stream.expovariate(per_second)
    return calls


def draw_calls(stream: Random, suspensions: int, period: Period) -> list[Call]:
    """So many pauses, each with a resume: some asked for twice at once, some crossing others."""
    calls: list[Call] = []
    for _ in range(suspensions):
        at, action = period.begin_s + stream.random() * period.duration_s, stream.choice(MODES)
        end = at + stream.choice((0.0, 0.001, 0.02, 0.3, 1.0)) * (0.5 + stream.random())
        for when, what in ((at, action), (end, "resume")):
            for _ in range(stream.choice((1, 1, 2))):
                calls.append(Call(when + stream.random() * 0.005, stream.randrange(period.frontends), what))
    return sorted(calls, key=lambda call: call.at)


def draw_updates(stream: Random, calls: Iterable[Call], period: Period) -> list[Call]:
    """New weights in half of the pauses; some that a rank cannot have, some when the pause is over already."""
    updates: list[Call] = []
    for call in calls:
        if call.what in MODES and stream.random() < 0.5:
            bad_at = stream.randrange(period.ranks) if stream.random() < 0.2 else None
            at = call.at + stream.choice((0.0, 0.01, 0.1, 0.3))
            updates.append(Call(at, stream.randrange(period.frontends), NewWeights(bad_at)))
    return updates


def draw_faults(stream: Random, crashes: int, troubles: int, period: Period, ranks_may_die: bool = True) -> list[Fault]:
    """So many crashes and so many lesser troubles."""
    kinds = [kind for kind in CRASHES if kind != "rank-crash" or ranks_may_die]
    faults = [_fault(stream, stream.choice(kinds), period) for _ in range(crashes)]
    faults += [_fault(stream, stream.choice(TROUBLES), period) for _ in range(troubles)]
    return sorted(faults, key=lambda fault: fault.at)


def draw_steady(stream: Random, per_second: float, period: Period, lockstep: bool) -> tuple[list[Fault], list[Call]]:
    """So many a second all the time, each at any moment: of every kind alike, a pause with its resume included."""
    kinds = [*CRASHES, *(kind for kind in TROUBLES if lockstep or kind != "lost-wake")]
    faults: list[Fault] = []
    calls: list[Call] = []
    at, end = period.begin_s + stream.expovariate(per_second), period.begin_s + period.duration_s
    while at < end:
        moment = replace(period, begin_s=at, duration_s=0.0)
        # One more than there are kinds: a pause.
        chosen = stream.randrange(len(kinds) + 1)
        if chosen == len(kinds):
            calls += draw_calls(stream, 1, moment)
        else:
            fault = _fault(stream, kinds[chosen], moment)
            faults.append(
                replace(fault, aimed=fault.kind in ("rank-crash", "link-down", "hang") and stream.random() < 0.7)
            )
        at += stream.expovariate(per_second)
    return faults, sorted(calls, key=lambda call: call.at)


def _fault(stream: Random, kind: FaultKind, period: Period) -> Fault:
    number = stream.randrange(period.frontends if kind == "front-end-crash" else period.ranks)
    at = period.begin_s + stream.random() * period.duration_s
    seconds = stream.choice((0.3, 0.5, 1.0, 2.0)) + stream.random() * 0.2
    return Fault(at, kind, number, seconds, stream.choice((2.0, 5.0, 20.0)))


# Happening --------------------------------------------------------------------------------------


class Faults:
    """Lets faults and operators' calls happen to a deployment. `happened`: how many of each kind did."""

    def __init__(self, deployment: Deployment) -> None:
        self.happened: Counter[str] = Counter()
        self._deployment = deployment
        self._down: set[tuple[str, int]] = set()
        self._to_mend: dict[int, Callable[[], None]] = {}

    def schedule(self, what: Iterable[Fault | Call]) -> None:
        for one in what:
            happening = partial(self._begin, one) if isinstance(one, Fault) else partial(self._call, one)
            self._deployment.world.at(one.at, happening)

    def over(self) -> bool:
        return not self._down

    def _call(self, call: Call) -> None:
        frontend, what = self._deployment.living_frontend(call.frontend), call.what
        if frontend is None:
            return
        if isinstance(what, int):
            known = frontend.machine.scaling
            size = self._deployment.size() if known is None else known.size
            self.happened["scale up" if what > size else "scale down"] += what != size
            frontend.scale(what)
        elif isinstance(what, NewWeights):
            self.happened["new weights" if what.bad_at is None else "bad weights"] += 1
            frontend.update(what.bad_at)
        else:
            self.happened["resume" if what == "resume" else f"suspend ({what})"] += 1
            frontend.control(what)

    def _begin(self, fault: Fault) -> None:
        if fault.aimed:
            fault = replace(fault, number=self._with_requests(fault.number))
        if fault.process in self._down or not self._strike(fault):
            return
        self.happened[fault.kind] += 1
        if fault.kind != "lost-wake":
            self._down.add(fault.process)
            self._deployment.world.after(fault.seconds, lambda: self._end(fault))

    def _with_requests(self, first: int) -> int:
        ranks = self._deployment.ranks
        # Scaling leaves gaps: of two ranks that join, the second may be there first.
        order = sorted(ranks, key=lambda number: (number < first, number))
        return next((number for number in order if len(ranks[number].machine.requests)), first)

    def _strike(self, fault: Fault) -> bool:
        deployment, (role, number) = self._deployment, fault.process
        rank = deployment.ranks.get(number)
        if role == "rank" and (rank is None or not rank.alive):
            return False
        name = role if role == "coordinator" else f"{role} {number}"
        deployment.world.journal.record(deployment.world.now, name, f"fault: {fault}")
        match fault.kind:
            case "coordinator-crash":
                deployment.crash_coordinator()
            case "rank-crash":
                deployment.crash_rank(number)
            case "front-end-crash":
                deployment.crash_frontend(number)
            case "slow-rank":
                deployment.ranks[number].engine.slowness = fault.factor
            case "cut-off":
                deployment.ranks[number].broadcasts.hold()
            case "unheard":
                deployment.ranks[number].to_coordinator.hold()
            case "hang":
                deployment.ranks[number].hang()
            case "link-down":
                index, severed = int(fault.at * 1000) % len(deployment.frontends), fault.factor > 2.0
                mend = deployment.cut_link(number, index, severed=severed)
                if mend is None:
                    return False
                self._to_mend[number] = mend
            case "lost-wake":
                if not deployment.shape.lockstep:
                    return False
                deployment.ranks[number].broadcasts.lose(StartDPWave, times=1 + int(fault.seconds))
        return True

    def _end(self, fault: Fault) -> None:
        deployment, number = self._deployment, fault.number
        self._down.discard(fault.process)
        match fault.kind:
            case "coordinator-crash":
                deployment.start_coordinator()
            case "rank-crash":
                deployment.revive_rank(number)
            case "front-end-crash":
                deployment.start_frontend(number)
            case "slow-rank":
                deployment.ranks[number].engine.slowness = 1.0
            case "cut-off":
                deployment.ranks[number].broadcasts.release()
            case "hang":
                deployment.ranks[number].go_on()
            case "link-down":
                self._to_mend.pop(number)()
            case "unheard" if deployment.coordinator is not None:
                deployment.ranks[number].to_coordinator.release()
