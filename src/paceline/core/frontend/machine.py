"""A front-end's machine: what it has sent, what is in flight, and whom to wake.

    effects = frontend.handle(event, now)

The shell owns sockets and HTTP; this machine decides to whom a request goes, numbers it, tells the
coordinator where the ranks are paused, and drops what comes from a life of a rank that is over. Tokens
of a whole step pass through in one event. Where a rank dies, its requests go on at others (`failover.py`).
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from paceline.core import binding, messages
from paceline.core.coordinator.epoch import describe
from paceline.core.frontend import events
from paceline.core.frontend.control import EngineCalls, FrontendCalls, FrontendScaling, in_words
from paceline.core.frontend.dispatch import Binding, Placement
from paceline.core.frontend.failover import HOLD_S, MOST_LOSSES, Failover
from paceline.core.frontend.inflight import InFlight, InFlightRequests, Router
from paceline.core.load import Load, plausible
from paceline.core.requests import LARGEST_STAMP, Revive, Weights
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy
from paceline.core.rules import checked

NOBODY = -1
"""No coordinator has been heard yet; else its identity, which each life of it has anew."""


class Frontend:
    """One life of one front-end.

    `identity`: this life's number. `policy`: routing, called `routing`. `ranks`: the ranks it balances over, None
    for all (hybrid mode: its node's; external mode: its own). `max_waiting`: requests that may wait for a slot, over
    all its ranks, None for no limit. `relay_sends`: whether other front-ends balance over the same ranks
    and are told of this one's sends. `late_binding`: whether requests wait in the coordinator's queue where it has one
    (for LeastLoad alone: ValueError). `resumes`: whether the engine goes on with an answer that another rank has begun.
    `most_losses`: ranks that a request may lose, and no token is made in between, before it is refused as what kills
    them. `hold_s`: how long requests wait for ranks while there is none. `together`: whether all ranks end with one.
    `without`: rules (`rules.py`) left out, to show what breaks.
    """

    def __init__(
        self, identity: int, policy: Policy, *, ranks: frozenset[int] | None = None, max_waiting: int | None = None,
        relay_sends: bool = False, lockstep: bool = False, routing: str = "", late_binding: bool = False,
        resumes: bool = False, node: int = 0, most_losses: int = MOST_LOSSES, hold_s: float = HOLD_S,
        together: bool = False, without: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        if late_binding and not isinstance(policy, LeastLoad):
            raise ValueError(f"{type(policy).__name__} chooses the rank itself: its requests cannot wait for any")
        self.identity = identity
        self.lockstep = lockstep
        self.missing: list[int] = []
        self.stalls: list[messages.Stall] = []
        self._router = Router(policy, routing or type(policy).__name__)
        self._inflight = InFlightRequests(
            identity, self._router, relay_sends=relay_sends or late_binding, lockstep=lockstep
        )
        self._late_binding = late_binding
        self._binding = Binding(identity, late_binding, checked(without))
        self._calls = FrontendCalls(identity)
        self._placement = Placement(self._router, self._inflight, self._binding, self._calls, max_waiting, hold_s)
        self._failover = Failover(
            self._inflight,
            self._router,
            self._calls,
            resumes=resumes,
            most_losses=most_losses,
            hold_s=hold_s,
            together=together,
        )
        self._engine_calls = EngineCalls()
        self._scaling = FrontendScaling(identity, ranks, node)
        # Lives whose address was none: they are not tried again with every Members.
        self._unreachable: set[tuple[int, int]] = set()
        # Ranks whose connection has ended; and those whose step does not return.
        self._cut: set[int] = set()
        self.hung: set[int] = set()
        self._coordinator = NOBODY
        self._view_number = 0
        self._void = 0
        self.epoch = 0

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Take in one event; returns what to do, in order."""
        match event:
            case events.RankSaid(message):
                called = self._engine_calls.said(message) if self._engine_calls.open else []
                return [*called, *self._inflight.outputs(message, now)]
            case events.Submit():
                return self._placement.submit(event, now)
            case events.Abandon(requests):
                self._failover.drop(requests)
                return [*self._inflight.abandon(requests, now), *self._binding.drop(requests, now)]
            case events.CoordinatorSaid(messages.LoadView() as view):
                return self._on_view(view, now)
            case events.CoordinatorSaid(binding.Grants() as grants):
                return self._on_grants(grants, now)
            case events.CoordinatorSaid(messages.ControlAnswer() as answer):
                return self._calls.answered(answer)
            case events.Control() | events.Update():
                return self._calls.ask(event, now)
            case events.Scale():
                return self._scaling.ask(event, now)
            case events.CallRanks():
                lives = {rank: handle.incarnation for rank, handle in self._inflight.handles.items()}
                return self._engine_calls.ask(event, lives)
            case events.Again(ranks):
                return [events.ToCoordinator(Revive(self.identity, list(ranks)))]
            case events.Unsent(request):
                return self._inflight.unsent(request, now)
            case events.ControlGivenUp(call):
                self._calls.give_up(call)
                self._scaling.give_up(call)
                self._engine_calls.give_up(call)
                return []
            case events.CoordinatorSaid(messages.Members() as members):
                return self._on_members(members, now)
            case events.LinkFailed(rank):
                handle = self._inflight.handles[rank]
                self._unreachable.add((rank, handle.incarnation))
                moved = self._failover.move(self._inflight.lose(handle), now, "it could not be reached")
                return [*moved, *self._placement.end_waiting(now), *self._bind_alone(now)]
            case events.LinkDown(rank):
                self._cut.add(rank)
                moved = self._failover.move(self._inflight.put_down(rank), now, "its connection ended")
                return [*self._engine_calls.lost(rank), *moved, *self._placement.end_waiting(now)]
            case events.LinkUp(rank):
                self._cut.discard(rank)
                put_up = self._put_up(rank)
                return [*put_up, *self._failover.settle(now), *self._placement.settle(now)]
            case events.Connected():
                return [self._hello()]
            case events.Tick():
                return self._on_tick(now)
        raise TypeError(f"front-end: {type(event).__name__} is not an event of this machine")

    @property
    def deadline(self) -> float:
        """When the next Tick is due, at the latest."""
        calls = (self._calls.deadline, self._scaling.deadline)
        return min(self._placement.deadline, self._failover.deadline, *calls)

    # What the explorer asks, for which time is a choice -----------------------------------------

    INCIDENTAL = frozenset({"_void", "_view_number", "epoch"})
    """Attributes that nothing depends on which this machine does later, or only whether the next number is higher."""

    def timers(self) -> list[str]:
        """The timers that are set, of what waits for the coordinator."""
        return self._binding.timers()

    def expire(self, timer: str, now: float) -> None:
        """Let one of them be due at the next Tick, whatever its time was."""
        self._binding.expire(timer, now)

    @property
    def next_view(self) -> int:
        """The least number that a view must have to be news."""
        return self._view_number + 1

    # What the machine knows ---------------------------------------------------------------------

    @property
    def wave(self) -> int:
        """The wave that is believed current."""
        return self._inflight.wave

    @property
    def running(self) -> bool:
        return self._inflight.running

    @property
    def moved(self) -> int:
        """Requests that have lost their ranks and gone on at others, so far."""
        return self._inflight.moved

    @property
    def coordinator(self) -> int:
        """The one that was heard last: its identity, or NOBODY."""
        return self._coordinator

    @property
    def suspension(self) -> messages.SuspensionState:
        return self._calls.suspension

    @property
    def weights(self) -> Weights | None:
        """Which weights the ranks have; None where nobody has brought any."""
        return self._calls.weights

    @property
    def scaling(self) -> messages.Scaling | None:
        """How many ranks there are, or are to be; None where no coordinator has been heard."""
        return self._scaling.state

    @property
    def ranks(self) -> frozenset[int] | None:
        """The ranks that it balances over, None for all."""
        return self._scaling.ranks

    def ready_ranks(self) -> list[int]:
        return sorted(self._inflight.handles)

    def lives(self) -> dict[int, int]:
        """The life of each ready rank."""
        return {rank: handle.incarnation for rank, handle in self._inflight.handles.items()}

    def in_flight(self) -> int:
        """Requests sent and not finished."""
        return len(self._inflight) + len(self._failover)

    def believed(self, rank: int) -> Load:
        """What the front-end believes the rank has: its report plus this front-end's unreported sends."""
        return next(handle for handle in self._inflight.known() if handle.rank == rank).believed()

    def waiting(self) -> int:
        """Requests believed to wait for a slot: at this front-end's ranks, and before them."""
        return self._placement.waiting()

    def waiting_for_grant(self) -> list[int]:
        return list(self._binding.waiting_for_grant)

    def queued(self) -> int:
        """Requests that wait in the coordinator's queue, this front-end's and the others'."""
        return self._binding.queued

    def held_of(self) -> dict[int, int]:
        """By tenant, how many of this front-end's requests wait before all ranks."""
        return {tenant: one.count for tenant, one in self._binding.tenants.items()}

    def given(self) -> dict[int, int]:
        """By rank, how many requests all front-ends may send there by themselves (credits)."""
        found: dict[int, int] = {}
        for share in (share for shares in self._binding.given for share in shares.shares):
            found[share.rank] = found.get(share.rank, 0) + share.requests
        return found

    def loads(self) -> list[dict[str, object]]:
        """Every rank's believed load, by the names of `Load`, and what is this front-end's own of it."""
        hung = {stall.rank: {"hangs_s": round(stall.seconds, 1)} for stall in self.stalls if stall.hangs}
        return [
            {"rank": handle.rank, **msgspec.structs.asdict(handle.believed()), "in_flight": len(handle.in_flight),
             **hung.get(handle.rank, {})}
            for handle in sorted(self._inflight.known(), key=lambda handle: handle.rank)
            if handle.rank not in self._inflight.down or handle.rank in hung
        ]  # fmt: skip

    def statistics(self) -> dict[str, object]:
        return {
            "coordinator": self._coordinator,
            "wave": self.wave,
            "running": self.running,
            "ready": self.ready_ranks(),
            "missing": self.missing,
            "stalls": [describe(stall) for stall in self.stalls],
            "suspension": {
                name: value for name, value in msgspec.structs.asdict(self.suspension).items() if name != "weights"
            },
            "weights": None if self.weights is None else msgspec.structs.asdict(self.weights),
            "scaling": None if self.scaling is None else in_words(self.scaling),
            "in_flight": self.in_flight(),
            "moved": self._inflight.moved,
            "waiting": self.waiting(),
            "held": len(self.waiting_for_grant()),
            "queued": self.queued(),
            "void_messages": self._void + self._inflight.void,
        }

    # The coordinator ----------------------------------------------------------------------------

    def _on_members(self, message: messages.Members, now: float) -> list[events.Effect]:
        effects = self._coordinator_is(message.coordinator, now)
        effects += self._learn_scaling(message, now)
        self._wave_is(message.wave, message.running)
        self.stalls, self.epoch = message.stalls, message.epoch
        scaling, all_inflight = self._scaling, self._inflight
        self.missing = [rank for rank in message.missing if scaling.serves(rank)]
        members = {member.rank: member for member in message.members if scaling.serves(member.rank)}
        lost: list[InFlight] = []
        for handle in all_inflight.known():
            rank, member = handle.rank, members.get(handle.rank)
            # A coordinator that has just come back does not know all ranks yet, so a rank that it does
            # not name is not lost: only a new life, or its word that this one has ended, ends a link.
            ended = (rank, handle.incarnation) in message.ended or scaling.over(rank)
            if ended or (member is not None and member.incarnation != handle.incarnation):
                effects.append(events.Disconnect(rank))
                lost += all_inflight.lose(handle)
        # Once all that have ended are known: none of them is to get what another one had.
        effects += self._failover.move(lost, now, "it has ended")
        connected = {handle.rank for handle in all_inflight.known()}
        for rank, member in members.items():
            wanted = rank not in connected and scaling.takes_new(rank)
            if wanted and (rank, member.incarnation) not in self._unreachable:
                self._cut.discard(rank)
                all_inflight.join(rank, member.incarnation)
                effects.append(events.Connect(member))
        effects += self._learn_hung(now)
        return [*effects, *self._failover.settle(now), *self._placement.settle(now), *scaling.served()]

    def _learn_hung(self, now: float) -> list[events.Effect]:
        """Nothing goes to a rank that hangs, and what can go on elsewhere leaves it."""
        before = self.hung
        self.hung = {stall.rank for stall in self.stalls if stall.hangs}
        effects: list[events.Effect] = []
        for rank in sorted(before - self.hung):
            effects += self._put_up(rank)
        # A rank that has come anew is up, whatever was before.
        fresh = [rank for rank in sorted(self.hung) if rank not in before or rank in self._inflight.handles]
        lost = [one for rank in fresh for one in self._inflight.put_down(rank, self._failover.stays)]
        return [*effects, *self._failover.move(lost, now, "it hangs in a step"), *self._placement.end_waiting(now)]

    def _put_up(self, rank: int) -> list[events.Effect]:
        """One of the things that kept a rank down is over."""
        if rank in self._cut or rank in self.hung:
            return []
        if rank in self._inflight.down:
            self._failover.acquit(rank, self._inflight.down[rank].incarnation)
        effects = self._inflight.put_up(rank)
        self._let_leave()
        return effects

    def _learn_scaling(self, message: messages.Members, now: float) -> list[events.Effect]:
        before = self._scaling.ranks
        news = self._scaling.learn(message.scaling, message.missing)
        self._let_leave()
        if not news:
            return []
        # In another queue than before, the coordinator knows of nothing that waits here.
        asks = self._late_binding and before != self._scaling.ranks and self._binding.waiting_for_grant
        return [self._hello(), *([self._binding.ask_again(now)] if asks else [])]

    def _let_leave(self) -> None:
        for rank in list(self._inflight.handles):
            if not self._scaling.takes_new(rank):
                self._inflight.let_leave(rank)

    def _on_view(self, view: messages.LoadView, now: float) -> list[events.Effect]:
        effects = self._coordinator_is(view.coordinator, now)
        if view.number <= self._view_number:
            self._void += 1
            return effects
        self._view_number = view.number
        self._wave_is(view.wave, view.running)
        self._inflight.take_view(view)
        forgotten = self._binding.take_view(view)
        current, served = self._calls.learn(view.suspension)
        if (forgotten or not current) and not effects:
            effects.append(self._hello())
        return [*effects, *served, *self._placement.settle(now)]

    def _on_grants(self, message: binding.Grants, now: float) -> list[events.Effect]:
        if message.coordinator != self._coordinator:
            self._void += 1
            return []
        return self._placement.grants(message, now)

    def _on_tick(self, now: float) -> list[events.Effect]:
        repeated = [*self._calls.repeat(now), *self._scaling.repeat(now)]
        over = [*self._failover.settle(now), *self._placement.end_waiting(now)]
        if over:
            return [*repeated, *over]
        if self._binding.away(now):
            return [*repeated, *self._placement.settle(now)]
        asks = now >= self._binding.deadline
        return [*repeated, *([self._hello(), self._binding.ask_again(now)] if asks else [])]

    def _bind_alone(self, now: float) -> list[events.Effect]:
        """The coordinator would go on granting a rank that cannot be reached from here: it is asked no more."""
        if not self._late_binding:
            return []
        self._late_binding = False
        return [self._hello(), *self._placement.stop(now)]

    def _hello(self) -> events.Effect:
        known, number = self.suspension, min(self.suspension.number, LARGEST_STAMP)
        ranks = sorted(self.ranks) if self._late_binding and self.ranks is not None else None
        about = (number, known.mode, self._late_binding, ranks, self._scaling.told, self._calls.weights)
        return events.ToCoordinator(messages.FrontendHello(messages.PROTOCOL_VERSION, self.identity, *about))

    def _coordinator_is(self, coordinator: int, now: float) -> list[events.Effect]:
        if coordinator == self._coordinator:
            return []
        first, self._coordinator = self._coordinator == NOBODY, coordinator
        self._view_number = 0
        asks = self._binding.coordinator_is_new(now)
        # A new coordinator does not know yet which front-ends there are, and what waits.
        hello = [] if first else [self._hello()]
        return [*hello, *([self._binding.ask_again(now)] if asks else [])]

    def _wave_is(self, wave: int, running: bool) -> None:
        if wave >= self.wave and plausible(wave, self.wave):
            self._inflight.wave, self._inflight.running = wave, running
