"""Paceline in the simulator: the production machines of the front-ends and the coordinator, over links with a delay.

All messages between them are the real ones. What nobody would look at is not made: a front-end takes in what has come
for it when it next decides, and of several load views then only the newest, since the newest is all that counts; and
ranks that only decode are asked for their reports when the coordinator is about to publish, since until then the newest
is all that it keeps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from paceline.core.coordinator import events as at_coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as at_frontend
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    LoadView,
    RankHello,
    RankReport,
    StartDPWave,
    StartWave,
    ToFrontend,
    WaveComplete,
)
from paceline.core.requests import AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing.policy import Policy
from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.plane import ControlPlane, Fleet
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import BLOCK_TOKENS

COORDINATOR = 1
FIRST_RANK_LIFE = 1 << 20
FIRST_FRONTEND = 1 << 21
SOON_S = 1e-6
"""How long before a view goes out the ranks' newest reports are at the coordinator."""


class Links(Struct, frozen=True):
    """`delay_s`: how long a message is on its way. `interval_s`: least time between two load views."""

    delay_s: float = 0.0002
    interval_s: float = 0.1


class Front:
    """One front-end: its machine, and what has come for it that it has not looked at."""

    __slots__ = ("inbox", "machine", "viewed", "watched")

    def __init__(self, machine: Frontend) -> None:
        self.machine = machine
        self.viewed = 0.0
        self.watched = False
        self.inbox: deque[tuple[float, at_frontend.Event]] = deque()


class Paceline(ControlPlane):
    """The control plane of this package.

    `policies`: one a front-end. `max_tokens`: what clients allow an answer to have. `late_binding`: whether requests
    wait in the coordinator's queue until a rank can start them, or are bound at arrival. `contents`: whether policies
    look
    at what the prompts are, not only at how long.
    """

    def __init__(
        self, clock: Clock, policies: list[Policy], lockstep: bool, links: Links, max_tokens: int,
        late_binding: bool = False, contents: bool = False,
    ) -> None:  # fmt: skip  # fmt: skip
        self._clock = clock
        self._lockstep = lockstep
        self._links = links
        self._contents = contents
        self._fronts = [
            Front(
                Frontend(
                    FIRST_FRONTEND + index,
                    policy,
                    relay_sends=len(policies) > 1,
                    lockstep=lockstep,
                    late_binding=late_binding,
                )
            )
            for index, policy in enumerate(policies)
        ]
        self._fleet: Fleet
        self._coordinator: Coordinator
        self._sequences: dict[int, Sequence] = {}
        self._views: deque[tuple[float, at_frontend.Event]] = deque()
        self._deadline = float("inf")
        self._last_view = float("-inf")
        self._reported: list[int] = []
        self._wave = 0
        self._running = False
        self._params = SamplingParams(max_tokens=max_tokens)

    # Bringing up --------------------------------------------------------------------------------

    def start(self, fleet: Fleet) -> None:
        """All are there and know of each other when the first request comes."""
        self._fleet = fleet
        count = len(fleet.ranks)
        self._reported = [0] * count
        self._coordinator = Coordinator(count, COORDINATOR, self._links.interval_s, lockstep=self._lockstep)
        before = self._clock.now - 1.0
        for rank in fleet.ranks:
            for ready in (False, True):
                for effect in self._coordinator.handle(at_coordinator.RankSaid(self._hello(rank, ready)), before):
                    assert not isinstance(effect, at_coordinator.ToRanks) or isinstance(effect.message, Admit)
            self._coordinator.handle(at_coordinator.RankSaid(self._report(rank, before)), before)
        for front in self._fronts:
            for said in front.machine.handle(at_frontend.Connected(), before):
                assert isinstance(said, at_frontend.ToCoordinator)
                for effect in self._coordinator.handle(at_coordinator.FrontendSaid(said.message), before):
                    if isinstance(effect, at_coordinator.ToFrontends):
                        for other in self._fronts:
                            other.machine.handle(at_frontend.CoordinatorSaid(effect.message), before)
        self._watch_deadline()

    def _hello(self, rank: SimulatedRank, ready: bool) -> RankHello:
        life = FIRST_RANK_LIFE + rank.number
        address = f"tcp://rank:{rank.number + 1}"
        return RankHello(PROTOCOL_VERSION, rank.number, life, address, ready, self._wave, self._running)

    # Clients and front-ends ---------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """A front-end's machine decides."""
        front = self._fronts[sequence.frontend]
        self._look(front)
        # Requests are numbered from 1: a number of 0 is nobody's.
        self._sequences[sequence.number + 1] = sequence
        submit = at_frontend.Submit(sequence.number + 1, prompt_of(sequence, self._contents), self._params)
        self._perform(front, front.machine.handle(submit, self._clock.now))

    def _look(self, front: Front) -> None:
        """Take in what has come for a front-end; of the load views only the newest."""
        now, inbox = self._clock.now, front.inbox
        while inbox and inbox[0][0] <= now:
            when, event = inbox.popleft()
            if isinstance(event, at_frontend.CoordinatorSaid):
                self._view(front, when)
            self._perform(front, front.machine.handle(event, when))
        self._view(front, now)

    def _view(self, front: Front, until: float) -> None:
        """Take in the newest view that has come. It and what ranks say change different things: in any order."""
        for when, event in reversed(self._views):
            if when <= until:
                if when > front.viewed:
                    front.viewed = when
                    self._perform(front, front.machine.handle(event, when))
                break

    def _perform(self, front: Front, effects: Iterable[at_frontend.Effect]) -> None:
        for effect in effects:
            match effect:
                case at_frontend.ToRank(rank, AddRequest() as add):
                    sequence = self._sequences[add.request]
                    sequence.send = add.number
                    self._later(self._deliver, (rank, sequence))
                case at_frontend.ToCoordinator(message):
                    self._later(self._tell_coordinator, at_coordinator.FrontendSaid(message))
                case at_frontend.Refuse(request, _, text):
                    raise AssertionError(f"request {request} was refused: {text}")
        if not front.watched and front.machine.deadline < float("inf"):
            front.watched = True
            self._clock.at(max(front.machine.deadline, self._clock.now), self._watch, front)

    def _watch(self, front: Front) -> None:
        """The machine wants to be woken, if what it waits for has not come meanwhile."""
        front.watched = False
        self._look(front)
        due = self._clock.now >= front.machine.deadline
        self._perform(front, front.machine.handle(at_frontend.Tick(), self._clock.now) if due else ())

    def _deliver(self, what: tuple[int, Sequence]) -> None:
        self._fleet.deliver(*what)

    def ended(self, rank: SimulatedRank, sequences: Iterable[Sequence]) -> None:
        """The front-ends hear of it; nothing else of an answer changes anything in them."""
        when = self._clock.now + self._links.delay_s
        for sequence in sequences:
            front = self._fronts[sequence.frontend]
            output = Output(sequence.number + 1, [0], finish_reason="stop")
            said = at_frontend.RankSaid(Outputs(rank.number, FIRST_RANK_LIFE + rank.number, [output]))
            front.inbox.append((when, said))
            del self._sequences[sequence.number + 1]

    # Ranks --------------------------------------------------------------------------------------

    def all_between_steps(self, changed: list[SimulatedRank], others: Iterable[SimulatedRank]) -> None:
        """Ranks in lockstep report within microseconds of one another: the coordinator reads all in one go.

        Of those that only decoded the reports are needed where a view is due.
        """
        now = self._clock.now
        reports = [self._report(rank, now) for rank in changed]
        if now + self._links.delay_s >= self._last_view + self._links.interval_s:
            reports += [self._report(rank, now) for rank in others]
        if reports:
            self._later(self._tell_coordinator, at_coordinator.RanksReported(reports))

    def between_steps(self, rank: SimulatedRank) -> None:
        """Its load has changed: it reports."""
        self._later(self._tell_coordinator, at_coordinator.RankSaid(self._report(rank, self._clock.now)))

    def _report(self, rank: SimulatedRank, when: float) -> RankReport:
        load = rank.engine.load(rank.counts, self._fleet.grown(rank, when))
        self._reported[rank.number] = step = rank.step + self._fleet.steps_done(rank, when)
        taken = {FIRST_FRONTEND + index: number for index, number in rank.taken.items()}
        return RankReport(rank.number, FIRST_RANK_LIFE + rank.number, step, self._wave, self._running, load, taken)

    def woken(self, rank: SimulatedRank) -> None:
        """It has taken a request while all were paused."""
        self._running = True
        start = StartWave(rank.number, FIRST_RANK_LIFE + rank.number, self._wave)
        self._later(self._tell_coordinator, at_coordinator.RankSaid(start))

    def paused(self) -> None:
        """All say that their wave is over."""
        for rank in self._fleet.ranks:
            complete = WaveComplete(rank.number, FIRST_RANK_LIFE + rank.number, self._wave)
            self._later(self._tell_coordinator, at_coordinator.RankSaid(complete))
        self._wave += 1
        self._running = False

    # The coordinator ----------------------------------------------------------------------------

    def _tell_coordinator(self, event: at_coordinator.Event) -> None:
        for effect in self._coordinator.handle(event, self._clock.now):
            match effect:
                case at_coordinator.ToFrontends(message):
                    self._tell_frontends(message)
                case at_coordinator.ToRanks(StartDPWave(wave)):
                    self._later(self._wake_ranks, wave)
        self._watch_deadline()

    def _wake_ranks(self, wave: int) -> None:
        if wave < self._wave:
            return
        self._fleet.wake()
        self._running = True
        for rank in self._fleet.ranks:
            self._later(self._tell_coordinator, at_coordinator.RankSaid(self._hello(rank, True)))

    def _tell_frontends(self, message: ToFrontend) -> None:
        when = self._clock.now + self._links.delay_s
        said = at_frontend.CoordinatorSaid(message)
        if isinstance(message, LoadView):
            self._views.append((when, said))
            while len(self._views) > 1 and self._views[1][0] <= self._clock.now:
                self._views.popleft()
            self._last_view = self._clock.now
            self._clock.at(self._clock.now + self._links.interval_s - SOON_S, self._ask_ranks, self._last_view)
            return
        for front in self._fronts:
            front.inbox.append((when, said))
            self._clock.at(when, self._look, front)

    def _ask_ranks(self, view: float) -> None:
        """The view after that of `view` is due in a moment: what have ranks reported that make many steps in one go?"""
        if view != self._last_view:
            return
        when = self._clock.now - self._links.delay_s
        ranks = self._fleet.ranks
        reports = [self._report(rank, when) for rank in ranks if self._has_more(rank, when)]
        if reports:
            self._tell_coordinator(at_coordinator.RanksReported(reports))
            return
        # The next report, if there is one, will be the first change after quiet.
        ends = [self._fleet.step_end(rank, when) for rank in ranks]
        soonest = min((end for end in ends if end is not None), default=None)
        if soonest is not None:
            self._clock.at(soonest + self._links.delay_s + SOON_S, self._ask_ranks, view)

    def _has_more(self, rank: SimulatedRank, when: float) -> bool:
        """Whether it has made a step since its last report that changed its load."""
        if not self._fleet.grown(rank, when):
            return False
        return rank.step + self._fleet.steps_done(rank, when) > self._reported[rank.number]

    def _watch_deadline(self) -> None:
        deadline = self._coordinator.deadline
        if deadline < self._deadline:
            self._deadline = deadline
            self._clock.at(max(deadline, self._clock.now), self._tick)

    def _tick(self, _: None) -> None:
        if self._clock.now >= self._deadline:
            self._deadline = float("inf")
            self._tell_coordinator(at_coordinator.Tick())

    def _later(self, happening: Callable[[Any], None], argument: object) -> None:
        self._clock.at(self._clock.now + self._links.delay_s, happening, argument)


def prompt_of(sequence: Sequence, contents: bool) -> list[int]:
    """Its tokens; equal ones for equal blocks of the trace. Without `contents` only their number is right."""
    if not contents:
        # As good as a list of so many tokens to whoever only counts them, and made at once.
        return range(sequence.prompt)  # type: ignore[return-value]
    blocks = sequence.blocks or (-1 - sequence.number,)
    tokens = [block for block in blocks for _ in range(BLOCK_TOKENS)]
    return (tokens + [blocks[-1]] * max(0, sequence.prompt - len(tokens)))[: sequence.prompt]
