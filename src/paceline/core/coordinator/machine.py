"""The coordinator's machine: who is there, who is loaded, and whether the ranks run.

    effects = coordinator.handle(event, now)

Events are what sockets brought (already decoded) and the passing of time. After every call, arrange for
a `Tick` at `coordinator.deadline` at the latest. All state is soft: what is lost with the process comes
back from what ranks and front-ends say when they are asked, so there is nothing to save or restore.
"""

from __future__ import annotations

from collections.abc import Set

from paceline.core.binding import Ask, ReturnShares, SendNotice, Withdraw
from paceline.core.coordinator import events
from paceline.core.coordinator.epoch import Epochs, Position, Stalls, describe
from paceline.core.coordinator.load_table import STEP_WAIT_S, LoadTable, Publisher, SnapshotHeader
from paceline.core.coordinator.membership import PATIENCE_S, Membership, RollCall
from paceline.core.coordinator.pause import Pause
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.coordinator.wave import GroupWave
from paceline.core.dispatch.dispatcher import Dispatcher
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    ControlRequest,
    Form,
    FromFrontend,
    FromRank,
    FrontendHello,
    FrontendLeaving,
    Identify,
    KvDelta,
    NodeHello,
    RankFailed,
    RankHello,
    RankLeaving,
    RankReport,
    ScaleRequest,
    Scaling,
    StallReport,
    StartWave,
    WakeNotice,
    WaveComplete,
)
from paceline.core.requests import Revive, StartAgain, UpdateWeights
from paceline.core.rules import checked


class Coordinator:
    """One life of the coordinator: the parts, who is forgotten in all of them, and what each event does to them.

    `engine_count`: ranks in the deployment. `identity`: this life's own number. `interval_s`: least time between two
    load views; 0 publishes every change. `step_wait_s`: how much earlier one goes out in lockstep where all ranks have
    reported one step, and how long a late one waits for that. `lockstep`: whether the ranks run in waves.
    `publish_loads`: False in external mode, where views carry the wave and no loads. `fresh`: no other came before it.
    `presence`: all ranks show theirs. `most_ranks`: what the deployment may be scaled to, None for four times the ranks
    that it has and at least 16. `without`: rules (`rules.py`) left out, to show what breaks.
    """

    def __init__(
        self, engine_count: int, identity: int, interval_s: float, *, lockstep: bool = True, publish_loads: bool = True,
        fresh: bool = True, presence: bool = False, step_wait_s: float = STEP_WAIT_S,
        most_ranks: int | None = None, without: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.identity = identity
        self.lockstep = lockstep
        self._membership = Membership(engine_count, presence=presence)
        self._without = checked(without)
        self._group = GroupWave(self._without)
        patience_s = None if lockstep else PATIENCE_S
        self._roll_call = RollCall(engine_count, fresh=fresh, patience_s=patience_s, without=without)
        self._epochs = Epochs(engine_count)
        self._scaling = DeploymentScaling(engine_count, most_ranks, self._without)
        self._stalls = Stalls()
        self._pause = Pause(identity, lockstep, self._without)
        self._load_table = LoadTable()
        self.dispatcher = Dispatcher(identity, self._without)
        wait_s = step_wait_s if lockstep else None
        self._publisher = Publisher(identity, interval_s, with_loads=publish_loads, step_wait_s=wait_s)
        self._dropped = 0
        self._frontends: set[int] = set()

    @property
    def size(self) -> int:
        return self._membership.size

    @property
    def deadline(self) -> float:
        """When the next Tick is due, at the latest."""
        waking, suspending, forming = self._group.wake_due, self._pause.due, self._epochs.due
        queue = (self.dispatcher.due, self.dispatcher.held.due)
        timers = (waking, suspending, forming, self._roll_call.due, *queue, self._scaling.due)
        return min(self._publisher.deadline, *(due for due in timers if due is not None), float("inf"))

    # What the explorer asks, for which time is a choice -----------------------------------------

    INCIDENTAL = frozenset({"_dropped"})
    """Attributes that nothing depends on which this machine does later: counters for people, here and in its parts."""

    def timers(self) -> dict[str, list[int]]:
        """The timers that are set, each with the ranks whose word it waits for."""
        found = {**self._epochs.timers(), **self._scaling.timers()}
        if self._group.wake_due is not None:
            found["wake"] = self._group.lagging()
        if self._roll_call.due is not None:
            found["question"] = self._unheard()
        if self._roll_call.impatient:
            found["acquaintance"] = self._membership.missing()
        if self._pause.due is not None:
            found["suspension"] = self._pause.header.waiting_for
        if self.dispatcher.due is not None:
            found["queue"] = []
        return found

    def expire(self, timer: str, now: float) -> None:
        """Let one of them be due at the next Tick, whatever its time was."""
        match timer:
            case "wake":
                self._group.expire(now)
            case "question" | "acquaintance":
                self._roll_call.expire(now, patience=timer == "acquaintance")
            case "suspension":
                self._pause.expire(now)
            case "queue":
                self.dispatcher.expire(now)
            case "scaling" | "scaling-late" | "scaling-away":
                self._scaling.expire(timer, now)
            case _:
                self._epochs.expire(timer, now)

    def moment_passes(self) -> None:
        """Nothing is put off any more because the same was done a moment ago."""
        self._roll_call.moment_passes(asks=bool(self._unheard()))

    def epoch(self) -> tuple[int, dict[int, int]]:
        """The epoch that is, or is to be, formed, and by rank the lives that it is formed of."""
        return self._epochs.number, self._epochs.members()

    @property
    def scaling(self) -> Scaling:
        return self._scaling.state

    def lives(self) -> dict[int, int]:
        """By rank, the lives that are ready."""
        return self._membership.lives()

    def is_retired(self, rank: int, incarnation: int) -> bool:
        """Whether this life of a rank is known to be over."""
        return self._membership.is_retired(rank, incarnation)

    def acknowledged(self, rank: int) -> tuple[int, bool] | None:
        """The number of the pause that a rank last said it knows, and whether it holds."""
        return self._pause.acknowledged(rank)

    # --------------------------------------------------------------------------------------------

    def request_counts(self) -> list[list[int]]:
        """[waiting, running] of each rank in order, as it last reported; zeros where it has not."""
        last = (self._load_table.reports.get(rank) for rank in range(self.size))
        return [[report.load.waiting, report.load.running] if report is not None else [0, 0] for report in last]

    def statistics(self) -> dict[str, object]:
        return {
            "wave": self._group.wave,
            "running": self._group.running,
            "ready": [member.rank for member in self._membership.members()],
            "missing": self._membership.missing(),
            "lagging": self._group.lagging(),
            "stalls": [describe(stall) for stall in self._stalls.found],
            "generation": self._epochs.number,
            "suspension": self._pause.header.number,
            "suspension_settled": self._pause.header.settled,
            "front_ends": len(self._frontends),
            "queued": self.dispatcher.queued,
            "views_published": self._publisher.views,
            "void_messages": self._dropped,
        }

    def _forget_rank(self, rank: int, now: float) -> None:
        """What the rank last said of loads, waves, groups and pauses does not hold any more."""
        self._load_table.forget_rank(rank)
        self._group.forget(rank, now)
        self._epochs.forget(rank, now)
        self._pause.forget(rank)
        self._stalls.forget(rank)
        self._hung_changed()
        self._scaling.lost(rank)
        self.dispatcher.lost(rank)
        self.dispatcher.held.forget(rank)
        self._pause_changed(now)
        self._publisher.members_changed(now)

    def _hung_changed(self) -> None:
        """Nothing is granted to ranks that hang."""
        before = self._membership.hung
        self._membership.hung = frozenset(stall.rank for stall in self._stalls.found if stall.hangs)
        for rank in before ^ self._membership.hung:
            self.dispatcher.lost(rank)
            self.dispatcher.mark(rank)

    def _forget_frontend(self, frontend: int, now: float) -> None:
        self._pause.served.forget_frontend(frontend)
        self._scaling.forget_frontend(frontend)
        self._frontends.discard(frontend)
        self._load_table.forget_frontend(frontend)
        self.dispatcher.forget_frontend(frontend)
        self._publisher.loads_changed(now)

    def _pause_changed(self, now: float) -> None:
        if self._pause.settle(self._membership, self._epochs, now):
            self._publisher.changed(now)
        if not self._pause.pause.over:
            self._group.no_notice(now)

    def _unheard(self) -> list[int]:
        """Ranks that are to be asked who they are."""
        return [*self._membership.missing(), *self._epochs.silent(), *self._late()]

    def _late(self) -> list[int]:
        """Ranks that were told, with their epoch, a wave that the others have finished meanwhile."""
        return self._group.late() if self._epochs.number else []

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Take in one event; returns what to send, in order."""
        effects: list[events.Effect] = []
        self._roll_call.acquainted(now)
        match event:
            case events.RankSaid(message):
                self._on_rank(message, now, effects)
            case events.RanksReported(reports):
                for report in reports:
                    # A view that waits for all ranks to be at one step goes out before the first is a step ahead.
                    if self._publisher.ripe(self._load_table, self._membership, now):
                        self._say_what_is_due(now, effects)
                    self._on_rank(report, now, effects)
            case events.FrontendSaid(Revive() as revive):
                effects.append(
                    events.Note(f"asked to start again: rank {', '.join(map(str, revive.ranks))}", urgent=True)
                )
                effects.append(events.ToRanks(StartAgain(revive.ranks)))
            case events.FrontendSaid(message):
                self._on_frontend(message, now)
            case events.FrontendsSaid(messages):
                for message in messages:
                    self._on_frontend(message, now)
            case events.RankSubscribed(rank, incarnation):
                self._membership.connected(rank, incarnation)
                self._roll_call.wanted(now)
            case events.RankGone(rank, incarnation):
                if self._membership.lose(rank, incarnation, now):
                    self._forget_rank(rank, now)
                    # Whoever else has claimed its number is asked again.
                    self._roll_call.wanted(now)
                    effects.append(events.Note(f"rank {rank} is lost: its connection has ended", True, rank))
            case events.NodeGone(node):
                self._scaling.forget_node(node)
            case events.FrontendSubscribed():
                self._publisher.members_changed(now)
            case events.FrontendGone(frontend):
                self._forget_frontend(frontend, now)
        self._say_what_is_due(now, effects)
        return effects

    # Ranks ------------------------------------------------------------------------------------

    def _on_rank(self, message: FromRank, now: float, effects: list[events.Effect]) -> None:
        match message:
            case RankHello():
                self._on_hello(message, now, effects)
            case NodeHello() | RankFailed():
                self._scaling.said(message, now)
            # A rank that leaves may be lost by now: the end of its connection comes on another socket.
            case RankLeaving(rank, incarnation) if self._membership.leave(rank, incarnation):
                self._forget_rank(rank, now)
                effects.append(events.Note(f"rank {rank} has left", rank=rank))
            case _ if not self._membership.is_current(message.rank, message.incarnation):
                self._dropped += 1
                if not self._membership.is_retired(message.rank, message.incarnation):
                    self._roll_call.wanted(now)
            case RankReport() if self._load_table.report(message):
                if self.lockstep:
                    self._group.observe(message.rank, message.wave, message.running, now)
                self.dispatcher.reported(message)
                self._publisher.loads_changed(now)
            case StartWave(rank, _, wave) if self.lockstep:
                self._group.started(rank, wave, now)
            case WaveComplete(rank, _, wave) if self.lockstep:
                self._group.observe(rank, wave + 1, False, now)
            case KvDelta():
                self.dispatcher.kv(message, now)
            case StallReport():
                self._publisher.members_changed(now)
                if self._stalls.report(message):
                    self._hung_changed()
                    effects += [events.Note(line, urgent=True) for line in self._stalls.lines()]
            case _:
                self._dropped += 1

    def _on_hello(self, hello: RankHello, now: float, effects: list[events.Effect]) -> None:
        if hello.rank >= self._membership.limit or self._membership.held(hello):
            self._dropped += 1
            if (refusal := self._membership.refusal(hello, now)) is not None:
                # One that was just scaled away may say hello once more.
                leaves = (hello.rank, hello.incarnation) in self._membership.ended()
                effects += [events.ToRanks(refusal[0]), events.Note(refusal[1], not leaves, hello.rank, leaves)]
            return
        was_current = self._membership.is_current(hello.rank, hello.incarnation)
        was_ready = was_current and self._membership.is_ready(hello.rank)
        back = self._membership.served_before(hello.rank)
        if not self._membership.hello(hello.rank, hello.incarnation, hello.address, hello.ready):
            self._dropped += 1
            return
        if not was_current:
            self._forget_rank(hello.rank, now)
        if hello.rank >= self._membership.size:
            # It has loaded beside the others, and becomes part of the deployment when all that are to come have.
            self._scaling.hello(hello)
            return
        self._roll_call.heard(hello.rank)
        if self.lockstep:
            self._group.told(hello.wave, now)
        grouped = self.lockstep and bool(hello.group_address)
        if grouped:
            self._epochs.heard(hello.rank, Position.of(hello), now)
        if self._membership.is_ready(hello.rank):
            if self.lockstep:
                self._group.observe(hello.rank, hello.wave, hello.running, now)
            self._pause.hello(hello, now)
            self._pause_changed(now)
            self.dispatcher.mark(hello.rank)
            self.dispatcher.held.hello(hello.rank, hello.incarnation, hello.kv, now)
            if not was_ready:
                ready = f"rank {hello.rank} is back" if back else f"rank {hello.rank} is ready, at {hello.address}"
                # Those of this node its supervisor tells of, once they are all ready.
                routine = not back and hello.address.startswith("ipc:")
                effects.append(events.Note(ready, rank=hello.rank, routine=routine))
                self._publisher.members_changed(now)
        asks = hello.rank in self._late() if self._membership.is_ready(hello.rank) else not grouped
        if asks and self._roll_call.admits(hello.rank, hello.incarnation, now):
            admit = Admit(hello.rank, hello.incarnation, self._group.joiners_wave, self._pause.told())
            effects.append(events.ToRanks(admit))

    # Front-ends -------------------------------------------------------------------------------

    def _on_frontend(self, message: FromFrontend, now: float) -> None:
        match message:
            case SendNotice():
                self._on_sends(message, now)
            case Ask() | Withdraw() | ReturnShares():
                self.dispatcher.said(message, now)
            case FrontendHello(_, frontend, suspension, mode):
                self._frontends.add(frontend)
                self._scaling.frontend(frontend, message.scaling, now)
                self.dispatcher.hello(message, (member.rank for member in self._membership.members()))
                self._pause.known(suspension, mode, now)
                self._pause.known_weights(message.weights, now)
                self._pause_changed(now)
                self._publisher.members_changed(now)
            case WakeNotice(_, rank, wave):
                # While the deployment is paused nobody is woken for new work: each rank holds its own.
                if self.lockstep and self._pause.pause.over and self._roll_call.acquainted(now):
                    self._group.noticed(rank, wave, now)
            case ScaleRequest() if self._roll_call.acquainted(now):
                self._scaling.ask(message, now)
                self._publisher.members_changed(now)
            case UpdateWeights(known=weights):
                self._pause.known_weights(weights, now)
                self._pause_changed(now)
                self._pause.request(message)
            case ControlRequest(known=number, mode=mode):
                self._pause.known(number, mode, now)
                self._pause_changed(now)
                self._pause.request(message)
            case FrontendLeaving(frontend):
                self._forget_frontend(frontend, now)

    def _on_sends(self, notice: SendNotice, now: float) -> None:
        self._load_table.heard_of(notice.frontend, notice.told)
        for send in notice.sends:
            current = self._membership.is_current(send.rank, send.incarnation)
            self.dispatcher.sent(notice.frontend, send, current and self._load_table.sent(notice.frontend, send))
            if current:
                self._publisher.loads_changed(now)

    # What is due ------------------------------------------------------------------------------

    def _say_what_is_due(self, now: float, effects: list[events.Effect]) -> None:
        self._scale(now, effects)
        if self._pause.asked and self._roll_call.acquainted(now):
            effects += map(events.ToFrontends, self._pause.answers(now))
            self._pause_changed(now)
        self._tell_ranks(now, effects)
        free = self._pause.pause.over
        if (grants := self.dispatcher.grants(self._load_table, self._membership, free, now)) is not None:
            effects.append(events.ToFrontends(grants))
        if self.dispatcher.emptied():
            # Nobody waits any more: there are shares again.
            self._publisher.loads_changed(now)
        group, pause = self._group, self._pause.header
        header = SnapshotHeader(group.wave, group.running, pause, free, self._scaling.state, self._epochs.number)
        effects += self._publisher.publish(
            header, self._load_table, self._membership, self._stalls.found, self.dispatcher, now
        )

    def _scale(self, now: float, effects: list[events.Effect]) -> None:
        """Go on with a change of the size, and bring everything in line with it."""
        scaling, members = self._scaling, self._membership
        if scaling.state.under_way and self._roll_call.acquainted(now):
            scaling.advance(self._frontends, lambda rank: self._load_table.idle(rank, members.ready_life(rank)), now)
        scaling.find_homes(now)
        if scaling.changed:
            for rank in scaling.bring_in_line(members, self._epochs, self._roll_call, self.dispatcher, now):
                self._forget_rank(rank, now)
            for hello in scaling.arrivals():
                self._on_hello(hello, now, effects)
            self._pause_changed(now)
            self._publisher.members_changed(now)
            effects.append(events.Note(scaling.line()))
        if (told := scaling.message(now)) is not None:
            effects.append(events.ToRanks(told))

    def _tell_ranks(self, now: float, effects: list[events.Effect]) -> None:
        formed = self._epochs.form(now)
        for rank in self._epochs.absent:
            # Nothing is to be learned from who is not there: nobody waits for its word, or runs for its sake.
            self._roll_call.heard(rank)
            self._group.forget(rank, now)
            self._pause_changed(now)
        if formed is not None:
            effects.append(events.ToRanks(Form(formed[0], self._group.joiners_wave, formed[1], self._pause.told())))
        if self._epochs.asks or (self._roll_call.due is None and self._late()):
            self._epochs.asks = False
            self._roll_call.wanted(now)
        if self.dispatcher.held.due is not None:
            effects += map(events.ToRanks, self.dispatcher.held.asks(now))
        if self._roll_call.ask(now, self._unheard):
            effects.append(events.ToRanks(Identify(PROTOCOL_VERSION, self.identity)))
        if (wake := self._group.wake(now)) is not None:
            effects.append(events.ToRanks(wake))
            if self._pause.pause.paused:
                self._pause.woke(now)
                self._pause.settle(self._membership, self._epochs, now)
        if self._pause.late(now):
            self._pause_changed(now)
        if (suspension := self._pause.message(now)) is not None:
            effects.append(events.ToRanks(suspension))
