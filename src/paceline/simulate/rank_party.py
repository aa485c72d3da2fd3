"""One life of a rank in the simulation: its machine and engine, turned as `runtime/rank_process.py` turns them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.messages import RankReport
from paceline.core.rank import events as rank_events
from paceline.core.rank.events import Phase
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import agreed
from paceline.core.requests import AddRequest, Outputs
from paceline.simulate.collectives import Group, Groups, Part
from paceline.simulate.engine import VirtualEngine
from paceline.simulate.network import Link
from paceline.simulate.world import Violation, World

AGREEMENT_S = 0.0001
DECISION_S = 0.00001
"""From what arrives at a rank that waits to the turn that it leads to."""


class StepPart(Struct, frozen=True):
    """A rank's part in the collectives of a step. `urge`: it wants all to agree after this one.

    `effect`: what its machine asked for.
    """

    urge: bool
    effect: rank_events.Step | rank_events.DummyStep


class RankChecks(Protocol):
    """What watches a rank."""

    def rank(self, party: RankParty, event: rank_events.Event) -> None:
        """`event` has been handled, its effects not yet done."""

    def reported(self, party: RankParty, report: RankReport) -> None:
        """The rank says this of itself."""

    def step(self, party: RankParty, effect: rank_events.Step | rank_events.DummyStep) -> None:
        """The rank begins a step, real or dummy."""

    def together(self, party: RankParty, effects: Sequence[rank_events.Effect]) -> None:
        """A lockstep step of all these has been made; `party` hears of it."""


class RankParty:
    """A rank's process.

    `groups`: where it forms generations. `group`: the one it is in; for engines with collectives of their own, for
    ever; None where it runs alone. `to_coordinator`, `broadcasts`: its links there and from there. `back`: the link to
    a front-end by identity, None where it cannot be reached.
    """

    def __init__(
        self, world: World, machine: Rank, engine: VirtualEngine, lockstep: bool, groups: Groups, checks: RankChecks,
        back: Callable[[RankParty, int], Link | None], group: Group | None = None,
    ) -> None:  # fmt: skip
        self.world, self.machine, self.engine = world, machine, engine
        self.name = f"rank {machine.rank}"
        self.lockstep = lockstep
        self.group = group
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self.alive = True
        self.dummy_steps = 0
        self.taken: dict[int, int] = {}
        """Per front-end, the requests meant for this life that arrived: counted here, not asked of the machine."""
        self.gone: set[int] = set()
        """Front-ends found dead: what still arrives from them is nobody's."""
        self._groups = groups
        self._checks = checks
        self._back = back
        self._busy = False
        self._turn_due = False
        self._begun = 0.0
        self._urge = False
        self._inbox: deque[rank_events.Event] = deque()

    def start(self) -> None:
        """The engine is loaded."""
        self.arrive(rank_events.Loaded())

    def arrive(self, event: rank_events.Event) -> None:
        """Something came in: handled when the step is over, or in a moment."""
        self._inbox.append(event)
        self._arrange_turn()

    def hear(self, message: Any) -> None:
        """A broadcast. As in the real shell, some are handled in the midst of a step too."""
        event = rank_events.CoordinatorSaid(message)
        if self._busy and isinstance(message, rank_events.IN_MID_STEP) and self.alive:
            self._feed(event)
        else:
            self.arrive(event)

    def kill(self) -> None:
        """The process is gone, without a word."""
        self.alive = False
        self._inbox.clear()
        self._groups.leave(self._life)

    @property
    def _life(self) -> tuple[int, int]:
        return self.machine.rank, self.machine.incarnation

    def _arrange_turn(self) -> None:
        if not self._turn_due and not self._busy:
            self._turn_due = True
            self.world.after(DECISION_S, self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._busy or not self.alive or self.machine.phase is Phase.LEFT:
            return
        while self._inbox and not self._busy:
            event = self._inbox.popleft()
            self._count(event)
            self._feed(event)
        if not self._busy:
            self._feed(rank_events.Turn(self.engine.load(), self.engine.has_work()))

    def _count(self, event: rank_events.Event) -> None:
        match event:
            case rank_events.FrontendSaid(frontend, AddRequest(incarnation=incarnation)):
                if incarnation == self.machine.incarnation:
                    self.taken[frontend] = self.taken.get(frontend, 0) + 1
            case rank_events.FrontendGone(frontend):
                self.taken.pop(frontend, None)
                self.gone.add(frontend)

    def _feed(self, event: rank_events.Event) -> None:
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, self.name, event, effects)
        self._checks.rank(self, event)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: rank_events.Effect) -> None:
        match effect:
            case rank_events.ToFrontend(frontend, outputs):
                self._send_outputs(frontend, outputs)
            case rank_events.ToCoordinator(message):
                if isinstance(message, RankReport):
                    self._checks.reported(self, message)
                self.to_coordinator.send(message)
            case rank_events.Take(key, request):
                self.engine.add(key, request)
            case rank_events.Drop(key):
                self.engine.abort(key)
            case rank_events.Step() | rank_events.DummyStep():
                self._begin_step(effect)
            case rank_events.Agree():
                self._enter(effect, AGREEMENT_S, self._agreed)
            case rank_events.FormGroup(generation, members):
                self._busy = True
                self._groups.form(self._life, generation, members, partial(self._formed, generation), self._ended)
            case rank_events.Urge():
                self._urge = True
            case rank_events.Again():
                self._arrange_turn()
            case rank_events.Wait(until) if until is not None:
                self.world.at(until, self._arrange_turn)

    def _send_outputs(self, frontend: int, outputs: Outputs) -> None:
        link = self._back(self, frontend)
        if link is None:
            self.arrive(rank_events.FrontendGone(frontend))
        else:
            link.send(outputs)

    def _begin_step(self, effect: rank_events.Step | rank_events.DummyStep) -> None:
        self._checks.step(self, effect)
        self._begun = self.world.now
        if isinstance(effect, rank_events.Step):
            real, seconds = True, self.engine.plan(effect.prefill_quota)
        else:
            real, seconds = False, self.engine.dummy_seconds()
        if self.lockstep:
            urge, self._urge = self._urge, False
            self._enter(StepPart(urge, effect), seconds, partial(self._stepped_together, real))
        else:
            self._busy = True
            self.world.after(seconds, lambda: self._stepped(real))

    def _enter(self, value: object, seconds: float, done: Callable[[list[Any]], None]) -> None:
        if self.group is None:
            raise Violation(f"{self.name} enters a collective and is in no group", self.name)
        self._busy = True
        self.group.enter(self.machine.rank, Part(value, seconds, done, self._ended))

    def _stepped_together(self, real: bool, parts: list[StepPart]) -> None:
        self._checks.together(self, [part.effect for part in parts])
        self._stepped(real, any(part.urge for part in parts))

    def _stepped(self, real: bool, urged: bool = False) -> None:
        if not self.alive:
            return
        self._busy = False
        if real:
            # In lockstep it lasted as long as the slowest rank's.
            self._feed(replace(self.engine.step(), seconds=self.world.now - self._begun, urged=urged))
        else:
            self.dummy_steps += 1
            self._feed(rank_events.Stepped((), self.engine.load(), self.engine.has_work(), urged=urged))
        self._go_on()

    def _agreed(self, entered: list[rank_events.Agree]) -> None:
        if not self.alive:
            return
        self._busy = False
        self._feed(agreed(entered))
        self._go_on()

    def _formed(self, generation: int, group: Group) -> None:
        if not self.alive:
            return
        self._busy = False
        self.group = group
        self._feed(rank_events.Formed(generation))
        self._go_on()

    def _ended(self) -> None:
        """The generation is over, or was not formed in time."""
        if not self.alive:
            return
        self._busy = False
        self._feed(rank_events.EpochEnded())
        self._go_on()

    def _go_on(self) -> None:
        if not self._busy:
            self._turn()
