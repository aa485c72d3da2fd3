"""What a lockstep deployment is made of, as values: a rank with its engine and links, and the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from paceline.check.search import NOW, Freezer, Part, Register, Whole, demand
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.epoch import Stalls
from paceline.core.coordinator.load_table import LoadTable, Publisher
from paceline.core.coordinator.machine import Coordinator
from paceline.core.dispatch.dispatcher import Dispatcher
from paceline.core.frontend.events import CoordinatorSaid, Submit, ToCoordinator, ToRank as SentToRank
from paceline.core.frontend.machine import Frontend
from paceline.core.invariants import answered_once, runs_only_when_ready, wave_never_falls
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    ControlAnswer,
    Form,
    GroupMember,
    LoadView,
    Member,
    Members,
    RankHello,
    Scaling,
    StartDPWave,
    WakeNotice,
)
from paceline.core.rank import events as on_rank
from paceline.core.rank.events import Phase
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import RankQuota
from paceline.core.rank.reporting import LoadReporter
from paceline.core.rank.requests import RankRequests
from paceline.core.requests import AddRequest, SamplingParams, SuspendMode
from paceline.core.routing.least import LeastLoad

FRONTEND = 1
BESIDES = (Publisher, LoadTable, Dispatcher, Stalls, LoadReporter, RankRequests, RankQuota)
"""No part of what is walked: loads, and what is published of them; requests' names; the prefill quota, which is off."""
MESSAGES: Register[Any] = Register(Freezer())
"""Every message that was ever on a link, and events: equal ones are one."""
Word = Part[Any]


class Bound(Struct, frozen=True):
    """How much of each: `losses` of a broadcast to one receiver, `crashes` of the coordinator or of a rank.

    `suspensions`: that an operator asks for, each in `mode` and resumed afterwards. `steps`: engine steps of a request.
    `sync_interval`: steps between agreements. `without`: rules (`rules.py`) left out. `grouped`: whether ranks form
    epochs, so that one may die in a wave. `scales`: how often somebody asks for a rank more or one fewer.
    `backlog`: messages of one rank that the coordinator may leave unread while the ranks go on to their next step.
    `notices`: whether front-ends' notices come through. `merge`: whether states that behave alike are merged and moves
    put in order; the verdict is the same without, and the walk longer.
    """

    ranks: int = 2
    requests: int = 2
    losses: int = 1
    crashes: int = 1
    suspensions: int = 0
    mode: SuspendMode = "keep"
    steps: int = 1
    sync_interval: int = 1
    without: frozenset[str] = frozenset()
    grouped: bool = False
    scales: int = 0
    backlog: int = 3
    notices: bool = True
    merge: bool = True


# Ranks ------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """An epoch: its number, the life of the coordinator that gave it, and how many members it has.

    One coordinator gives a number to one set of lives, and two that give the same number give it to different sets:
    before the second does, all of its set have said what the first has told them. So no two sets have one name.
    """

    number: int
    by: int
    size: int


class Process:
    """One life of a rank: its machine and, by the machine's keys, each request's name and the steps left of it.

    `agree`: what it has said to the agreement that it is in. `group`: the epoch whose connections it holds;
    `to_form`: the one that it was told to form and has not begun with; `forming`: the one that it waits for. Each
    method returns what the rank says.
    """

    def __init__(self, incarnation: int, bound: Bound) -> None:
        self.bound = bound
        self.machine = Rank(
            0, incarnation, "rank", lockstep=True, report_loads=False, sync_interval=bound.sync_interval,
            group_address="group" if bound.grouped else "", without=bound.without,
        )  # fmt: skip
        self.left: dict[int, tuple[int, int]] = {}
        self.agree: on_rank.Agree | None = None
        self.group: Group | None = None
        self.to_form: Group | None = None
        self.forming: Group | None = None

    @property
    def busy(self) -> bool:
        """Whether it is in an agreement or forms a group: it reads then only what is read in mid-step."""
        return self.agree is not None or self.forming is not None

    @property
    def steps_on(self) -> bool:
        """Whether its next turn is a step: it runs, and has a group if it needs one."""
        return self.machine.running and bool(self.machine.epoch or not self.bound.grouped)

    @property
    def idle(self) -> bool:
        """Whether its next turn would begin nothing that others take part in."""
        return not self.busy and not self.steps_on and self.to_form is None

    @property
    def loading(self) -> bool:
        """Whether the life before has died, and this one has not yet loaded its engine."""
        return self.machine.phase is Phase.LOADING

    @property
    def unfinished(self) -> int:
        """Requests that the rank has, with the engine or held back."""
        return len(self.left) + self.machine.requests.kept_back

    def key(self, freeze: Freezer) -> object:
        """Equal for processes that behave alike: of requests it counts what is left of each, and not their names."""
        left = tuple(sorted(steps for _, steps in self.left.values()))
        rest = (self.machine.requests.kept_back, freeze(self.agree), self.group, self.to_form, self.forming)
        return (freeze(self.machine), left, *rest)

    def hears(self, what: Word | on_rank.Event) -> tuple[Word, ...]:
        """`what`: a broadcast, or something that happens to it."""
        event, told = on_rank.CoordinatorSaid(what.thing) if isinstance(what, Part) else what, self.machine.told
        match event:
            case on_rank.Formed():
                self.forming = None
            case on_rank.Agreed():
                self.agree = None
            case on_rank.EpochEnded():
                self.agree = self.group = self.forming = None
        said = self._done(self.machine.handle(event, NOW))
        if isinstance(event, on_rank.CoordinatorSaid) and isinstance(event.message, Form) and self.machine.told > told:
            self.to_form = named(event.message)
        turns = not self.machine.running if isinstance(event, on_rank.Agreed) else self.idle
        return said + self.turns() if turns else said

    def arrives(self, stamp: int) -> tuple[Word, ...]:
        """A request."""
        name = self.machine.requests.taken.get(FRONTEND, 0) + 1
        request = AddRequest(name, name, self.machine.incarnation, stamp, [1], SamplingParams(1))
        return self.hears(on_rank.FrontendSaid(FRONTEND, request))

    def steps(self) -> tuple[Word, ...]:
        """A step; if an agreement follows, it is in that one then."""
        said = self.turns()
        outputs, names = [], []
        for key, (name, left) in sorted(self.left.items()):
            outputs.append(on_rank.StepOutput(key, [1], "", "length" if left == 1 else None))
            self.left[key] = (name, left - 1)
            if left == 1:
                del self.left[key]
                names.append(name)
        effects = self.machine.handle(on_rank.Stepped(outputs, Load(), bool(self.left)), NOW)
        demand(answered_once(names, effects))
        self.agree = next((effect for effect in effects if isinstance(effect, on_rank.Agree)), None)
        return said + self._done(effects)

    def turns(self, later: float = 0.0) -> tuple[Word, ...]:
        """What the rank does when all that has come is read, up to the step that it would begin."""
        said: tuple[Word, ...] = ()
        while True:
            effects = self.machine.handle(on_rank.Turn(Load(), bool(self.left)), NOW + later)
            said += self._done(effects)
            if not any(isinstance(effect, on_rank.Again) for effect in effects):
                return said

    def meets(self) -> tuple[Word, ...]:
        """All that it forms a group with have come."""
        self.group = self.forming
        return ()

    def _done(self, effects: list[on_rank.Effect]) -> tuple[Word, ...]:
        said = []
        for effect in effects:
            match effect:
                case on_rank.Take(key, request):
                    self.left[key] = (request.request, self.bound.steps)
                case on_rank.Drop(key):
                    del self.left[key]
                case on_rank.FormGroup(generation, members):
                    self.group = self.to_form = None
                    self.forming = Group(generation, int(members[-1].address), members[-1].incarnation)
                case on_rank.ToCoordinator(message):
                    said.append(MESSAGES.part(message))
        demand(runs_only_when_ready(self.machine))
        return tuple(said)


class Node(NamedTuple):
    """A rank with its links, oldest messages first, and what is on its way from front-ends, by its stamps.

    `connected`: it hears broadcasts. `asked`: this life of the coordinator has asked it who it is. `notices`: to the
    coordinator, that name this rank. `late`: what the life before said that may still be read. `gone`: a life of which
    the coordinator may still hear that its connection has ended, 0 for none. `ended`: there is no process, and none is
    started by itself.
    """

    life: Part[Process]
    up: tuple[Word, ...] = ()
    down: tuple[Word, ...] = ()
    connected: bool = False
    asked: bool = False
    arriving: tuple[int, ...] = ()
    notices: tuple[int, ...] = ()
    late: tuple[Word, ...] = ()
    gone: int = 0
    ended: bool = False

    @property
    def process(self) -> Process:
        """The rank and its engine. Not to be changed."""
        return self.life.thing

    @property
    def requests(self) -> int:
        """How many requests the rank has, those on their way to it included."""
        return self.process.unfinished + len(self.arriving)

    def after(self, do: Callable[..., Any], *given: Any) -> Node:
        """What becomes of the rank by this, a method of Process; what it says is in its link then."""
        life, said = self.life.after(do, *given)
        before, machine, up, down = self.process.machine, life.thing.machine, self.up, self.down
        if before.incarnation == machine.incarnation:
            demand(wave_never_falls("a rank", before.wave, machine.wave))
        for word in said:
            # A hello that is equal to the message before it says nothing.
            if not (up and up[-1] is word and isinstance(word.thing, RankHello)):
                up = (*up, word)
        if machine.told:
            # What it was told before is not read again, so it may go unread.
            down = tuple(w for w in down if not (isinstance(w.thing, Form) and w.thing.generation <= machine.told))
        return self._replace(life=life, up=up, down=down)

    def quiet(self) -> bool:
        """Whether nothing is under way here: paused, without requests, its links empty."""
        machine = self.process.machine
        moving = self.up or self.down or self.notices or self.requests or machine.running
        return self.connected and not moving and machine.phase is Phase.READY


class State(Whole):
    """All parts, and what belongs to no one of them.

    `unsent`: requests that may still be sent. `published`: the newest (wave, running) that front-ends can have heard.
    `calls`: of the operator, how many have been served. `asking`: whether one is under way; `heard`: whether this life
    of the coordinator has it; `answered`: its answer, 0 for none. `settled`: the number of the pause that all
    ranks have said to keep, 0 where none is in force. `stranded`: requests whose rank has died, and that their
    front-ends are to send to another one. `scale`: where ranks come and go. `names`: what a story calls each rank.
    """

    def __init__(self, coordinator: Part[Coordinator], nodes: list[Node], losses: int = 0) -> None:
        self.coordinator, self.nodes, self.names = coordinator, nodes, tuple(range(len(nodes)))
        self.unsent = self.crashes = 0
        self.spare = losses
        self.published = (0, False)
        self.calls, self.asking, self.heard, self.answered, self.settled = 0, False, False, 0, 0
        self.stranded = 0
        self.scale: Any = None


# The coordinator --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What the coordinator makes of an event. `published`: the newest (wave, running) that front-ends can hear of.

    `answered`: the number that a call is answered with, 0 for none. `settled`: of the pause in force at all ranks,
    as this coordinator says; 0 where it does not say that. `scaling`: what front-ends are told of that, if anything.
    """

    broadcasts: tuple[Word, ...]
    published: tuple[int, bool]
    answered: int
    settled: int
    scaling: Word | None = None


class Known(NamedTuple):
    """What the coordinator shows of itself. `lives`: of the ranks that are ready; `timers`: set, each with whom it
    waits for."""

    wave: int
    running: bool
    suspension: int
    lives: dict[int, int]
    timers: dict[str, list[int]]


def happens(machine: Coordinator, rank: int, what: Any, timer: str = "") -> Answer:
    """`what`: an event, or what a rank has said; it is about rank `rank`, below 0 for none. `timer`: that is due."""
    event: Any = what.thing if isinstance(what, Part) else what
    event = event if isinstance(event, on_coordinator.Event) else on_coordinator.RankSaid(event)
    if rank >= 0 and hasattr(getattr(event, "message", None), "rank"):
        event = replace(event, message=replace(event.message, rank=rank))
    elif isinstance(event, on_coordinator.RankGone):
        event = replace(event, rank=rank)
    if timer:
        machine.expire(timer, NOW)
    before, effects = machine.statistics(), machine.handle(event, NOW)
    machine.moment_passes()
    known: Any = machine.statistics()
    demand(wave_never_falls("the coordinator", before["wave"], known["wave"]))  # type: ignore[arg-type]
    published, answered, scaling = (0, False), 0, None
    for effect in effects:
        match effect:
            case on_coordinator.ToFrontends(Members() | LoadView() as view):
                published = max(published, (view.wave, view.running))
                if isinstance(view, Members) and view.scaling is not None:
                    scaling = MESSAGES.part(view.scaling)
            case on_coordinator.ToFrontends(ControlAnswer() as answer):
                answered = answer.number
    words = tuple(MESSAGES.part(one.message) for one in effects if isinstance(one, on_coordinator.ToRanks))
    return Answer(words, published, answered, known["suspension"] if known["suspension_settled"] else 0, scaling)


@cache
def neutral(word: Word, rank: int, by: int) -> Word | None:
    """The message as rank `rank` reads it, None where it always ignores it. `by`: the coordinator's life."""
    match word.thing:
        case Admit() as admit:
            return MESSAGES.part(replace(admit, rank=0)) if admit.rank == rank else None
        case StartDPWave(wave, exclude):
            return MESSAGES.part(StartDPWave(wave, None)) if exclude != rank else None
        case Form() as form:
            own = [replace(member, rank=0) for member in form.members if member.rank == rank]
            signature = GroupMember(1, len(form.members), str(by))
            return MESSAGES.part(replace(form, members=[*own, signature])) if own else None
        case Scaling():
            return None
    return word


def named(form: Form) -> Group:
    """The group that such a message, as a rank reads it, is to form."""
    return Group(form.generation, int(form.members[-1].address), form.members[-1].incarnation)


@cache
def frontend_sends(wave: int, running: bool) -> tuple[int, int | None]:
    """What a front-end with this belief sends: the request's stamp and, where it sends a notice too, the notice's."""
    machine = Frontend(FRONTEND, LeastLoad(0, 1), lockstep=True)
    members = Members(PROTOCOL_VERSION, 1, 0, False, [Member(0, 1, "rank")])
    machine.handle(CoordinatorSaid(members), NOW)
    machine.handle(CoordinatorSaid(LoadView(1, 1, wave, running)), NOW)
    stamp, notice = 0, None
    for effect in machine.handle(Submit(1, [1], SamplingParams(1), 0), NOW):
        if isinstance(effect, SentToRank) and isinstance(effect.message, AddRequest):
            stamp = effect.message.wave
        elif isinstance(effect, ToCoordinator) and isinstance(effect.message, WakeNotice):
            notice = effect.message.wave
    return stamp, notice


@cache
def notice_of(stamp: int) -> Word:
    """A front-end's notice of a request, as the coordinator hears it."""
    return MESSAGES.part(on_coordinator.FrontendSaid(WakeNotice(FRONTEND, 0, stamp)))
