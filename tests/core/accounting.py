"""A random walk over real front-ends, a coordinator and ranks, beside a model of what each front-end must believe.

The walk goes through every order of events that links which are first in first out allow: reports and views that
come late, views that come twice or out of order, aborts, finishes, and ranks, front-ends and coordinators that end and
start again, with some of what was on its way to them lost. The model remembers of every report what the rank's engine
really held and what the rank had really taken in when it was made; it never looks into a ledger.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from msgspec.structs import replace

from paceline.core.coordinator import machine as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import LoadView, Members, RankHello, RankReport
from paceline.core.rank import events as rank_events
from paceline.core.rank.machine import Rank
from paceline.core.requests import AddRequest, SamplingParams
from paceline.core.routing import LeastLoad
from tests.core.deployment import TinyEngine


class Report:
    """The truth about one report: its load, and of each front-end, how many requests the rank had then taken."""

    def __init__(self, load: Load, taken: dict[int, int]) -> None:
        self.load, self.taken = load, taken


NOTHING = Report(Load(), {})


class Life:
    """One life of a rank, and what it has said that the coordinator has not heard."""

    def __init__(self, number: int, incarnation: int) -> None:
        self.machine = Rank(number, incarnation, f"tcp://rank-{number}")
        self.engine = TinyEngine(slots=4)
        self.ended = 0
        self.taken: dict[int, int] = {}
        self.heard: deque[Any] = deque()
        self.said: deque[tuple[Any, Report | None]] = deque()

    def truth(self, report: RankReport) -> Report:
        """What is so while `report` is made: of it only the speeds, which are measured, are taken over."""
        # What the rank measures of itself, no engine can say.
        rates = {name: getattr(report.load, name) for name in MEASURED}
        return Report(replace(self.engine.load(), finished=self.ended, **rates), dict(self.taken))


class Known:
    """What the model knows of one front-end's view of one life of a rank: its sends (summed up), and the report."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.tokens_after = [0]
        self.report = NOTHING
        self.void = 0
        """Sends of before the connection was cut: they are nobody's."""

    def expected(self, frontend: int) -> Load:
        load, taken = self.report.load, max(self.void, self.report.taken.get(frontend, 0))
        if len(self.tokens_after) - 1 == taken:
            return load
        requests, tokens = len(self.tokens_after) - 1 - taken, self.tokens_after[-1] - self.tokens_after[taken]
        return replace(load, waiting=load.waiting + requests, prefill_tokens=load.prefill_tokens + tokens)


def lose_last(queue: deque[Any], count: int) -> None:
    """Up to `count` of what was said last is lost."""
    for _ in range(min(count, len(queue))):
        queue.pop()


class Walk:
    """Ranks, front-ends and a coordinator. `act` lets one thing happen; what may change a belief is checked."""

    def __init__(self, ranks: int = 3, frontends: int = 3) -> None:
        self.now = 0.0
        self.events = 0
        self.lives_begun = 0
        self.requests = 0
        self.finished = 0
        self.frontends = [self._new_frontend(index, frontends) for index in range(frontends)]
        self.to_coordinator: list[deque[coordinator.Event]] = [deque() for _ in self.frontends]
        self.to_frontend: list[deque[tuple[Any, dict[int, tuple[int, Report]]]]] = [deque() for _ in self.frontends]
        self.requests_sent: dict[tuple[int, int], deque[Any]] = {}
        self.outputs: list[deque[Any]] = [deque() for _ in self.frontends]
        self.seen: list[tuple[Any, dict[int, tuple[int, Report]]] | None] = [None for _ in self.frontends]
        self.known: list[dict[int, Known]] = [{} for _ in self.frontends]
        self.lives: list[Life] = []
        self.size = ranks
        self.machine: Coordinator | None = None
        self.restart_coordinator()
        for number in range(ranks):
            self.lives.append(self._new_life(number))
        self.drain()

    # The model ----------------------------------------------------------------------------------

    def check(self, index: int) -> None:
        frontend = self.frontends[index]
        for number, link in self.known[index].items():
            assert frontend.believed(number) == link.expected(frontend.identity)

    def _coordinator(self, event: coordinator.Event, truth: Report | None = None) -> None:
        assert self.machine is not None
        self.events += 1
        message = getattr(event, "message", None)
        if isinstance(message, RankHello):
            # A later life has the larger number here, and a hello of an earlier one is void.
            if self.current.get(message.rank, 0) < message.incarnation:
                self.reports.pop(message.rank, None)
                self.current[message.rank] = message.incarnation
        elif truth is not None and self.current.get(message.rank) == message.incarnation:
            self.reports[message.rank] = (message.incarnation, truth)
        for effect in self.machine.handle(event, self.now):
            match effect:
                case coordinator.ToFrontends(message):
                    for queue in self.to_frontend:
                        queue.append((message, dict(self.reports)))
                case coordinator.ToRanks(message):
                    for life in self.lives:
                        life.heard.append(message)

    def _take_view(self, index: int, message: Any, reports: dict[int, tuple[int, Report]]) -> None:
        known = self.known[index]
        if isinstance(message, Members):
            for number, incarnation in message.ended:
                if number in known and known[number].incarnation == incarnation:
                    del known[number]
            for member in message.members:
                if member.rank not in known or known[member.rank].incarnation != member.incarnation:
                    known[member.rank] = Known(member.incarnation)
        elif self.seen[index] is None or (message.coordinator, message.number) > self._last_view(index):
            self.seen[index] = (message, reports)
            for number, (incarnation, report) in reports.items():
                if number in known and known[number].incarnation == incarnation:
                    known[number].report = report
        self._frontend(index, frontend_events.CoordinatorSaid(message))

    def _last_view(self, index: int) -> tuple[int, int]:
        view = self.seen[index]
        assert view is not None
        return view[0].coordinator, view[0].number

    def _new_frontend(self, index: int, count: int) -> Frontend:
        self.lives_begun += 1
        return Frontend(1000 + self.lives_begun, LeastLoad(index, count), relay_sends=True, resumes=True)

    # What machines do ---------------------------------------------------------------------------

    def _new_life(self, number: int) -> Life:
        self.lives_begun += 1
        life = Life(number, self.lives_begun)
        self._rank(life, rank_events.Loaded())
        return life

    def _rank(self, life: Life, event: rank_events.Event) -> None:
        self.events += 1
        for effect in life.machine.handle(event, self.now):
            match effect:
                case rank_events.Take(key, request):
                    life.engine.add(key, request)
                    # What was on a connection that was cut has not arrived, and was sent all the same.
                    life.taken[event.frontend] = request.number  # type: ignore[union-attr]
                case rank_events.Drop(key):
                    life.engine.abort(key)
                    life.ended += 1
                case rank_events.ToCoordinator(RankReport() as report):
                    life.said.append((report, life.truth(report)))
                case rank_events.ToCoordinator(message):
                    life.said.append((message, None))
                case rank_events.ToFrontend(identity, outputs):
                    for index, frontend in enumerate(self.frontends):
                        if frontend.identity == identity:
                            self.outputs[index].append(outputs)
                case rank_events.Step():
                    stepped = life.engine.step()
                    finished = sum(1 for output in stepped.outputs if output.finish_reason)
                    life.ended += finished
                    self.finished += finished
                    self._rank(life, stepped)
        known = {frontend.identity for frontend in self.frontends}
        if isinstance(event, rank_events.FrontendGone) and event.frontend not in known:
            life.taken.pop(event.frontend, None)

    def _frontend(self, index: int, event: frontend_events.Event) -> None:
        self.events += 1
        identity = self.frontends[index].identity
        for effect in self.frontends[index].handle(event, self.now):
            match effect:
                case frontend_events.ToRank(number, message):
                    arrival = rank_events.FrontendSaid(identity, message)
                    self.requests_sent.setdefault((index, number), deque()).append(arrival)
                    if isinstance(message, AddRequest):
                        sums = self.known[index][number].tokens_after
                        sums.append(sums[-1] + message.tokens)
                case frontend_events.ToCoordinator(message):
                    self.to_coordinator[index].append(coordinator.FrontendSaid(message))
        self.check(index)

    # What may happen ----------------------------------------------------------------------------

    def act(self, what: str, a: int, b: int) -> None:
        self.now += 0.002
        salt = a * 31 + b
        for _ in range(1 + salt % 6 if what.startswith("deliver") else 1):
            getattr(self, what)(a % len(self.frontends), b % self.size, salt)

    def submit(self, index: int, number: int, salt: int) -> None:
        self.requests += 1
        named = number if salt % 3 == 0 and number in self.frontends[index].ready_ranks() else None
        params = SamplingParams(1 + salt % 4)
        self._frontend(index, frontend_events.Submit(self.requests, [0] * (1 + salt % 40), params, named))

    def abandon(self, index: int, number: int, salt: int) -> None:
        requests = list(range(max(1, self.requests - salt % 20), self.requests + 1))
        self._frontend(index, frontend_events.Abandon(requests[: 1 + salt % 3]))

    def deliver_request(self, index: int, number: int, salt: int) -> None:
        queue = self.requests_sent.get((index, number))
        if queue:
            self._rank(self.lives[number], queue.popleft())

    def turn(self, index: int, number: int, salt: int) -> None:
        life = self.lives[number]
        self._rank(life, rank_events.Turn(life.engine.load(), life.engine.has_work()))

    def deliver_report(self, index: int, number: int, salt: int) -> None:
        late = [life for life in self.dead if life.said and life.machine.rank == number]
        life = late[0] if late and salt % 2 else self.lives[number]
        if life.said:
            message, truth = life.said.popleft()
            self._coordinator(coordinator.RankSaid(message), truth)

    def deliver_notice(self, index: int, number: int, salt: int) -> None:
        if self.to_coordinator[index]:
            self._coordinator(self.to_coordinator[index].popleft())

    def deliver_broadcast(self, index: int, number: int, salt: int) -> None:
        if self.lives[number].heard:
            self._rank(self.lives[number], rank_events.CoordinatorSaid(self.lives[number].heard.popleft()))

    def deliver_view(self, index: int, number: int, salt: int) -> None:
        if self.to_frontend[index]:
            self._take_view(index, *self.to_frontend[index].popleft())

    def repeat_view(self, index: int, number: int, salt: int) -> None:
        last = self.seen[index]
        if last is not None:
            old = replace(last[0], number=max(1, last[0].number - salt % 3), ranks=None if salt % 2 else last[0].ranks)
            self._take_view(index, old, {})

    def reorder_views(self, index: int, number: int, salt: int) -> None:
        waiting = self.to_frontend[index]
        if len(waiting) > 1:
            (first, _), (second, _) = waiting[-1], waiting[-2]
            both = isinstance(first, LoadView) and isinstance(second, LoadView)
            if both and first.coordinator == second.coordinator:
                waiting[-1], waiting[-2] = waiting[-2], waiting[-1]

    def deliver_outputs(self, index: int, number: int, salt: int) -> None:
        if self.outputs[index]:
            self._frontend(index, frontend_events.RankSaid(self.outputs[index].popleft()))

    def tick(self, index: int, number: int, salt: int) -> None:
        self._coordinator(coordinator.Tick())

    def restart_rank(self, index: int, number: int, salt: int) -> None:
        old = self.lives[number]
        if self.current.get(number) != old.machine.incarnation:
            # Lives are told apart by equality only, so a first hello must not be overtaken by the next life's.
            old.said.clear()
        self.dead = [*self.dead[-3:], old]
        self.lives[number] = self._new_life(number)
        self._coordinator(coordinator.RankSubscribed())

    def restart_frontend(self, index: int, number: int, salt: int) -> None:
        """It ends, with some of what it said last, and the next begins before all hear of that."""
        gone = self.frontends[index].identity
        for rank in range(self.size):
            queue = self.requests_sent.setdefault((index, rank), deque())
            lose_last(queue, salt % 4)
            if (salt + rank) % 3:
                # A rank hears of it when it sends something, or never.
                queue.append(rank_events.FrontendGone(gone))
        lose_last(self.to_coordinator[index], salt % 3)
        self.to_frontend[index].clear()
        self.outputs[index].clear()
        self.seen[index] = None
        self.known[index] = {}
        self.frontends[index] = self._new_frontend(index, len(self.frontends))
        self.to_coordinator[index] += [coordinator.FrontendGone(gone), coordinator.FrontendSubscribed()]

    def cut_link(self, index: int, number: int, salt: int) -> None:
        """A front-end's connection to a rank that lives ends, with some of what was said last, or comes up again."""
        if number not in self.known[index]:
            return
        frontend, known = self.frontends[index], self.known[index][number]
        if number not in frontend.ready_ranks():
            known.void = len(known.tokens_after) - 1
            self._frontend(index, frontend_events.LinkUp(number))
            return
        queue = self.requests_sent.setdefault((index, number), deque())
        lose_last(queue, salt % 4)
        if salt % 3:
            queue.append(rank_events.FrontendGone(frontend.identity))
        self._frontend(index, frontend_events.LinkDown(number))

    def restart_coordinator(self, index: int = 0, number: int = 0, salt: int = 0) -> None:
        """What was in the old one's hands, some of what was said first, is lost with it."""
        self.lives_begun += 1
        for life in self.lives:
            for _ in range(min(salt % 4, len(life.said))):
                life.said.popleft()
        self.machine = Coordinator(self.size, self.lives_begun, 0.05, lockstep=False, fresh=self.machine is None)
        self.current: dict[int, int] = {}
        self.reports: dict[int, tuple[int, Report]] = {}
        self.dead: list[Life] = []
        self._coordinator(coordinator.RankSubscribed())
        self._coordinator(coordinator.FrontendSubscribed())

    def drain(self) -> None:
        """Let everything arrive and every rank finish; then every belief is the plain truth."""
        for index, number in itertools.product(range(len(self.frontends)), range(len(self.lives))):
            if number in self.known[index] and number not in self.frontends[index].ready_ranks():
                self.cut_link(index, number, 0)
        for _ in range(500):
            for index, number in itertools.product(range(len(self.frontends)), range(self.size)):
                for what in DELIVERIES:
                    self.act(what, index, number)
            queues = [*self.requests_sent.values(), *self.to_coordinator, *self.outputs, *self.to_frontend]
            queues += [queue for life in self.lives for queue in (life.heard, life.said)]
            if not any(queues) and not any(life.engine.has_work() for life in self.lives):
                break
        for frontend in self.frontends:
            assert frontend.ready_ranks() == list(range(self.size))
            for number, life in enumerate(self.lives):
                known = frontend.believed(number)
                assert replace(known, finished=0, **UNMEASURED) == life.engine.load()


MEASURED = ("prefill_rate", "decode_rate", "step_s", "prompt_token_s", "answer_token_s")
UNMEASURED = dict.fromkeys(MEASURED, 0.0)
"""What the rank adds to the engine's load by itself."""

DELIVERIES = [
    "deliver_request", "turn", "deliver_report", "deliver_notice", "deliver_broadcast", "deliver_view",
    "deliver_outputs", "tick",
]  # fmt: skip
ORDINARY = [*DELIVERIES, "submit", "submit", "turn", "deliver_request", "repeat_view", "reorder_views", "abandon"]
RARE = ["cut_link", "cut_link", "restart_rank", "restart_rank", "restart_frontend", "restart_coordinator"]
