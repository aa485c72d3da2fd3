"""One simulated run from a seed: options, the run itself, what came of it."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.rank.prefill_quota import AUTO, OFF, fixed
from paceline.engines.timed import CostModel
from paceline.sim.deployment import Deployment, Shape
from paceline.sim.faults import (
    Arrival,
    Faults,
    Period,
    draw_arrivals,
    draw_calls,
    draw_faults,
    draw_scales,
    draw_steady,
    draw_updates,
)
from paceline.sim.processes import COORDINATOR, FrontendProcess
from paceline.sim.world import Delays, Seeds, Violation

READY_LIMIT_S = 120.0
FINISH_LIMIT_S = 600.0
PAUSE_LIMIT_S = 60.0
SETTLE_S = 9.0
"""Two heartbeats of the coordinator: what was lost has been said again."""
QUIET_S = 8.0
QUIET_EVENTS_A_PROCESS = 8
SHOWN_EVENTS = 40
STEADY_S = 60.0
REQUESTS_A_RANK_AND_SECOND = 0.5
"""Of runs in which something is always wrong."""
PARTS = 100
"""So often it is told how far a run is."""
SCALES = 6
"""In those, as many faults a change of the size."""


class Options(Struct, frozen=True, rename={"frontends": "front_ends", "late_binding": "brokered"}):
    """What to simulate. What is None is drawn from the seed.

    `requests`: how many arrive within `duration` (seconds). `losses`: the share of broadcasts and notices lost.
    `crashes`: of any process. `suspensions`: each with its resume. `lockstep`: else independent. `encode`: whether
    messages travel as bytes. `late_binding`: whether requests wait in the coordinator's queue. `faults_per_second`: of
    any kind, all the time, beside what else is asked for; the size changes too.
    """

    seed: int
    ranks: int | None = None
    frontends: int | None = None
    requests: int | None = None
    losses: float | None = None
    crashes: int | None = None
    suspensions: int | None = None
    duration: float | None = None
    lockstep: bool | None = None
    encode: bool = True
    late_binding: bool | None = None
    faults_per_second: float | None = None


class Outcome(Struct, kw_only=True):
    """What came of a run. `events`: machine calls and faults. `moved`: requests that went on at another rank.

    Times in seconds; `virtual_s` by the simulated clock. `verdict`: "ok", or what broke; then `event` and `when` say
    where, and `history` holds the last events there.
    """

    options: Options
    events: int
    virtual_s: float
    real_s: float
    requests: int
    finished: int
    aborted: int
    moved: int
    refused: dict[str, int]
    waves: int
    wakes: int
    wakes_repeated: int
    faults: dict[str, int]
    longest_wait_s: float
    digest: str
    verdict: str
    event: int = 0
    history: list[str] = []

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


def filled(options: Options) -> Options:
    """The options with everything that was left out drawn from the seed."""
    stream = Seeds(options.seed).stream("options")
    # All are drawn in any case, so that giving one leaves the others as they were.
    ranks = stream.randint(2, 8)
    scale = max(1, (options.ranks or ranks) // 8)
    drawn: dict[str, Any] = {
        "ranks": ranks,
        "frontends": stream.randint(1, 3),
        "requests": stream.randint(10, 60) * scale,
        "losses": stream.choice((0.0, 0.0, 0.02, 0.1)),
        "crashes": stream.choice((0, 1, 2, 4)),
        "suspensions": stream.choice((0, 0, 1, 3, 8)),
        "duration": stream.choice((0.5, 2.0, 6.0)),
        "lockstep": Seeds(options.seed).stream("lockstep").random() < 0.7,
        "late_binding": Seeds(options.seed).stream("brokered").random() < 0.6,
    }
    if options.faults_per_second is not None:
        duration = options.duration if options.duration is not None else STEADY_S
        requests = round(duration * (options.ranks or ranks) * REQUESTS_A_RANK_AND_SECOND)
        drawn |= {"crashes": 0, "suspensions": 0, "duration": duration, "requests": requests}
    return replace(options, **{name: value for name, value in drawn.items() if getattr(options, name) is None})


def simulate(
    options: Options, without: Set[str] = frozenset(), progress: Callable[[float], None] | None = None
) -> Outcome:  # fmt: skip
    """Run one deployment from its start until all is quiet again. Never raises for what the machines do wrong.

    `without`: rules (`core/rules.py`) that the machines lack. `progress`: told of the share of the time that is over.
    """
    return Run(filled(options), without, progress).run()


class Run:
    """One run. `options`: all given (`filled`). `progress`: told of the share of the time that has passed."""

    def __init__(
        self, options: Options, without: Set[str] = frozenset(), progress: Callable[[float], None] | None = None
    ) -> None:  # fmt: skip
        self.options = options
        self._progress = progress
        self.seeds = Seeds(options.seed)
        self.deployment = Deployment(self._shape(), self.seeds, None, without)
        self.faults = Faults(self.deployment)

    def run(self) -> Outcome:
        begin = time.perf_counter()
        journal = self.deployment.world.journal
        verdict, event, processes = "ok", 0, None
        try:
            self._run()
        except Violation as violation:
            verdict, event, processes = violation.what, journal.events, violation.processes
        except Exception as error:
            # A machine that fails is a finding like any other, and must come with its seed.
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            event, processes = journal.events, ()
        history = [] if processes is None else [entry.text() for entry in journal.last(processes, SHOWN_EVENTS)]
        return self._outcome(verdict, event, history, time.perf_counter() - begin)

    def _shape(self) -> Shape:
        options, stream = self.options, self.seeds.stream("shape")
        steady = options.faults_per_second is not None
        quotas = (AUTO, AUTO, AUTO, fixed(3), fixed(100), OFF)
        return Shape(
            ranks=options.ranks or 1, frontends=options.frontends or 1, lockstep=bool(options.lockstep),
            scaled=bool(options.faults_per_second),
            sync_interval=stream.choice((1, 4, 16)),
            grouped=stream.random() < 0.7 or steady,
            costs=CostModel(step_ms=stream.choice((2.0, 6.0, 20.0))),
            slots=stream.choice((2, 16)),
            links=Delays(stream.choice((0.00005, 0.0003, 0.002)), 0.5, stream.choice((0.0, 0.002, 0.02)), 0.1),
            connecting=Delays(0.005, 1.0, 0.1, 0.3),
            encode=options.encode, loss=options.losses or 0.0,
            same_address=stream.random() < 0.5, scatter=True, late_binding=bool(options.late_binding),
            prefill_quota=self.seeds.stream("quota").choice(quotas) if options.lockstep else OFF,
        )  # fmt: skip

    def _run(self) -> None:
        deployment, options, duration = self.deployment, self.options, self.options.duration or 0.0
        world, shape = deployment.world, deployment.shape
        deployment.start().ready(READY_LIMIT_S)
        period = Period(world.now, duration, shape.ranks, shape.frontends)
        arrivals = draw_arrivals(self.seeds.stream("workload"), options.requests or 0, period)
        period = replace(period, duration_s=max([duration, *(arrival.at for arrival in arrivals)]))
        self._schedule_faults(period)
        for arrival in arrivals:
            world.at(period.begin_s + arrival.at, partial(self._submit, arrival))
        if self._progress is not None:
            for part in range(1, PARTS):
                world.at(period.begin_s + part / PARTS * period.duration_s, partial(self._progress, part / PARTS))
        world.run_for(period.duration_s + 1.0)
        world.run_until(self.faults.over, READY_LIMIT_S, "that everybody is up again")
        deployment.lose_no_more()
        world.run_until(deployment.settled, READY_LIMIT_S, "that every change of the size is over")
        deployment.ready(READY_LIMIT_S)
        self._resume()
        deployment.finish(FINISH_LIMIT_S)
        check_quiescence(deployment)

    def _resume(self) -> None:
        """Whatever operators have left paused goes on."""
        deployment = self.deployment
        wanted = "that every call to suspend or resume is answered"
        deployment.world.run_until(deployment.controlled, FINISH_LIMIT_S, wanted)
        if self.options.suspensions or self.options.faults_per_second:
            deployment.frontends[0].control("resume")
            deployment.world.run_until(deployment.controlled, FINISH_LIMIT_S, wanted)

    def _schedule_faults(self, period: Period) -> None:
        shape, options, stream = self.deployment.shape, self.options, self.seeds.stream
        crashes, steady = options.crashes or 0, options.faults_per_second
        may_die = not shape.lockstep or shape.grouped
        self.faults.schedule(draw_faults(stream("faults"), crashes, crashes + (steady is None), period, may_die))
        pauses = draw_calls(stream("suspensions"), options.suspensions or 0, period)
        self.faults.schedule([*pauses, *draw_updates(stream("weights"), pauses, period)])
        if steady:
            faults, calls = draw_steady(stream("steady faults"), steady, period, shape.lockstep)
            self.faults.schedule([*faults, *calls, *draw_updates(stream("steady weights"), calls, period)])
            self.faults.schedule(draw_scales(stream("scales"), steady / SCALES, period))

    def _submit(self, arrival: Arrival) -> None:
        frontend = self.deployment.living_frontend(arrival.frontend)
        if frontend is None:
            return
        request = frontend.submit(arrival.prompt_tokens, arrival.answer_tokens, arrival.rank)
        if arrival.patience_s is not None:
            self.deployment.world.after(arrival.patience_s, lambda: frontend.abandon(request))

    def _outcome(self, verdict: str, event: int, history: list[str], real_s: float) -> Outcome:
        deployment = self.deployment
        frontends = dict.fromkeys([*deployment.retired, *deployment.frontends.values()])
        answers = [answer for frontend in frontends for answer in frontend.answers.values()]
        waits = [answer.first - answer.asked for answer in answers if answer.first >= 0]
        lives = deployment.coordinators
        return Outcome(
            options=self.options, events=deployment.world.journal.events, virtual_s=deployment.world.now,
            real_s=real_s, requests=len(answers),
            finished=sum(answer.finish_reason is not None for answer in answers),
            aborted=sum(answer.abandoned for answer in answers),
            moved=sum(frontend.answers.moved for frontend in frontends),
            refused=dict(Counter(answer.refused for answer in answers if answer.refused is not None)),
            waves=max((rank.machine.wave for rank in deployment.ranks.values()), default=0),
            wakes=sum(life.sent["StartDPWave"] for life in lives),
            wakes_repeated=sum(life.wakes_repeated for life in lives),
            faults=dict(sorted(self.faults.happened.items())),
            longest_wait_s=max(waits, default=0.0), digest=deployment.world.journal.digest(),
            verdict=verdict, event=event, history=history,
        )  # fmt: skip


# When the faults are over, every request has ended and time has gone on ----------------------------


def check_quiescence(deployment: Deployment) -> None:
    """All ranks pause and agree on the wave, all loads are known exactly, nothing keeps happening. Raises Violation."""
    world, ranks = deployment.world, deployment.present()
    paused = lambda: not any(rank.machine.running for rank in ranks.values())  # noqa: E731
    world.run_until(paused, PAUSE_LIMIT_S, "that all ranks pause")
    world.run_for(SETTLE_S)
    waves = {rank.name: rank.machine.wave for rank in ranks.values()}
    if deployment.shape.lockstep and len(set(waves.values())) > 1:
        raise Violation(f"at rest the ranks' waves differ: {waves}", *waves, COORDINATOR)
    for frontend in deployment.frontends.values():
        _check_frontend(deployment, frontend)
    coordinator = deployment.coordinator
    if coordinator is not None and (left := list(coordinator.machine.dispatcher.descriptors())):
        raise Violation(f"at rest there are still descriptors in the queue: {left}", COORDINATOR)
    begin = world.journal.events
    world.run_for(QUIET_S)
    events = world.journal.events - begin
    allowed = QUIET_EVENTS_A_PROCESS * (len(deployment.frontends) + 1)
    if events > allowed:
        raise Violation(f"at rest {events} events happen in {QUIET_S:g} s, {allowed} may")


def _check_frontend(deployment: Deployment, frontend: FrontendProcess) -> None:
    machine, ranks = frontend.machine, deployment.present()
    if deployment.shape.lockstep:
        wave = max(rank.machine.wave for rank in ranks.values())
        # It may know a later one, where all ranks that knew it too have died.
        if machine.wave < wave or machine.running:
            said = f"wave {machine.wave}, {'running' if machine.running else 'paused'}"
            text = f"{frontend.name} believes {said}; all ranks are paused before {wave}"
            raise Violation(text, frontend.name, COORDINATOR)
    if deployment.shape.external:
        return
    for number, rank in ranks.items():
        if deployment.shape.hybrid and number not in machine.ready_ranks():
            continue
        known, load = machine.believed(number), rank.engine.load()
        finished = rank.machine.statistics()["finished"]
        if (known.waiting, known.running, known.prefill_tokens, known.finished) != (
            load.waiting, load.running, load.prefill_tokens, finished
        ):  # fmt: skip
            text = f"{frontend.name} believes of rank {number} {known}, which has {load} and has finished {finished}"
            raise Violation(text, frontend.name, rank.name, COORDINATOR)
        if rank.engine.has_work():
            raise Violation(f"{rank.name} still works for nobody", rank.name)
