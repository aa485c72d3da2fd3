"""What must hold at every event of a simulated run, looked at where the event was.

The figures that are held against the machines are counted here from what went over the links: a machine's own
accountings are never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from paceline.core.binding import Grants
from paceline.core.frontend import events as frontend_events
from paceline.core.invariants import same_quota
from paceline.core.load import Load
from paceline.core.messages import (
    Admit,
    Form,
    LoadView,
    Member,
    Members,
    RankReport,
    RankView,
    StartDPWave,
    SuspensionState,
    ToFrontend,
    ToRank,
)
from paceline.core.rank import events as rank_events
from paceline.core.rank.machine import Phase
from paceline.core.rank.prefill_quota import PATIENCE
from paceline.core.requests import AddRequest
from paceline.sim.processes import COORDINATOR, CoordinatorProcess, FrontendProcess, RankProcess, Watch
from paceline.sim.world import Violation


class _Known:
    """What one front-end must know of one life of a rank: its sends, summed up, and the last report it was shown."""

    __slots__ = ("incarnation", "load", "step", "taken", "tokens_after")

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.tokens_after = [0]
        self.load = Load()
        self.taken = 0
        self.step = -1

    def expected(self) -> Load:
        requests = len(self.tokens_after) - 1 - self.taken
        tokens = self.tokens_after[-1] - self.tokens_after[self.taken]
        waiting, prefill = self.load.waiting + requests, self.load.prefill_tokens + tokens
        return replace(self.load, waiting=waiting, prefill_tokens=prefill) if requests else self.load


class Checks(Watch):
    """The invariants of one run. Each method raises Violation, naming the processes."""

    def __init__(self) -> None:
        self._rank_waves: dict[int, int] = {}
        self._frontend_waves: dict[int, int] = {}
        self._coordinator_waves: dict[int, int] = {}
        self._reports: dict[int, set[int]] = {}
        self._known: dict[int, dict[int, _Known]] = {}
        self._views: dict[int, tuple[int, int]] = {}
        self._ranks: Mapping[int, RankProcess] = {}
        self._frontends: Mapping[int, FrontendProcess] = {}
        self._reported = True
        self._sent: set[tuple[int, int]] = set()
        self._barred: dict[int, int] = {}
        self._stepped_with: dict[int, int] = {}
        self._settled = 0
        self._settled_lives: frozenset[int] = frozenset()
        self._resumed = 0
        self._size = 0

    def deployed(
        self, ranks: Mapping[int, RankProcess], frontends: Mapping[int, FrontendProcess], reported: bool
    ) -> None:
        """The ranks and front-ends by number, as they are at any time; `reported`: whether loads are."""
        self._ranks, self._frontends, self._reported = ranks, frontends, reported

    # Ranks --------------------------------------------------------------------------------------

    def rank(self, rank: RankProcess, event: rank_events.Event) -> None:
        """A rank's wave never goes down."""
        life, wave = rank.machine.incarnation, rank.machine.wave
        before = self._rank_waves.get(life, 0)
        if wave < before:
            raise Violation(f"{rank.name}: its wave went down from {before} to {wave}", rank.name)
        self._rank_waves[life] = wave

    def reported(self, rank: RankProcess, report: RankReport) -> None:
        """A report is true: the engine's load, and for each front-end the requests that had arrived."""
        load, said = rank.engine.load(), report.load
        held = rank.machine.requests.kept_back
        wrong = (load.waiting + held, load.running) != (said.waiting, said.running)
        if wrong or (not held and load.prefill_tokens != said.prefill_tokens):
            raise Violation(f"{rank.name} reports {said} and has {load}", rank.name)
        taken = report.taken
        if rank.gone:
            taken = {frontend: count for frontend, count in taken.items() if frontend not in rank.gone}
        if taken != {frontend: count for frontend, count in rank.taken.items() if frontend not in rank.gone}:
            raise Violation(f"{rank.name} reports taken {report.taken}, arrived: {rank.taken}", rank.name)
        self._reports.setdefault(report.incarnation, set()).add(_key(report))

    def step(self, rank: RankProcess, effect: rank_events.Step | rank_events.DummyStep) -> None:
        """A rank begins a step only while it runs; nobody's prompt waits for ever."""
        self._patience(rank, effect)
        self._weights(rank)
        if rank.lockstep and not rank.machine.running:
            raise Violation(f"{rank.name} steps while paused", rank.name)
        if self._settled <= self._resumed:
            return
        if not rank.lockstep:
            # Each goes on as it hears of the end. One that was not ready, nobody waited for.
            knew, number = rank.machine.incarnation in self._settled_lives, rank.machine.pause.number
            if knew and number <= self._settled:
                text = f"{rank.name} steps in the settled suspension {self._settled}, and knows of {number}"
                raise Violation(text, rank.name, COORDINATOR)
            return
        known = {rank.name: rank.machine.pause.number for rank in self._ready()}
        unaware = [name for name, number in known.items() if number <= self._settled]
        # Where all that knew have died, the pause has died with them.
        if unaware and max(known.values()) >= self._settled:
            text = f"{rank.name} steps in the settled suspension {self._settled}, of whose end {unaware} do not know"
            raise Violation(text, rank.name, *unaware, COORDINATOR)
        self._resumed = self._settled

    def _weights(self, rank: RankProcess) -> None:
        """Never a mix: a rank steps with the weights that it knows to be in force, and not with earlier ones than
        another that is there has stepped with.
        """
        has, weights = rank.machine.weights.has, rank.machine.weights
        if weights.known.current != has or weights.known.under_way:
            text = f"{rank.name} steps with weights {has} where it knows of {weights.known}"
            raise Violation(text, rank.name)
        if not self._stepped_with and not has:
            return
        for other in self._ready():
            if self._stepped_with.get(other.machine.incarnation, 0) > has:
                text = f"{rank.name} steps with weights {has}, {other.name} has stepped with later ones"
                raise Violation(text, rank.name, other.name, COORDINATOR)
        self._stepped_with[rank.machine.incarnation] = has

    def _patience(self, rank: RankProcess, effect: rank_events.Step | rank_events.DummyStep) -> None:
        """Steps in which a rank may not prefill, though it could, follow one another no longer than agreed."""
        life, startable = rank.machine.incarnation, rank.engine.load().startable_tokens
        barred = isinstance(effect, rank_events.Step) and effect.prefill_quota == 0 and startable
        self._barred[life] = self._barred.get(life, 0) + 1 if barred else 0
        if self._barred[life] > PATIENCE + 1:
            text = f"{rank.name} has {startable} prompt tokens to compute and has had no quota for {PATIENCE + 2} steps"
            raise Violation(text, rank.name)

    def together(self, rank: RankProcess, effects: Sequence[rank_events.Effect]) -> None:
        """All ranks of a step have the same prefill quota."""
        why = same_quota(effects)
        if why is not None:
            raise Violation(why, rank.name)

    def _ready(self) -> list[RankProcess]:
        """The ranks that count: those that the others have gone on without take part in nothing, and those that the
        coordinator has let go are about to end.
        """
        ready = [
            rank for number, rank in self._ranks.items()
            if number < self._size and rank.alive and rank.machine.phase is Phase.READY
        ]  # fmt: skip
        newest = max((rank.machine.told for rank in ready), default=0)
        return [rank for rank in ready if rank.machine.told == newest]

    # The coordinator ----------------------------------------------------------------------------

    def broadcast(self, coordinator: CoordinatorProcess, message: ToRank | ToFrontend) -> None:
        """The waves that one coordinator speaks of never go down; its views show what ranks have reported."""
        if isinstance(message, StartDPWave | Admit | Form | Members | LoadView):
            identity, wave = coordinator.machine.identity, message.wave
            before = self._coordinator_waves.get(identity, 0)
            if wave < before:
                raise Violation(f"the coordinator's wave went down from {before} to {wave}", COORDINATOR)
            self._coordinator_waves[identity] = wave
        self._size = coordinator.machine.size
        if isinstance(message, LoadView):
            self._suspension(message.suspension)
            for entry in message.ranks or ():
                if _key(entry) not in self._reports.get(entry.incarnation, ()):
                    text = f"the view shows what rank {entry.rank} never reported: {entry}"
                    raise Violation(text, COORDINATOR, f"rank {entry.rank}")

    def coordinator(self, coordinator: CoordinatorProcess) -> None:
        """What is queued waits at its front-end, once the front-end's word of the contrary has come."""
        descriptors = list(coordinator.machine.dispatcher.descriptors())
        if not descriptors:
            return
        known = {one.machine.identity: one for one in self._frontends.values()}
        for identity, request in descriptors:
            frontend = known.get(identity)
            if frontend is None or not frontend.alive or not frontend.to_coordinator.idle:
                continue
            if not frontend.to_coordinator.lost and request not in frontend.machine.waiting_for_grant():
                text = f"request {request} of {frontend.name} is queued and does not wait there"
                raise Violation(text, frontend.name, COORDINATOR)

    def _suspension(self, state: SuspensionState) -> None:
        """What the coordinator calls settled is: every rank knows it, and where it is a pause, holds."""
        if not state.settled or state.number % 2 == 0 or state.number <= self._settled:
            return
        self._settled = state.number
        self._settled_lives = frozenset(rank.machine.incarnation for rank in self._ready())
        for rank in self._ready():
            known, held = rank.machine.pause.number, rank.machine.quiesced
            if known < state.number or (known == state.number and not held):
                text = f"suspension {state.number} is called settled; {rank.name} knows {known}, held: {held}"
                raise Violation(text, COORDINATOR, rank.name)

    def controlled(self, frontend: FrontendProcess, answer: frontend_events.Controlled) -> None:
        """A call returns when every rank knows what it asked for, or when somebody has asked for the contrary."""
        if answer.superseded or answer.why:
            return
        updates = isinstance(frontend.calls[answer.call].event, frontend_events.Update)
        for rank in self._ready():
            weights = rank.machine.weights
            if updates and weights.known.number < answer.number:
                text = f"{frontend.name}: weights are in force at {answer.number}, {rank.name} has {weights.known}"
                raise Violation(text, frontend.name, rank.name, COORDINATOR)
        for rank in self._ready() if not updates else ():
            pause = rank.machine.pause
            # A life that has come since the resumption need not know its number, if it is free all the same.
            if pause.number < answer.number and not (answer.number % 2 == 0 and pause.over):
                text = (
                    f"{frontend.name}: call {answer.call} returns at {answer.number}, {rank.name} knows no such number"
                )
                raise Violation(text, frontend.name, rank.name, COORDINATOR)

    # Front-ends ---------------------------------------------------------------------------------

    def connected(self, frontend: FrontendProcess, member: Member) -> None:
        """A front-end begins to send to a life of a rank."""
        self._known.setdefault(frontend.machine.identity, {})[member.rank] = _Known(member.incarnation)

    def reconnected(self, frontend: FrontendProcess, rank: int) -> None:
        """A connection is there again: of what was sent before nothing is there, or will not be in a moment."""
        known = self._known[frontend.machine.identity][rank]
        known.taken = len(known.tokens_after) - 1

    def sent(self, frontend: FrontendProcess, rank: int, request: AddRequest) -> None:
        """Sends to one life are numbered 1, 2, 3, …, and no request is sent twice."""
        if (frontend.machine.identity, request.request) in self._sent:
            raise Violation(f"{frontend.name} sends request {request.request} twice", frontend.name, f"rank {rank}")
        self._sent.add((frontend.machine.identity, request.request))
        known = self._known[frontend.machine.identity][rank]
        if (request.incarnation, request.number) != (known.incarnation, len(known.tokens_after)):
            text = (
                f"{frontend.name} numbers send {len(known.tokens_after)} to life {known.incarnation} wrongly: {request}"
            )
            raise Violation(text, frontend.name, f"rank {rank}")
        known.tokens_after.append(known.tokens_after[-1] + request.tokens)

    def frontend(self, frontend: FrontendProcess, event: frontend_events.Event) -> None:
        """Its wave never goes down, and it believes what was reported and what it has sent since, no more, no less."""
        machine = frontend.machine
        before = self._frontend_waves.get(machine.identity, 0)
        if machine.wave < before:
            raise Violation(f"{frontend.name}: its wave went down from {before} to {machine.wave}", frontend.name)
        self._frontend_waves[machine.identity] = machine.wave
        if not self._reported:
            return
        known = self._known.get(machine.identity, {})
        match event:
            case frontend_events.CoordinatorSaid(LoadView() as view):
                self._take_view(machine.identity, view, known)
                self._believes(frontend, known, machine.ready_ranks())
            case frontend_events.CoordinatorSaid(Members(coordinator=coordinator)):
                if self._views.get(machine.identity, (-1, 0))[0] != coordinator:
                    self._views[machine.identity] = (coordinator, 0)
                self._believes(frontend, known, machine.ready_ranks())
            case frontend_events.Submit(request=request):
                rank = frontend.answers[request].rank
                if rank >= 0:
                    self._believes(frontend, known, (rank,))
            case frontend_events.CoordinatorSaid(Grants()) | frontend_events.Tick():
                self._believes(frontend, known, machine.ready_ranks())

    def _take_view(self, identity: int, view: LoadView, known: Mapping[int, _Known]) -> None:
        coordinator, number = self._views.get(identity, (-1, 0))
        if coordinator == view.coordinator and view.number <= number:
            return
        self._views[identity] = (view.coordinator, view.number)
        for entry in view.ranks or ():
            link = known.get(entry.rank)
            if link is not None and link.incarnation == entry.incarnation and entry.step >= link.step:
                link.step, link.load = entry.step, entry.load
                link.taken = max(link.taken, entry.taken.get(identity, 0))

    def _believes(self, frontend: FrontendProcess, known: Mapping[int, _Known], ranks: Sequence[int]) -> None:
        for rank in ranks:
            believed, expected = frontend.machine.believed(rank), known[rank].expected()
            if believed != expected:
                text = f"{frontend.name} believes of rank {rank} {believed}, and was shown and has sent {expected}"
                raise Violation(text, frontend.name, f"rank {rank}", COORDINATOR)


def _key(report: RankReport | RankView) -> int:
    return hash((report.step, report.load, tuple(sorted(report.taken.items()))))
