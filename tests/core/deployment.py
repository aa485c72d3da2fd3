"""A whole deployment of real machines on the harness: a coordinator, ranks with a tiny engine, front-ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from paceline.core import codec
from paceline.core.coordinator import machine as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.rank import events as rank_events
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import AUTO, OFF
from paceline.core.requests import AddRequest
from paceline.core.routing import LeastLoad
from tests.core.harness import FrontendShell, Group, Link, RankShell, World

DELAY_S = 0.0005
STEP_S = 0.01
SYNC_INTERVAL = 4
QUOTA = AUTO
"""Steps take equally long here, so a prompt costs nothing: what is seen of it is how often ranks agree."""


class TinyEngine:
    """Computes whole prompts in one step, or the quota's part, and one token a step for each of `slots` requests."""

    def __init__(self, slots: int = 8) -> None:
        self.slots = slots
        self.requests: dict[int, tuple[AddRequest, int]] = {}
        self.left: dict[int, int] = {}

    def add(self, key: int, request: AddRequest) -> None:
        self.requests[key] = (request, len(request.made_token_ids))
        self.left[key] = request.tokens

    def abort(self, key: int) -> None:
        del self.requests[key]

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self, prefill_quota: int | None = None) -> rank_events.Stepped:
        outputs, prefilled = [], 0
        for key, (request, made) in list(self.requests.items())[: self.slots]:
            room = self.left[key] if prefill_quota is None else min(self.left[key], prefill_quota - prefilled)
            self.left[key] -= room
            prefilled += room
            if self.left[key]:
                continue
            finished = made + 1 >= request.params.max_tokens
            outputs.append(rank_events.StepOutput(key, [made], f" {made}", "length" if finished else None))
            self.requests[key] = (request, made + 1)
            if finished:
                del self.requests[key]
        return rank_events.Stepped(outputs, self.load(), self.has_work(), prefilled, len(outputs), STEP_S)

    def load(self) -> Load:
        running = sum(1 for key in self.requests if not self.left[key])
        prefill = sum(self.left[key] for key in self.requests)
        startable = sum(self.left[key] for key in list(self.requests)[: self.slots])
        return Load(
            len(self.requests) - running, running, self.slots, prefill, decoding=running, startable_tokens=startable
        )


class Deployment:
    """All machines on one virtual clock, started; nothing has happened yet."""

    def __init__(
        self, ranks: int = 2, frontends: int = 1, *, lockstep: bool = True, external: bool = False, start: bool = True,
        late_binding: bool = False, hybrid: bool = False, slots: int = 8,
    ) -> None:  # fmt: skip
        self.world = World()
        self.world.after_each = self._check
        self.size, self.lockstep, self.external = ranks, lockstep, external
        self.late_binding, self.hybrid, self.slots = late_binding, hybrid, slots
        self.group = Group(self.world, ranks, STEP_S) if lockstep else None
        self.coordinator: Coordinator | None = None
        self.ranks: dict[int, RankShell] = {}
        self.frontends: list[FrontendShell] = []
        self.broadcast: list[Any] = []
        self._lives = itertools.count(1)
        self._waves: dict[Any, int] = {}
        self._had_coordinator = False
        self.start_coordinator()
        for index in range(frontends):
            self.start_frontend(index, frontends)
        for number in range(ranks if start else 0):
            self.start_rank(number)

    def start_coordinator(self) -> None:
        """A new life of the coordinator; what is connected subscribes anew."""
        self.coordinator = Coordinator(
            self.size, next(self._lives), 0.0 if self.external else 0.1, lockstep=self.lockstep,
            publish_loads=not self.external, fresh=not self._had_coordinator,
        )  # fmt: skip
        self._had_coordinator = True
        for _ in self.ranks:
            self.tell_coordinator(coordinator.RankSubscribed())
        self.tell_coordinator(coordinator.FrontendSubscribed())

    def crash_coordinator(self) -> None:
        """The coordinator is gone, and with it all that is sent to it until a new one starts."""
        self.coordinator = None

    def start_rank(self, number: int) -> RankShell:
        """A new life of a rank."""
        machine = Rank(
            number, next(self._lives), f"tcp://rank-{number}", lockstep=self.lockstep, report_loads=not self.external,
            sync_interval=SYNC_INTERVAL, prefill_quota=QUOTA if self.lockstep else OFF,
        )  # fmt: skip
        up = Link(
            self.world, codec.from_rank(), lambda m: self.tell_coordinator(coordinator.RankSaid(m)), DELAY_S
        )  # fmt: skip
        shell = self.ranks[number] = RankShell(self.world, machine, TinyEngine(self.slots), self.group, STEP_S, up)
        self.tell_coordinator(coordinator.RankSubscribed())
        shell.arrive(rank_events.Loaded())
        return shell

    def start_frontend(self, index: int, count: int) -> FrontendShell:
        ranks = frozenset({index}) if self.external or self.hybrid else None
        machine = Frontend(
            100 + next(self._lives), LeastLoad(index, count), ranks=ranks,
            relay_sends=count > 1 and not self.external, lockstep=self.lockstep,
            late_binding=self.late_binding, resumes=True,
        )  # fmt: skip
        up = Link(
            self.world, codec.from_frontend(), lambda m: self.tell_coordinator(coordinator.FrontendSaid(m)), DELAY_S
        )
        shell = FrontendShell(self.world, machine, up, self._dial)
        self.frontends.append(shell)
        self.tell_coordinator(coordinator.FrontendSubscribed())
        shell.feed(frontend_events.Connected())
        return shell

    def tell_coordinator(self, event: coordinator.Event) -> None:
        machine = self.coordinator
        if machine is None:
            return
        for effect in machine.handle(event, self.world.now):
            match effect:
                case coordinator.ToRanks(message):
                    self.broadcast.append(message)
                    for rank in self.ranks.values():
                        rank.broadcasts.send(message)
                case coordinator.ToFrontends(message):
                    self.broadcast.append(message)
                    for frontend in self.frontends:
                        frontend.broadcasts.send(message)
        # Each event arranges a tick; one that was overtaken finds nothing due.
        self.world.at(machine.deadline, lambda: self._tick(machine))

    def run_until(self, condition: Callable[[], bool], limit_s: float = 30.0) -> float:
        return self.world.run_until(condition, limit_s)

    def ready(self) -> Deployment:
        """Run until every front-end knows every rank that it serves."""
        each = 1 if self.external or self.hybrid else self.size
        self.run_until(lambda: all(len(f.machine.ready_ranks()) == each for f in self.frontends))
        return self

    def finish(self, limit_s: float = 30.0) -> float:
        """Run until every request is answered; returns how long that took."""
        return self.run_until(lambda: all(frontend.finished() for frontend in self.frontends), limit_s)

    def rest(self) -> None:
        """Run until all ranks have paused and all front-ends know their loads; check that they know them exactly."""
        self.finish()
        self.run_until(lambda: not any(rank.machine.running for rank in self.ranks.values()))
        self.world.run_for(5.0)
        assert len({rank.machine.wave for rank in self.ranks.values()}) == 1
        for frontend, (number, rank) in itertools.product(self.frontends, self.ranks.items()):
            if not self.external:
                known = frontend.machine.believed(number)
                assert (known.waiting, known.running, known.prefill_tokens) == (0, 0, 0)
                assert known.finished == rank.machine.statistics()["finished"]

    def _tick(self, machine: Coordinator) -> None:
        if machine is self.coordinator and self.world.now >= machine.deadline:
            self.tell_coordinator(coordinator.Tick())

    def _dial(self, frontend: FrontendShell, number: int) -> Link:
        rank, identity = self.ranks[number], frontend.machine.identity
        back = Link(self.world, codec.outputs(), lambda m: frontend.feed(frontend_events.RankSaid(m)), DELAY_S)
        rank.to_frontends[identity] = back
        return Link(
            self.world, codec.request(), lambda m: rank.arrive(rank_events.FrontendSaid(identity, m)), DELAY_S
        )  # fmt: skip

    def _check(self) -> None:
        machines: list[Any] = [rank.machine for rank in self.ranks.values()]
        machines += [frontend.machine for frontend in self.frontends]
        machines += [self.coordinator] if self.coordinator is not None else []
        for machine in machines:
            wave = machine.statistics()["wave"]
            assert wave >= self._waves.get(machine, 0), "a wave number went down"
            self._waves[machine] = wave
