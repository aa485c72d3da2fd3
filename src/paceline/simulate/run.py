"""One simulated run from a seed: options, the run itself, what came of it."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path

import msgspec
from msgspec import Struct

from paceline.core.rank.prefill_quota import AUTO, OFF, fixed
from paceline.engines.timed import CostModel
from paceline.simulate.answers import Answer
from paceline.simulate.checks import Checks
from paceline.simulate.deployment import Deployment
from paceline.simulate.faults import Mishaps, draw_calls, draw_faults, draw_scales, draw_steady
from paceline.simulate.frontend_party import FrontendParty
from paceline.simulate.network import Delays
from paceline.simulate.rest import check_rest
from paceline.simulate.scaled_deployment import ScaledDeployment
from paceline.simulate.shape import Shape
from paceline.simulate.workload import Arrival, drawn
from paceline.simulate.world import Seeds, Violation

READY_LIMIT_S = 120.0
FINISH_LIMIT_S = 600.0
SHOWN_EVENTS = 40
STEADY_S = 60.0
REQUESTS_A_RANK_AND_SECOND = 0.5
"""Of runs in which something is always wrong."""
SCALES = 6
"""In those, as many faults a change of the size."""


class Options(Struct, frozen=True):
    """What to simulate. What is None is drawn from the seed.

    `requests`: how many arrive within `duration` (seconds). `losses`: the share of broadcasts and notices lost.
    `crashes`: of any party. `suspensions`: each with its resume. `lockstep`: else independent. `encode`: whether
    messages travel as bytes. `late_binding`: whether requests wait in the coordinator's queue. `faults_per_second`: of
    every kind, suspensions included, all the time; then `crashes` and `suspensions` are those beside, by default none.
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
        """Whether every invariant held."""
        return self.verdict == "ok"


def filled(options: Options) -> Options:
    """The options with everything that was left out drawn from the seed."""
    stream = Seeds(options.seed).stream("options")
    # All are drawn in any case, so that giving one leaves the others as they were.
    ranks = stream.randint(2, 8)
    scale = max(1, (options.ranks or ranks) // 8)
    drawn_ones = {
        "ranks": ranks,
        "front_ends": stream.randint(1, 3),
        "requests": stream.randint(10, 60) * scale,
        "losses": stream.choice((0.0, 0.0, 0.02, 0.1)),
        "crashes": stream.choice((0, 1, 2, 4)),
        "suspensions": stream.choice((0, 0, 1, 3, 8)),
        "duration": stream.choice((0.5, 2.0, 6.0)),
        "lockstep": Seeds(options.seed).stream("lockstep").random() < 0.7,
        "brokered": Seeds(options.seed).stream("brokered").random() < 0.6,
    }
    if options.faults_per_second is not None:
        duration = options.duration if options.duration is not None else STEADY_S
        steady = {"crashes": 0, "suspensions": 0, "duration": duration}
        drawn_ones |= {**steady, "requests": round(duration * (options.ranks or ranks) * REQUESTS_A_RANK_AND_SECOND)}
    return msgspec.structs.replace(
        options, **{name: value for name, value in drawn_ones.items() if getattr(options, name) is None}
    )


def simulate(options: Options, without: Set[str] = frozenset()) -> Outcome:
    """Run one deployment from its start until all is at rest again. Never raises for what the machines do wrong.

    `without`: rules (`protocol/rules.py`) that the machines lack.
    """
    return Run(filled(options), without).run()


class Run:
    """One run. `options`: all given (`filled`)."""

    def __init__(self, options: Options, without: Set[str] = frozenset()) -> None:
        self.options = options
        self.seeds = Seeds(options.seed)
        kind = ScaledDeployment if options.faults_per_second else Deployment
        self.deployment: Deployment = kind(self._shape(), self.seeds, Checks(), without)
        self.mishaps = Mishaps(self.deployment)

    def run(self) -> Outcome:
        """All of it: start, load and faults, rest."""
        begin = time.perf_counter()
        journal = self.deployment.world.journal
        verdict, event, parties = "ok", 0, None
        try:
            self._run()
        except Violation as violation:
            verdict, event, parties = violation.what, journal.events, violation.parties
        except Exception as error:
            # A machine that fails is a finding like any other, and must come with its seed.
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            event, parties = journal.events, ()
        history = [] if parties is None else [entry.text() for entry in journal.last(parties, SHOWN_EVENTS)]
        return self._outcome(verdict, event, history, time.perf_counter() - begin)

    def _shape(self) -> Shape:
        options, stream = self.options, self.seeds.stream("shape")
        return Shape(
            ranks=options.ranks or 1, frontends=options.frontends or 1, lockstep=bool(options.lockstep),
            sync_interval=stream.choice((1, 4, 16)),
            grouped=stream.random() < 0.7 or options.faults_per_second is not None,
            costs=CostModel(step_ms=stream.choice((2.0, 6.0, 20.0))),
            slots=stream.choice((2, 16)),
            links=Delays(stream.choice((0.00005, 0.0003, 0.002)), 0.5, stream.choice((0.0, 0.002, 0.02)), 0.1),
            connecting=Delays(0.005, 1.0, 0.1, 0.3),
            encode=options.encode, loss=options.losses or 0.0,
            same_address=stream.random() < 0.5, scatter=True, late_binding=bool(options.late_binding),
            prefill_quota=self._quota(),
        )  # fmt: skip

    def _quota(self) -> int:
        if not self.options.lockstep:
            return OFF
        return self.seeds.stream("quota").choice((AUTO, AUTO, AUTO, fixed(3), fixed(100), OFF))

    def _run(self) -> None:
        deployment, options = self.deployment, self.options
        world, duration = deployment.world, options.duration or 0.0
        deployment.start().ready(READY_LIMIT_S)
        arrivals = self._arrivals()
        begin, length = world.now, max([duration, *(arrival.at for arrival in arrivals)])
        self._schedule_faults(begin, length)
        for arrival in arrivals:
            world.at(begin + arrival.at, self._submission(arrival))
        world.run_for(length + 1.0)
        world.run_until(self.mishaps.over, READY_LIMIT_S, "that everybody is up again")
        deployment.lose_no_more()
        if isinstance(deployment, ScaledDeployment):
            world.run_until(deployment.settled, READY_LIMIT_S, "that every change of the size is over")
        deployment.ready(READY_LIMIT_S)
        self._resume()
        deployment.finish(FINISH_LIMIT_S)
        check_rest(deployment)

    def _resume(self) -> None:
        """Whatever operators have left suspended goes on."""
        deployment = self.deployment
        wanted = "that every call to suspend or resume is answered"
        deployment.world.run_until(deployment.controlled, FINISH_LIMIT_S, wanted)
        if self.options.suspensions or self.options.faults_per_second:
            deployment.frontends[0].control("resume")
            deployment.world.run_until(deployment.controlled, FINISH_LIMIT_S, wanted)

    def _schedule_faults(self, begin_s: float, duration_s: float) -> None:
        shape, crashes = self.deployment.shape, self.options.crashes or 0
        troubles = crashes + (self.options.faults_per_second is None)
        faults = draw_faults(
            self.seeds.stream("faults"), crashes=crashes, troubles=troubles, begin_s=begin_s, duration_s=duration_s,
            ranks=shape.ranks, frontends=shape.frontends, ranks_may_die=not shape.lockstep or shape.grouped,
        )  # fmt: skip
        self.mishaps.schedule(faults)
        stream, suspensions = self.seeds.stream("suspensions"), self.options.suspensions or 0
        self.mishaps.schedule_calls(draw_calls(stream, suspensions, begin_s, duration_s, shape.frontends))
        if self.options.faults_per_second:
            faults, calls = draw_steady(
                self.seeds.stream("steady faults"), self.options.faults_per_second, begin_s=begin_s,
                duration_s=duration_s, ranks=shape.ranks, frontends=shape.frontends, lockstep=shape.lockstep,
            )  # fmt: skip
            self.mishaps.schedule(faults)
            self.mishaps.schedule_calls(calls)
            self.mishaps.schedule_scales(
                draw_scales(
                    self.seeds.stream("scales"), self.options.faults_per_second / SCALES, begin_s=begin_s,
                    duration_s=duration_s, ranks=shape.ranks, frontends=shape.frontends,
                )
            )  # fmt: skip

    def _arrivals(self) -> list[Arrival]:
        options, shape = self.options, self.deployment.shape
        stream = self.seeds.stream("workload")
        return drawn(stream, options.requests or 0, options.duration or 0.0, shape.ranks, shape.frontends)

    def _submission(self, arrival: Arrival) -> Callable[[], None]:
        def submit() -> None:
            frontend = self.deployment.living_frontend(arrival.frontend)
            if frontend is None:
                return
            request = frontend.submit(arrival.prompt_tokens, arrival.answer_tokens, arrival.rank)
            if arrival.patience_s is not None:
                self.deployment.world.after(arrival.patience_s, lambda: frontend.abandon(request))

        return submit

    def _outcome(self, verdict: str, event: int, history: list[str], real_s: float) -> Outcome:
        deployment = self.deployment
        frontends: list[FrontendParty] = [*deployment.retired, *deployment.frontends.values()]
        answers: list[Answer] = [answer for party in dict.fromkeys(frontends) for answer in party.answers.values()]
        waits = [answer.first - answer.asked for answer in answers if answer.first >= 0]
        lives = deployment.coordinators
        return Outcome(
            options=self.options, events=deployment.world.journal.events, virtual_s=deployment.world.now,
            real_s=real_s, requests=len(answers),
            finished=sum(answer.finish_reason is not None for answer in answers),
            aborted=sum(answer.abandoned for answer in answers),
            moved=sum(party.answers.moved for party in dict.fromkeys(frontends)),
            refused=dict(Counter(answer.refused for answer in answers if answer.refused is not None)),
            waves=max((party.machine.wave for party in deployment.ranks.values()), default=0),
            wakes=sum(life.sent["StartDPWave"] for life in lives),
            wakes_repeated=sum(life.wakes_repeated for life in lives),
            faults=dict(sorted(self.mishaps.happened.items())),
            longest_wait_s=max(waits, default=0.0), digest=deployment.world.journal.digest(),
            verdict=verdict, event=event, history=history,
        )  # fmt: skip
