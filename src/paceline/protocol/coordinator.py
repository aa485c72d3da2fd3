"""The coordinator's machine: who is there, who is loaded, and whether the ranks run.

    effects = coordinator.handle(event, now)

Events are what sockets brought (already decoded) and the passing of time. After every call, arrange for
a `Tick` at `coordinator.deadline` at the latest. All state is soft: what is lost with the process comes
back from what ranks and front-ends say when they are asked, so there is nothing to save or restore.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from paceline.protocol.binding.brokerage import Brokerage
from paceline.protocol.coordination.board import STEP_WAIT_S, Board
from paceline.protocol.coordination.calls import Calls
from paceline.protocol.coordination.generation import Generations, Position
from paceline.protocol.coordination.introductions import PATIENCE_S, Introductions
from paceline.protocol.coordination.membership import Membership
from paceline.protocol.coordination.publishing import Publisher, Shown
from paceline.protocol.coordination.stalls import Stalls, describe
from paceline.protocol.coordination.suspension import GroupSuspension
from paceline.protocol.coordination.wave import GroupWave
from paceline.protocol.coordinator_events import (
    Effect,
    Event,
    FrontEndGone,
    FrontEndSaid,
    FrontEndsSaid,
    FrontEndSubscribed,
    Note,
    RankGone,
    RankSaid,
    RanksReported,
    RankSubscribed,
    Tick as Tick,
    ToFrontEnds,
    ToRanks,
)
from paceline.protocol.messages import (
    PROTOCOL_VERSION,
    Admit,
    Ask,
    ControlAnswer,
    ControlRequest,
    Form,
    FromFrontEnd,
    FromRank,
    FrontEndHello,
    FrontEndLeaving,
    Identify,
    RankHello,
    RankLeaving,
    RankReport,
    ReturnShares,
    SendNotice,
    StallReport,
    StartWave,
    SuspensionState,
    WakeNotice,
    WaveComplete,
    Withdraw,
)
from paceline.protocol.rules import checked


class Coordinator:
    """One life of the coordinator.

    `engine_count`: ranks in the deployment. `identity`: this life's own number. `interval_s`: least time between two
    load views; 0 publishes every change. `lockstep`: whether the ranks run in waves. `publish_loads`: False in external
    mode, where views carry the wave and no loads. `fresh`: no other came before it. `step_wait_s`: how long a view
    waits, in lockstep, for all ranks to report one step. `without`: rules (`rules.py`) left out, to show what breaks.
    """

    def __init__(
        self, engine_count: int, identity: int, interval_s: float, *, lockstep: bool = True, publish_loads: bool = True,
        fresh: bool = True, step_wait_s: float = STEP_WAIT_S, without: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.identity = identity
        self.lockstep = lockstep
        self._membership = Membership(engine_count)
        self._without = checked(without)
        self._group = GroupWave(self._without)
        patience_s = None if lockstep else PATIENCE_S
        self._introductions = Introductions(engine_count, fresh=fresh, patience_s=patience_s, without=without)
        self._generations = Generations(engine_count)
        self._stalls = Stalls()
        self._suspension = GroupSuspension(self._without)
        self._suspension_state = SuspensionState()
        self._calls = Calls()
        self._board = Board()
        self.broker = Brokerage(identity, self._without, lockstep)
        one_step = step_wait_s if lockstep else None
        self._publisher = Publisher(identity, interval_s, with_loads=publish_loads, step_wait_s=one_step)
        self._dropped = 0
        self._front_ends: set[int] = set()

    @property
    def deadline(self) -> float:
        """When the next Tick is due, at the latest."""
        waking, suspending, forming = self._group.wake_due, self._suspension.due, self._generations.due
        timers = (waking, suspending, forming, self._introductions.due, self.broker.due)
        return min(self._publisher.deadline, *(due for due in timers if due is not None), float("inf"))

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to send, in order."""
        effects: list[Effect] = []
        self._introductions.acquainted(now)
        match event:
            case RankSaid(message):
                self._on_rank(message, now, effects)
            case RanksReported(reports):
                for report in reports:
                    # A view that waits for all ranks to be at one step goes out before the first is a step ahead.
                    if self._publisher.ripe(self._board, self._membership, now):
                        self._say_what_is_due(now, effects)
                    self._on_rank(report, now, effects)
            case FrontEndSaid(message):
                self._on_front_end(message, now)
            case FrontEndsSaid(messages):
                for message in messages:
                    self._on_front_end(message, now)
            case RankSubscribed(rank, incarnation):
                if rank >= 0:
                    self._membership.connected(rank, incarnation)
                self._introductions.wanted(now)
            case RankGone(rank, incarnation):
                if self._membership.lose(rank, incarnation, now):
                    self._forget_rank(rank, now)
                    effects.append(Note(f"the connection of rank {rank} has ended"))
            case FrontEndSubscribed():
                self._publisher.members_changed(now)
            case FrontEndGone(front_end):
                self._forget_front_end(front_end, now)
        self._say_what_is_due(now, effects)
        return effects

    def statistics(self) -> dict[str, object]:
        """What this machine knows, for `/health`, metrics and tests."""
        return {
            "wave": self._group.wave,
            "running": self._group.running,
            "ready": [member.rank for member in self._membership.members()],
            "missing": self._membership.missing(),
            "lagging": self._group.lagging(),
            "stalls": [describe(stall) for stall in self._stalls.found],
            "generation": self._generations.number,
            "suspension": self._suspension_state.number,
            "suspension_settled": self._suspension_state.settled,
            "front_ends": len(self._front_ends),
            "queued": self.broker.queued,
            "views_published": self._publisher.views,
            "void_messages": self._dropped,
        }

    # Ranks ------------------------------------------------------------------------------------

    def _on_rank(self, message: FromRank, now: float, effects: list[Effect]) -> None:
        if isinstance(message, RankHello):
            self._on_hello(message, now, effects)
            return
        # A rank that leaves may be lost by now: the end of its connection comes on another socket.
        if isinstance(message, RankLeaving) and self._membership.leave(message.rank, message.incarnation):
            self._forget_rank(message.rank, now)
            effects.append(Note(f"rank {message.rank} has left"))
            return
        if not self._membership.is_current(message.rank, message.incarnation):
            self._dropped += 1
            if not self._membership.is_retired(message.rank, message.incarnation):
                self._introductions.wanted(now)
            return
        match message:
            case RankReport():
                self._on_report(message, now)
            case StartWave(rank, _, wave) if self.lockstep:
                self._group.started(rank, wave, now)
            case WaveComplete(rank, _, wave) if self.lockstep:
                self._group.observe(rank, wave + 1, False, now)
            case StallReport():
                self._publisher.members_changed(now)
                if self._stalls.report(message):
                    effects += [Note(line, urgent=True) for line in self._stalls.lines()]
            case _:
                self._dropped += 1

    def _on_hello(self, hello: RankHello, now: float, effects: list[Effect]) -> None:
        if hello.rank >= self._membership.size:
            self._dropped += 1
            effects.append(Note(f"rank {hello.rank} is not of this deployment of {self._membership.size}"))
            return
        was_current = self._membership.is_current(hello.rank, hello.incarnation)
        was_ready = was_current and self._membership.is_ready(hello.rank)
        if not self._membership.hello(hello.rank, hello.incarnation, hello.address, hello.ready):
            self._dropped += 1
            return
        if not was_current:
            self._forget_rank(hello.rank, now)
        self._introductions.heard(hello.rank)
        if self.lockstep:
            self._group.told(hello.wave, now)
        grouped = self.lockstep and bool(hello.group_address)
        if grouped:
            position = Position(hello.incarnation, hello.group_address, hello.generation, hello.told)
            self._generations.heard(hello.rank, position, now)
        if self._membership.is_ready(hello.rank):
            if self.lockstep:
                self._group.observe(hello.rank, hello.wave, hello.running, now)
            self._suspension.heard(hello.rank, hello.suspension, hello.mode, hello.held, now)
            self._suspension_changed(now)
            self.broker.mark(hello.rank)
            if not was_ready:
                effects.append(Note(f"rank {hello.rank} is ready"))
                self._publisher.members_changed(now)
        asks = hello.rank in self._late() if self._membership.is_ready(hello.rank) else not grouped
        if asks and self._introductions.admits(hello.rank, hello.incarnation, now):
            admit = Admit(hello.rank, hello.incarnation, self._joiners_wave(), self._suspension.told())
            effects.append(ToRanks(admit))

    def _on_report(self, report: RankReport, now: float) -> None:
        if not self._board.report(report):
            self._dropped += 1
            return
        if self.lockstep:
            self._group.observe(report.rank, report.wave, report.running, now)
        self.broker.reported(report)
        self._publisher.loads_changed(now)

    def _forget_rank(self, rank: int, now: float) -> None:
        self._board.forget_rank(rank)
        self._publisher.members_changed(now)
        # What it last said of waves, groups and suspensions does not hold any more.
        self._group.forget(rank, now)
        self._generations.forget(rank, now)
        self._suspension.forget(rank)
        self._stalls.forget(rank)
        self.broker.lost(rank)
        self._suspension_changed(now)

    def _unheard(self) -> list[int]:
        return [*self._membership.missing(), *self._generations.silent(), *self._late()]

    def _late(self) -> list[int]:
        """Ranks that were told, with their generation, a wave that the others have finished meanwhile."""
        return self._group.late() if self._generations.number else []

    def _joiners_wave(self) -> int:
        return 0 if "joiner-told-the-wave" in self._without else self._group.wave

    # Front-ends -------------------------------------------------------------------------------

    def _on_front_end(self, message: FromFrontEnd, now: float) -> None:
        match message:
            case SendNotice():
                self._on_sends(message, now)
            case Ask() | Withdraw() | ReturnShares():
                self.broker.said(message, now)
            case FrontEndHello(_, front_end, suspension, mode):
                self._front_ends.add(front_end)
                self.broker.hello(message, (member.rank for member in self._membership.members()))
                self._suspension.known(suspension, mode, now)
                self._suspension_changed(now)
                self._publisher.members_changed(now)
            case WakeNotice(_, rank, wave):
                # While the deployment is suspended nobody is woken for new work: each rank holds its own.
                if self.lockstep and self._suspension.standing.free and self._introductions.acquainted(now):
                    self._group.noticed(rank, wave, now)
            case ControlRequest():
                self._calls.request(message)
            case FrontEndLeaving(front_end):
                self._forget_front_end(front_end, now)

    def _on_sends(self, notice: SendNotice, now: float) -> None:
        self._board.heard_of(notice.front_end, notice.told)
        for send in notice.sends:
            current = self._membership.is_current(send.rank, send.incarnation)
            self.broker.sent(notice.front_end, send, current and self._board.sent(notice.front_end, send))
            if current:
                self._publisher.loads_changed(now)

    def _forget_front_end(self, front_end: int, now: float) -> None:
        self._calls.forget_front_end(front_end)
        self._front_ends.discard(front_end)
        self._board.forget_front_end(front_end)
        self.broker.forget_front_end(front_end)
        self._publisher.loads_changed(now)

    # Suspension -------------------------------------------------------------------------------

    def _expected(self, now: float) -> Iterable[int]:
        """The ranks that must agree: all that there should be, heard or not, but for those that the others go on
        without, who are told when they come.

        A rank that was told of no suspension when it joined must not step either.
        """
        gone = self._generations.absent if self.lockstep else self._membership.gone(now)
        return (rank for rank in range(self._membership.size) if rank not in gone)

    def _suspension_changed(self, now: float) -> None:
        self._suspension.advance(self._expected(now), now)
        if not self._suspension.standing.free:
            self._group.no_notice(now)
        before, self._suspension_state = self._suspension_state, self._suspension.state(self._expected(now))
        if self._suspension_state != before:
            self._publisher.changed(now)

    # What is due ------------------------------------------------------------------------------

    def _say_what_is_due(self, now: float, effects: list[Effect]) -> None:
        self._answer_calls(now, effects)
        self._tell_ranks(now, effects)
        free = self._suspension.standing.free
        grants = self.broker.grants(self._board, self._membership, free, now)
        if grants is not None:
            effects.append(ToFrontEnds(grants))
        if self.broker.emptied():
            # Nobody waits any more: there are shares again.
            self._publisher.loads_changed(now)
        shown = Shown(self._group.wave, self._group.running, self._suspension_state, free)
        effects += self._publisher.publish(shown, self._board, self._membership, self._stalls.found, self.broker, now)

    def _answer_calls(self, now: float, effects: list[Effect]) -> None:
        if not len(self._calls) or not self._introductions.acquainted(now):
            return
        answers = self._calls.serve(lambda action: self._suspension.ask(action, now), self._suspension.standing.number)
        self._suspension_changed(now)
        effects += [ToFrontEnds(ControlAnswer(self.identity, *answer)) for answer in answers]

    def _tell_ranks(self, now: float, effects: list[Effect]) -> None:
        formed = self._generations.form(now)
        for rank in self._generations.absent:
            # Nothing is to be learned from who is not there: nobody waits for its word, or runs for its sake.
            self._introductions.heard(rank)
            self._group.forget(rank, now)
            self._suspension_changed(now)
        if formed:
            effects.append(ToRanks(Form(formed[0], self._joiners_wave(), formed[1], self._suspension.told())))
        if self._generations.asks or (self._introductions.due is None and self._late()):
            self._generations.asks = False
            self._introductions.wanted(now)
        if self._introductions.ask(now, self._unheard):
            effects.append(ToRanks(Identify(PROTOCOL_VERSION, self.identity)))
        if (wake := self._group.wake(now)) is not None:
            effects.append(ToRanks(wake))
            if self._suspension.standing.suspended:
                self._suspension.woke(now)
                self._suspension_state = self._suspension.state(self._expected(now))
        suspension = self._suspension.message(now)
        if suspension is not None:
            effects.append(ToRanks(suspension))
