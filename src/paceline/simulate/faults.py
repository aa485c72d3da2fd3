"""What goes wrong in a run, and when: drawn from the seed before it begins."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.messages import StartDPWave
from paceline.core.requests import ControlAction
from paceline.simulate.deployment import Deployment

FaultKind = Literal[
    "coordinator-crash", "rank-crash", "front-end-crash", "slow-rank", "cut-off", "unheard", "lost-wake", "link-down"
]
"""`link-down`: a front-end's connection to a rank that lives ends, and comes up again. `cut-off`: a rank hears the
coordinator late. `unheard`: the coordinator hears a rank late."""
MODES: tuple[ControlAction, ...] = ("keep", "wait", "abort")

CRASHES: tuple[FaultKind, ...] = ("coordinator-crash", "rank-crash", "front-end-crash")
TROUBLES: tuple[FaultKind, ...] = ("slow-rank", "cut-off", "unheard", "lost-wake", "link-down")


class Fault(Struct, frozen=True):
    """One fault: when it begins and how long it lasts (seconds), at whom, how much longer a slow rank's steps last.

    `aimed`: at the first rank from there on that has requests, if any has.
    """

    at: float
    kind: FaultKind
    party: int
    seconds: float
    factor: float = 1.0
    aimed: bool = False


class ControlCall(Struct, frozen=True):
    """An operator's call: when (seconds), at which front-end, what."""

    at: float
    frontend: int
    action: ControlAction


class ScaleCall(Struct, frozen=True):
    """An operator's call for another size: when (seconds), at which front-end, how many ranks."""

    at: float
    frontend: int
    size: int


def draw_scales(
    stream: random.Random, per_second: float, *, begin_s: float, duration_s: float, ranks: int, frontends: int
) -> list[ScaleCall]:  # fmt: skip
    """So many a second, at any moment: by an eighth of the ranks more or fewer, at most."""
    calls: list[ScaleCall] = []
    at, most = begin_s + stream.expovariate(per_second), max(1, ranks // 8)
    while at < begin_s + duration_s:
        calls.append(ScaleCall(at, stream.randrange(frontends), max(1, ranks + stream.randint(-most, most))))
        at += stream.expovariate(per_second)
    return calls


def draw_calls(
    stream: random.Random, suspensions: int, begin_s: float, duration_s: float, frontends: int
) -> list[ControlCall]:
    """So many suspensions, each with a resume: some asked for twice at once, some crossing others."""
    calls: list[ControlCall] = []
    for _ in range(suspensions):
        at, action = begin_s + stream.random() * duration_s, stream.choice(MODES)
        end = at + stream.choice((0.0, 0.001, 0.02, 0.3, 1.0)) * (0.5 + stream.random())
        for when, what in ((at, action), (end, "resume")):
            for _ in range(stream.choice((1, 1, 2))):
                calls.append(ControlCall(when + stream.random() * 0.005, stream.randrange(frontends), what))
    return sorted(calls, key=lambda call: call.at)


def draw_faults(
    stream: random.Random, *, crashes: int, troubles: int, begin_s: float, duration_s: float, ranks: int,
    frontends: int, ranks_may_die: bool,
) -> list[Fault]:  # fmt: skip
    """So many crashes and so many lesser troubles between `begin_s` and `begin_s + duration_s`."""
    kinds = [kind for kind in CRASHES if kind != "rank-crash" or ranks_may_die]
    faults = [_draw(stream, stream.choice(kinds), ranks, frontends, begin_s, duration_s) for _ in range(crashes)]
    faults += [_draw(stream, stream.choice(TROUBLES), ranks, frontends, begin_s, duration_s) for _ in range(troubles)]
    return sorted(faults, key=lambda fault: fault.at)


def draw_steady(
    stream: random.Random, per_second: float, *, begin_s: float, duration_s: float, ranks: int, frontends: int,
    lockstep: bool,
) -> tuple[list[Fault], list[ControlCall]]:  # fmt: skip
    """So many a second all the time, each at any moment: of every kind alike, a suspension with its resume included."""
    kinds = [*CRASHES, *(kind for kind in TROUBLES if lockstep or kind != "lost-wake")]
    faults: list[Fault] = []
    calls: list[ControlCall] = []
    at, end = begin_s + stream.expovariate(per_second), begin_s + duration_s
    while at < end:
        # One more than there are kinds: a suspension.
        chosen = stream.randrange(len(kinds) + 1)
        if chosen == len(kinds):
            calls += draw_calls(stream, 1, at, 0.0, frontends)
        else:
            fault = _draw(stream, kinds[chosen], ranks, frontends, at, 0.0)
            faults.append(replace(fault, aimed=fault.kind in ("rank-crash", "link-down") and stream.random() < 0.7))
        at += stream.expovariate(per_second)
    return faults, sorted(calls, key=lambda call: call.at)


def _draw(
    stream: random.Random, kind: FaultKind, ranks: int, frontends: int, begin_s: float, duration_s: float
) -> Fault:
    party = stream.randrange(frontends if kind == "front-end-crash" else ranks)
    at, seconds = begin_s + stream.random() * duration_s, stream.choice((0.3, 0.5, 1.0, 2.0)) + stream.random() * 0.2
    return Fault(at, kind, party, seconds, stream.choice((2.0, 5.0, 20.0)))


class Mishaps:
    """Lets faults happen to a deployment. `happened`: how many of each kind did."""

    def __init__(self, deployment: Deployment) -> None:
        self.happened: Counter[str] = Counter()
        self._deployment = deployment
        self._down: set[tuple[str, int]] = set()
        self._to_mend: dict[int, Callable[[], None]] = {}

    def schedule(self, faults: list[Fault]) -> None:
        """Put the faults on the agenda."""
        for fault in faults:
            self._deployment.world.at(fault.at, lambda fault=fault: self._begin(fault))  # type: ignore[misc]

    def schedule_calls(self, calls: list[ControlCall]) -> None:
        """Put operators' calls on the agenda."""
        for call in calls:
            self._deployment.world.at(call.at, lambda call=call: self._call(call))  # type: ignore[misc]

    def schedule_scales(self, calls: list[ScaleCall]) -> None:
        """Likewise, for another size."""
        for call in calls:
            self._deployment.world.at(call.at, lambda call=call: self._scale(call))  # type: ignore[misc]

    def _scale(self, call: ScaleCall) -> None:
        frontend = self._deployment.living_frontend(call.frontend)
        if frontend is not None:
            known = frontend.machine.scaling
            size = self._deployment.size() if known is None else known.size
            self.happened["scale up" if call.size > size else "scale down"] += call.size != size
            frontend.scale(call.size)

    def _call(self, call: ControlCall) -> None:
        frontend = self._deployment.living_frontend(call.frontend)
        if frontend is not None:
            self.happened["resume" if call.action == "resume" else f"suspend ({call.action})"] += 1
            frontend.control(call.action)

    def over(self) -> bool:
        """Whether everybody is up."""
        return not self._down

    def _begin(self, fault: Fault) -> None:
        if fault.aimed:
            fault = replace(fault, party=self._with_requests(fault.party))
        what = ("coordinator", 0) if fault.kind == "coordinator-crash" else (_party(fault), fault.party)
        if what in self._down or not self._strike(fault):
            return
        self.happened[fault.kind] += 1
        if fault.kind != "lost-wake":
            self._down.add(what)
            self._deployment.world.after(fault.seconds, lambda: self._end(fault, what))

    def _with_requests(self, first: int) -> int:
        """The rank to aim at."""
        ranks = self._deployment.ranks
        # Scaling leaves gaps: of two ranks that join, the second may be there first.
        order = sorted(ranks, key=lambda number: (number < first, number))
        return next((number for number in order if len(ranks[number].machine.requests)), first)

    def _strike(self, fault: Fault) -> bool:
        deployment, number = self._deployment, fault.party
        if _party(fault) == "rank" and fault.kind != "coordinator-crash":
            rank = deployment.ranks.get(number)
            if rank is None or not rank.alive:
                return False
        deployment.world.journal.record(deployment.world.now, _party_name(fault), f"fault: {fault}")
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

    def _end(self, fault: Fault, what: tuple[str, int]) -> None:
        deployment, number = self._deployment, fault.party
        self._down.discard(what)
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
            case "link-down":
                self._to_mend.pop(number)()
            case "unheard" if deployment.coordinator is not None:
                deployment.ranks[number].to_coordinator.release()


def _party(fault: Fault) -> str:
    return "front-end" if fault.kind == "front-end-crash" else "rank"


def _party_name(fault: Fault) -> str:
    return "coordinator" if fault.kind == "coordinator-crash" else f"{_party(fault)} {fault.party}"
