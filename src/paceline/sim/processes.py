"""The processes of a simulated deployment, one class a role: a machine, and what it says done as the real shells do it.

A process has one life. What it hears comes by links; what must hold of it is looked at by `Watch`, at every event.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from msgspec import Struct
from msgspec.structs import replace

from paceline.core import node
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import (
    Form,
    Identify,
    LoadView,
    Member,
    RankReport,
    Scaling,
    StartDPWave,
    ToFrontend,
    ToRank,
)
from paceline.core.node import Node
from paceline.core.rank import events as rank_events
from paceline.core.rank.machine import Phase, Rank
from paceline.core.requests import AddRequest, ControlAction, FromFrontendToRank, Outputs, SamplingParams, StartAgain
from paceline.sim.answers import Answers
from paceline.sim.collectives import Group, Groups, Part, Span
from paceline.sim.world import Alarm, Link, Violation, World

AGREEMENT_S = 0.0001
LOOK_S = 0.1
DECISION_S = 0.00001
"""From what arrives at a rank that waits to the turn that it leads to."""
DRAIN_MS, STARTUP_MS = 1500, 4000
UPDATE_MS = 3000
WEIGHTS_S = 0.02
"""How long a rank takes to read other weights, or to swap them."""
"""Of each change of the size: as long as some ranks need, and not all."""
COORDINATOR, NODE = "coordinator", "node"


class Watch:
    """What is told of every event, where it was: after the machine has handled it, and at a rank before its effects are
    done, elsewhere after them. This one looks at nothing; `Checks` holds the invariants.

    `turn`: the rank is between two steps, or waits, and takes in what has come. `step`: it begins one. `together`: it
    hears that a lockstep step of all these has been made. `stepped`: its steps of a span are over, the last of them as
    `done` says. `broadcast`, `reported`, `sent`: this is about to be sent. `connected`, `reconnected`: a front-end's
    connection to a rank is there, or there again. `controlled`: an operator's call is answered.
    """

    def rank(self, rank: RankProcess, event: rank_events.Event) -> None: ...
    def turn(self, rank: RankProcess) -> None: ...
    def reported(self, rank: RankProcess, report: RankReport) -> None: ...
    def step(self, rank: RankProcess, effect: rank_events.Step | rank_events.DummyStep) -> None: ...
    def together(self, rank: RankProcess, effects: Sequence[rank_events.Effect]) -> None: ...
    def stepped(self, rank: RankProcess, span: Span, done: rank_events.Stepped) -> None: ...
    def broadcast(self, coordinator: CoordinatorProcess, message: ToRank | ToFrontend) -> None: ...
    def coordinator(self, coordinator: CoordinatorProcess) -> None: ...
    def connected(self, frontend: FrontendProcess, member: Member) -> None: ...
    def reconnected(self, frontend: FrontendProcess, rank: int) -> None: ...
    def sent(self, frontend: FrontendProcess, rank: int, request: AddRequest) -> None: ...
    def frontend(self, frontend: FrontendProcess, event: frontend_events.Event) -> None: ...
    def controlled(self, frontend: FrontendProcess, answer: frontend_events.Controlled) -> None: ...


# The coordinator --------------------------------------------------------------------------------


class CoordinatorProcess:
    """The coordinator. `to_ranks`, `to_frontends`: put a broadcast on every receiver's link."""

    def __init__(
        self, world: World, machine: Coordinator, watch: Watch, to_ranks: Callable[[ToRank], None],
        to_frontends: Callable[[ToFrontend], None],
    ) -> None:  # fmt: skip
        self.world, self.machine = world, machine
        self.alive = True
        self.sent: Counter[str] = Counter()
        self.last_wake = -1
        self.wakes_repeated = 0
        self._watch, self._to_ranks, self._to_frontends = watch, to_ranks, to_frontends
        self._alarm = Alarm(world, machine, lambda: self.feed(coordinator.Tick()), lambda: self.alive)

    def kill(self) -> None:
        self.alive = False

    def feed(self, event: coordinator.Event) -> None:
        if not self.alive:
            return
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, COORDINATOR, event, effects)
        for effect in effects:
            match effect:
                case coordinator.ToRanks(to_ranks):
                    self._count(to_ranks)
                    self._to_ranks(to_ranks)
                case coordinator.ToFrontends(to_frontends):
                    self._count(to_frontends)
                    self._to_frontends(to_frontends)
        self._watch.coordinator(self)
        self._alarm.set()

    def _count(self, message: ToRank | ToFrontend) -> None:
        self.sent[type(message).__name__] += 1
        if isinstance(message, StartDPWave):
            self.wakes_repeated += message.wave == self.last_wake
            self.last_wake = message.wave
        self._watch.broadcast(self, message)


# Ranks ------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """What the engine computes next: how long a step of it lasts, and how many such steps it can take at once."""

    step_s: float
    steps: int = 1


class Engine(Protocol):
    """What a rank needs of its engine: steps are planned, and then made, or planned anew where a collective ended."""

    slowness: float

    def add(self, key: int, request: AddRequest) -> None: ...
    def abort(self, key: int) -> None: ...
    def has_work(self) -> bool: ...
    def kv_events(self) -> rank_events.KvChange | None: ...
    def load(self) -> Load: ...
    def plan(self, prefill_quota: int | None) -> Planned: ...
    def plan_dummy(self) -> Planned: ...
    def step(self, steps: int) -> rank_events.Stepped: ...


class StepPart(Struct, frozen=True):
    """A rank's part in the collectives of a step. `urge`: it wants all to agree after this one.

    `effect`: what its machine asked for.
    """

    urge: bool
    effect: rank_events.Step | rank_events.DummyStep


class RankProcess:
    """A rank: its machine and engine, turned as `runtime/rank.py` turns them.

    `groups`: where it forms epochs. `group`: the one it is in; for engines with collectives of their own, for
    ever; None where it runs alone. `to_coordinator`, `broadcasts`: its links there and from there. `back`: the link to
    a front-end by identity, None where it cannot be reached.
    """

    def __init__(
        self, world: World, machine: Rank, engine: Engine, lockstep: bool, groups: Groups, watch: Watch,
        back: Callable[[RankProcess, int], Link | None], group: Group | None = None,
    ) -> None:  # fmt: skip
        self.world, self.machine, self.engine = world, machine, engine
        self.name = f"rank {machine.rank}"
        self.life = (machine.rank, machine.incarnation)
        self.lockstep, self.group = lockstep, group
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self.alive = True
        self.busy = False
        self.hangs = False
        """Whether its steps do not return."""
        self.planned = Planned(0.0)
        self.dummy_steps = 0
        self.taken: dict[int, int] = {}
        """Per front-end, the requests meant for this life that arrived: counted here, not asked of the machine."""
        self.gone: set[int] = set()
        """Front-ends found dead: what still arrives from them is nobody's."""
        self.load_s: float | None = None
        """How long its engine takes to begin in the one epoch that it can be a member of; None for any number."""
        self.again: Callable[[int], None] = lambda number: None
        """Told that it ends to be started again."""
        self._groups, self._watch, self._back = groups, watch, back
        self._turn_due = False
        self._ended = partial(self._over, rank_events.EpochEnded())
        self._span: Span | None = None
        self._stuck: Callable[[], None] | None = None
        self._part = Part(None, 0.0, lambda values: None, lambda: None)
        self._urge = False
        self._inbox: deque[rank_events.Event] = deque()

    def start(self) -> None:
        self.arrive(rank_events.Loaded())

    def arrive(self, event: rank_events.Event) -> None:
        """Something came in: handled when the step is over, or in a moment."""
        self._inbox.append(event)
        self.interrupt()
        self._arrange_turn()

    @property
    def span(self) -> Span | None:
        """The steps that it is in, or was in last."""
        return self._span if self.group is None else self.group.span

    def interrupt(self) -> None:
        """Let it have a turn after the step that runs now, or is about to."""
        if self.busy and self._stuck is None:
            self._part.steps = 1
            if self.span is not None:
                self.span.cut()

    def hear(self, message: Any) -> None:
        """A broadcast. As in the real shell, some are handled in the midst of a step too."""
        event = rank_events.CoordinatorSaid(message)
        at_once = isinstance(message, rank_events.IN_MID_STEP) or (isinstance(message, Form) and self.machine.bound)
        if self.busy and at_once and self.alive:
            self._feed(event)
        else:
            self.arrive(event)

    def hang(self) -> None:
        """From here on its step does not return, until `go_on`."""
        self.hangs = True
        self._look()

    def go_on(self) -> None:
        self.hangs = False
        stuck, self._stuck = self._stuck, None
        if stuck is not None:
            stuck()

    def _look(self) -> None:
        if self.alive and self.hangs:
            self._feed(rank_events.Looked(waits=self.lockstep and self._stuck is None))
            self.world.after(LOOK_S, self._look)

    def kill(self) -> None:
        self.alive = False
        self._inbox.clear()
        self._groups.leave(self.life)

    def _arrange_turn(self) -> None:
        if not self._turn_due and not self.busy:
            self._turn_due = True
            self.world.after(DECISION_S, self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self.busy or not self.alive or self.machine.phase is Phase.LEFT:
            return
        self._watch.turn(self)
        while self._inbox and not self.busy:
            event = self._inbox.popleft()
            self._count(event)
            self._feed(event)
        if not self.busy:
            self._feed(rank_events.Turn(self.engine.load(), self.engine.has_work(), self.engine.kv_events()))

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
        self._watch.rank(self, event)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: rank_events.Effect) -> None:
        match effect:
            case rank_events.ToFrontend(frontend, outputs):
                self._send_outputs(frontend, outputs)
            case rank_events.ToCoordinator(message):
                if isinstance(message, RankReport):
                    self._watch.reported(self, message)
                self.to_coordinator.send(message)
            case rank_events.Take(key, request):
                self.engine.add(key, request)
            case rank_events.Drop(key):
                self.engine.abort(key)
            case rank_events.Step() | rank_events.DummyStep():
                self._begin_step(effect)
            case rank_events.Agree():
                self._enter(Part(effect, AGREEMENT_S, lambda agreed: self._over(agreed[0]), self._ended))
            case rank_events.FormGroup(epoch, members):
                self.busy = True
                self._groups.form(self.life, epoch, members, partial(self._formed, epoch), self._ended)
            case rank_events.StageWeights() | rank_events.UseWeights():
                used, bad = isinstance(effect, rank_events.UseWeights), effect.source == str(self.machine.rank)
                error = "they are bad" if bad and not used else ""
                self.busy = True
                self.world.after(WEIGHTS_S, partial(self._over, rank_events.WeightsDone(effect.number, used, error)))
            case rank_events.StartAgain():
                self.again(self.machine.rank)
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
        self._watch.step(self, effect)
        real = isinstance(effect, rank_events.Step)
        self.planned = self.engine.plan(effect.prefill_quota) if real else self.engine.plan_dummy()  # type: ignore[union-attr]
        if self.lockstep:
            urge, self._urge = self._urge, False
            done = partial(self._stepped_together, real, self.world.now)
            self._enter(Part(StepPart(urge, effect), self.planned.step_s, done, self._ended, self.planned.steps))
        else:
            self.busy = True
            self._span = Span(self.world, *self.planned, partial(self._stepped, real, self.world.now))

    def _enter(self, part: Part) -> None:
        if self.group is None:
            raise Violation(f"{self.name} enters a collective and is in no group", self.name)
        self.busy, self._part = True, part
        self.group.enter(self.machine.rank, part)

    def _stepped_together(self, real: bool, begun: float, parts: list[StepPart]) -> None:
        self._watch.together(self, [part.effect for part in parts])
        self._span = self.group.span if self.group is not None else None
        self._stepped(real, begun, any(part.urge for part in parts))

    def _stepped(self, real: bool, begun: float, urged: bool = False) -> None:
        span = self._span
        if not self.alive or span is None:
            return
        if self.hangs:
            self._stuck = partial(self._stepped, real, begun, urged)
            return
        if real:
            # In lockstep it lasted as long as the slowest rank's, and as all took to begin it.
            seconds = (self.world.now - begun) / span.steps
            done = replace(self.engine.step(span.steps), seconds=seconds, urged=urged)
        else:
            self.dummy_steps += span.steps
            done = rank_events.Stepped((), self.engine.load(), self.engine.has_work(), urged=urged)
        self._watch.stepped(self, span, done)
        self._over(done)

    def _formed(self, epoch: int, group: Group) -> None:
        if self.alive:
            self.group = group
            self._feed(rank_events.Met(epoch))
            formed = partial(self._over, rank_events.Formed(epoch))
            if self.load_s is None:
                formed()
            else:
                self.world.after(self.load_s, formed)

    def _over(self, event: rank_events.Event) -> None:
        if self.alive:
            self.busy = False
            self._feed(event)
            if not self.busy:
                self._turn()


# Front-ends -------------------------------------------------------------------------------------


class Call(Struct):
    """An operator's request: the event, when it was asked (virtual seconds), and how it ended."""

    event: frontend_events.Control | frontend_events.Scale | frontend_events.Update
    asked: float
    answered: float = -1.0
    superseded: bool = False
    number: int = 0

    @property
    def over(self) -> bool:
        return self.answered >= 0


class FrontendProcess:
    """A front-end: its machine, and what its clients got. `dial`: makes the link to a life of a rank.

    `lazy`: load views are taken in with the next event, of several only the newest: faster, and the same to clients.
    """

    def __init__(
        self, world: World, name: str, machine: Frontend, watch: Watch, dial: Callable[[FrontendProcess, Member], Link],
        lazy: bool = False,
    ) -> None:  # fmt: skip
        self.world, self.name, self.machine = world, name, machine
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self.alive = True
        self.answers = Answers(world, name)
        self.calls: dict[int, Call] = {}
        self.to_ranks: dict[int, Link] = {}
        self.lives: dict[int, int] = {}
        """By rank, the life that it is connected to."""
        self._watch, self._dial, self._lazy = watch, dial, lazy
        self._unseen: tuple[float, frontend_events.Event] | None = None
        self._alarm = Alarm(world, machine, lambda: self.feed(frontend_events.Tick()), lambda: self.alive)

    def submit(self, tokens: int = 8, max_tokens: int = 2, rank: int | None = None, priority: int = 0) -> int:
        """One request of a client, to `rank` if it names one; returns its number."""
        request = self.answers.number()
        # The prompt begins with the number: ranks know it by another one where it is sent again.
        self.ask(request, [request] + [1] * (tokens - 1), SamplingParams(max_tokens), rank, priority)
        return request

    def ask(
        self, request: int, prompt: list[int], params: SamplingParams, rank: int | None = None, priority: int = 0,
        blocks: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        """One request of a client, by a number that nothing of this front-end has."""
        self.answers.asked(params.max_tokens, request)
        self.feed(frontend_events.Submit(request, prompt, params, rank, priority, blocks=blocks))

    def abandon(self, *requests: int) -> None:
        waiting = tuple(request for request in requests if self.answers.hung_up(request))
        if waiting:
            self.feed(frontend_events.Abandon(waiting))

    def control(self, action: ControlAction) -> int:
        """An operator asks to pause in this mode, or to resume. Returns the call."""
        return self._call(frontend_events.Control(self.answers.number(), action))

    def scale(self, size: int) -> int:
        """An operator asks for so many ranks. Returns the call."""
        return self._call(frontend_events.Scale(self.answers.number(), size, DRAIN_MS, STARTUP_MS))

    def update(self, bad_at: int | None = None) -> int:
        """An operator brings new weights, which one rank may not be able to have. Returns the call."""
        number, source = self.answers.number(), "" if bad_at is None else str(bad_at)
        return self._call(frontend_events.Update(number, "stage", f"w{number}", source, timeout_ms=UPDATE_MS))

    def _call(self, event: frontend_events.Control | frontend_events.Scale | frontend_events.Update) -> int:
        self.calls[event.call] = Call(event, self.world.now)
        self.feed(event)
        return event.call

    def waiting(self, kind: type) -> bool:
        """Whether an operator waits for the end of such a call."""
        return any(isinstance(call.event, kind) and not call.over for call in self.calls.values())

    def finished(self) -> bool:
        return not self.answers.open

    def kill(self) -> None:
        """The process is gone; its clients' connections break."""
        self.alive = False
        for call in self.calls.values():
            call.answered = self.world.now if not call.over else call.answered
        for request in self.answers:
            self.answers.hung_up(request)

    def hear(self, message: ToFrontend) -> None:
        event = frontend_events.CoordinatorSaid(message)
        if self._lazy and isinstance(message, LoadView):
            self._unseen = (self.world.now, event)
        else:
            self.feed(event)

    def link_down(self, rank: int, life: int) -> None:
        if self.lives.get(rank) == life:
            self.answers.rank_lost(rank)
            self.feed(frontend_events.LinkDown(rank))

    def link_up(self, rank: int, life: int) -> None:
        if self.lives.get(rank) == life:
            self._watch.reconnected(self, rank)
            self.feed(frontend_events.LinkUp(rank))

    def feed(self, event: frontend_events.Event) -> None:
        if not self.alive:
            return
        if self._unseen is not None:
            (when, view), self._unseen = self._unseen, None
            self._handle(view, when)
        self._handle(event, self.world.now)
        self.answers.none_lost(self.machine)
        self._watch.frontend(self, event)
        self._alarm.set()

    def _handle(self, event: frontend_events.Event, when: float) -> None:
        before = self.machine.hung
        effects = self.machine.handle(event, when)
        for rank in self.machine.hung ^ before:
            if rank in self.machine.hung:
                self.answers.rank_lost(rank)
            elif rank in self.lives:
                self._watch.reconnected(self, rank)
        self.world.journal.record(self.world.now, self.name, event, effects)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: frontend_events.Effect) -> None:
        match effect:
            case frontend_events.ToRank(rank, message):
                self._send(rank, message)
            case frontend_events.Deliver(outputs):
                for output in outputs:
                    self.answers.delivered(output)
            case frontend_events.ToCoordinator(message):
                self.to_coordinator.send(message)
            case frontend_events.Connect(member):
                self.to_ranks[member.rank] = self._dial(self, member)
                self.lives[member.rank] = member.incarnation
            case frontend_events.Disconnect(rank):
                self.to_ranks.pop(rank).closed = True
                del self.lives[rank]
                self.answers.rank_lost(rank)
            case frontend_events.Refuse():
                self.answers.refused(effect)
            case frontend_events.Scaled(call):
                self.calls[call].answered = self.world.now
            case frontend_events.Controlled(call, number, superseded):
                self._watch.controlled(self, effect)
                known = self.calls[call]
                known.answered, known.number, known.superseded = self.world.now, number, superseded

    def _send(self, rank: int, message: FromFrontendToRank) -> None:
        if isinstance(message, AddRequest):
            self._watch.sent(self, rank, message)
            self.answers.sent(rank, message)
        self.to_ranks[rank].send(message)


# The node ---------------------------------------------------------------------------------------


class NodeProcess:
    """The node's supervisor, which does not die: its machine starts and ends ranks' processes as the coordinator says.

    `start`, `stop`: of a rank's process.
    """

    def __init__(self, world: World, machine: Node, start: Callable[[int], None], stop: Callable[[int], None]) -> None:
        self.world, self.machine = world, machine
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self._start, self._stop = start, stop

    def hear(self, message: Any) -> None:
        """A broadcast; all else is for ranks."""
        if isinstance(message, Scaling | Identify | StartAgain):
            self.feed(node.CoordinatorSaid(message))

    def feed(self, event: node.Event) -> None:
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, NODE, event, effects)
        for effect in effects:
            match effect:
                case node.StartRank(rank) | node.KeepRank(rank):
                    self._start(rank)
                case node.ReviveRank(rank):
                    self._start(rank)
                case node.StopRank(rank):
                    self._stop(rank)
                case node.ToCoordinator(message):
                    self.to_coordinator.send(message)
