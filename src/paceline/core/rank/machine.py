"""A rank's machine: joining, taking requests in, running and pausing in waves, reporting load.

    effects = rank.handle(event, now)

The shell turns the wheel: it feeds what sockets brought, then a `Turn`, and does what the effects say. `Step` and
`DummyStep` are answered by `Stepped`, `Agree` by `Agreed`, `FormGroup` by `Formed`, each of them by
`EpochEnded` where a peer is gone. In lockstep all ranks of a wave take part in the same sequence of
collectives, so in a running wave every turn is a step, real or dummy, and every `sync_interval` steps, and on the
first, the ranks agree whether any has work left; when none has, all pause at that same step. While any has a prompt to
compute they agree after every step, on how many tokens of theirs all compute in the next (`prefill_quota.py`).

The wave number and the pause travel with the agreement: a rank that joined with an old number runs in the
group's wave from the first agreement on, and where one rank knows of a pause, all stop at that step.
"""

from __future__ import annotations

from collections.abc import Set

from paceline.core import messages
from paceline.core.load import Load, plausible
from paceline.core.rank import events
from paceline.core.rank.events import Phase as Phase
from paceline.core.rank.hang import NO_LIMITS, Limits, StepWatch
from paceline.core.rank.kv import KvTeller
from paceline.core.rank.prefill_quota import OFF, RankQuota
from paceline.core.rank.reporting import LoadReporter
from paceline.core.rank.requests import RankRequests
from paceline.core.rank.weights import RankWeights
from paceline.core.requests import AbortRequests, AddRequest, CallEngine, Output, Outputs
from paceline.core.rules import checked
from paceline.core.transaction import PauseState, stops


class RankWaves:
    """The waves of one life of a rank. `sync_interval`: steps between two agreements of all ranks."""

    def __init__(self, sync_interval: int) -> None:
        self.wave = 0
        self.running = False
        self.steps = 0
        self.wanted = -1
        self._sync_interval = sync_interval

    def reach(self, wave: int) -> None:
        """The others are in this wave, or it is the one that they run next."""
        if plausible(wave, self.wave):
            self._is(max(self.wave, wave))

    def start(self, wave: int) -> None:
        self._is(wave)
        self.running = True
        self.recount()

    def recount(self) -> None:
        """Count the steps anew, as all others do now."""
        self.steps = 0

    def wake(self, wave: int) -> None:
        """All are to run in this wave."""
        if not plausible(wave, self.wave):
            return
        if self.running:
            # The group is a wave ahead: this rank has not yet come to the end that they agreed on.
            self.wanted = max(self.wanted, wave)
            self._is(self.wave)
        else:
            self.start(wave)

    def stepped(self, brought_forward: bool) -> bool:
        """A step is done; returns whether all ranks agree now: after the first, and every so many, or sooner."""
        due = brought_forward or self.steps % self._sync_interval == 0
        self.steps += 1
        return due

    def complete(self) -> int:
        """Pause, as all have agreed; returns the wave that is finished."""
        finished = self.wave
        self.wave += 1
        self.running = False
        self.recount()
        return finished

    def _is(self, wave: int) -> None:
        self.wave = wave
        if self.wanted <= wave:
            # It is asked for when this wave has ended, and then it is over.
            self.wanted = -1

    @property
    def overdue(self) -> int | None:
        """The wave that the others run in already, or None where they wait like this rank."""
        return self.wanted if self.wanted >= self.wave else None


HELLO_REPEAT_S = 0.1
IN_THE_ENGINE = (events.Step, events.DummyStep, events.Take, events.Drop)
OUT_OF_IT = (events.Turn, events.Stepped, events.EpochEnded)


class Rank:
    """One life of one rank.

    `lockstep`: whether it runs in waves. `report_loads`: False in external mode. `sync_interval`: steps
    between agreements. `group_address`: where its peers reach it, empty where its collectives are not ours.
    `prefill_quota`: how it is set (`prefill_quota.py`). `once`: its engine can be a member of one epoch only.
    `limits`: of a call of its engine.
    `without`: rules (`rules.py`) left out, to show what breaks.
    """

    INCIDENTAL = frozenset({"step"})
    """Attributes that nothing depends on which this machine does later: they are only told."""

    def __init__(
        self, rank: int, incarnation: int, address: str, *, lockstep: bool = False, report_loads: bool = True,
        sync_interval: int = 16, group_address: str = "", prefill_quota: int = OFF, once: bool = False,
        limits: Limits = NO_LIMITS, without: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.rank = rank
        self.incarnation = incarnation
        self.address = address
        self.phase = Phase.LOADING
        self.waves = RankWaves(sync_interval)
        self.quota = RankQuota(prefill_quota)
        self.step = 0
        self.epoch = 0
        self.pause = PauseState()
        self.weights = RankWeights()
        self.requests = RankRequests(rank, incarnation)
        self._lockstep = lockstep
        self._report_loads = report_loads
        self._group_address = group_address
        self._without = checked(without)
        self._once = once
        self._met = 0
        self.told = 0
        self._to_form: messages.Form | None = None
        self._mid_step = False
        self._hello_due: float | None = None
        self._reporter = LoadReporter(self.requests)
        self._kv = KvTeller(rank, incarnation)
        self._said: tuple[int, bool, object] = (0, False, None)
        self._calls = StepWatch(rank, incarnation, limits)

    @property
    def bound(self) -> bool:
        """Whether its engine has begun in an epoch and can be a member of no other."""
        return self._once and self._met > 0

    @property
    def wave(self) -> int:
        """The wave that it runs in, or will run in next."""
        return self.waves.wave

    @property
    def running(self) -> bool:
        return self.waves.running

    @property
    def quiesced(self) -> bool:
        """Whether the pause keeps this rank from starting anything by itself, and it has stopped."""
        if self.pause.over:
            return False
        if self._lockstep:
            return not self.running
        return not self._mid_step and (not self._may_step() or not len(self.requests))

    def handle(self, event: events.Event, now: float) -> list[events.Effect]:
        """Take in one event; returns what to do, in order."""
        ended = self._calls.end(self.step) if isinstance(event, OUT_OF_IT) else []
        effects = self._handle(event, now)
        effects += map(events.ToCoordinator, ended)
        if any(isinstance(effect, IN_THE_ENGINE) for effect in effects):
            self._calls.begin(now)
        if self.phase is Phase.READY and self._said != (self.pause.number, self.quiesced, self.weights.said):
            effects.insert(0, self._hello())
        return effects

    def _handle(self, event: events.Event, now: float) -> list[events.Effect]:
        match event:
            case events.FrontendSaid(frontend, AddRequest() as request, arrived):
                return self._on_add(frontend, request, now if arrived is None else arrived, now)
            case events.FrontendSaid(frontend, AbortRequests(requests)):
                return self.requests.drop(frontend, requests)
            case events.FrontendSaid(frontend, CallEngine() as call):
                return [events.Invoke(frontend, call)] if call.incarnation == self.incarnation else []
            case events.Invoked(frontend, number, text, error):
                said = Output(number, [], text, "stop" if error is None else "error", error=error)
                return [events.ToFrontend(frontend, Outputs(self.rank, self.incarnation, [said]))]
            case events.Stepped():
                return self._on_stepped(event, now)
            case events.WeightsDone():
                made = self.requests.hand_out(event.outputs, self.weights.known.version, now)
                # Who waits to be admitted asks now.
                hello = [self._hello()] if self.phase is Phase.JOINING and not event.error else []
                return [*made, *self.weights.done(event), *hello]
            case events.Turn(load, has_work, kv):
                if kv is not None:
                    self._kv.changed(kv)
                return self._on_turn(load, has_work, now)
            case events.CoordinatorSaid(message):
                return self._on_coordinator(message, now)
            case events.Agreed():
                return self._on_agreed(event, now)
            case events.FrontendGone(frontend):
                return self.requests.drop_frontend(frontend)
            case events.Formed(epoch):
                return self._on_formed(epoch)
            case events.Met(epoch):
                self._met = epoch
                return []
            case events.EpochEnded():
                if self.bound:
                    return [events.StartAgain()]
                self.epoch, self._mid_step = 0, False
                return [self._hello()]
            case events.Waited(ranks, collective, kind, seconds):
                waited = (list(ranks), collective, kind, seconds)
                return [events.ToCoordinator(messages.StallReport(self.rank, self.incarnation, self.step, *waited))]
            case events.Looked(progress, waits):
                looked: list[events.Effect] = [
                    events.ToCoordinator(report) for report in self._calls.look(self.step, progress, waits, now)
                ]
                hung_s = self._calls.over(now)
                why = "" if hung_s is None else f"its step {self.step} has not returned for {hung_s:.1f} s"
                return [*looked, events.StartAgain(why)] if why else looked
            case events.Loaded():
                self.phase = Phase.JOINING
                self._hello_due = now + HELLO_REPEAT_S
                return [self._hello()]
            case events.Leave():
                self.phase = Phase.LEFT
                return [events.ToCoordinator(messages.RankLeaving(self.rank, self.incarnation))]
        raise TypeError(f"rank {self.rank}: {type(event).__name__} is not an event of this machine")

    def statistics(self) -> dict[str, object]:
        return {
            "phase": self.phase.value,
            "wave": self.wave,
            "running": self.running,
            "step": self.step,
            "generation": self.epoch,
            "suspension": self.pause.number,
            "held": self.quiesced,
            "requests": len(self.requests) + self.requests.kept_back,
            "finished": self.requests.finished,
            "void_messages": self.requests.void,
        }

    # Requests and steps -------------------------------------------------------------------------

    def _on_add(self, frontend: int, request: AddRequest, arrived: float, now: float) -> list[events.Effect]:
        refusal = self.requests.arrive(frontend, request)
        if refusal:
            return refusal
        if not self.pause.over:
            if self.pause.paused and self.pause.mode == "abort":
                return [self.requests.refuse(frontend, request)]
            self.requests.hold(frontend, request, arrived)
            return []
        effects = [self.requests.take(frontend, request, arrived, now)]
        if self._lockstep and not self.running:
            effects += self._start_by_itself(request.wave)
        return effects

    def _on_turn(self, load: Load, has_work: bool, now: float) -> list[events.Effect]:
        changed = self._catch_up(now)
        if changed:
            return [*changed, events.Again()]
        if self._to_form is not None:
            form, self._to_form = self._to_form, None
            return [events.FormGroup(form.generation, form.members)]
        if self.phase is Phase.READY or not self._group_address:
            to_do = self.weights.to_do(self.quiesced)
            if to_do is not None:
                return [to_do]
        effects: list[events.Effect] = []
        if self.phase is Phase.JOINING and self._hello_due is not None and now >= self._hello_due:
            self._hello_due = now + HELLO_REPEAT_S
            effects.append(self._hello())
        effects += self._report(load)
        if self._report_loads and self.phase is Phase.READY:
            effects += map(events.ToCoordinator, self._kv.deltas())
        if not self._may_step() or not (self._lockstep or has_work):
            effects.append(events.Wait(self._hello_due))
            return effects
        self._mid_step = True
        if self.quota.urgent(load):
            effects.append(events.Urge())
        effects.append(events.Step(self.quota.tokens) if has_work else events.DummyStep())
        return effects

    def _may_step(self) -> bool:
        if self._lockstep:
            return self.running and bool(self.epoch or not self._group_address)
        return self.pause.over or self.pause.draining

    def _catch_up(self, now: float) -> list[events.Effect]:
        """What a change of the pause asks of the engine, which cannot be touched in mid-step."""
        if self.pause.paused and self.pause.mode == "abort" and (len(self.requests) or self.requests.kept_back):
            return self.requests.abort_all()
        if self.pause.over and (
            self.requests.kept_back or (self._lockstep and len(self.requests) and not self.running)
        ):
            effects = self.requests.take_kept_back(now)
            if self._lockstep and not self.running:
                effects += self._start_by_itself(self.wave)
            return effects
        return []

    def _on_stepped(self, done: events.Stepped, now: float) -> list[events.Effect]:
        self.step += 1
        self._mid_step = False
        self._reporter.measure(done, now)
        effects = self.requests.hand_out(done.outputs, self.weights.known.version, now)
        effects += self._report(done.load)
        if self._lockstep and self.waves.stepped(done.urged or self.quota.follows):
            self._mid_step = True
            effects.append(events.Agree(done.has_work, self.wave, self.pause.packed, self.quota.contribution(done)))
        return effects

    def _report(self, load: Load) -> list[events.Effect]:
        if not self._report_loads or self.phase is not Phase.READY:
            return []
        report = self._reporter.report(load, self.step, self.wave, self.running, self.quota.tokens)
        return [] if report is None else [events.ToCoordinator(report)]

    # Waves --------------------------------------------------------------------------------------

    def _start_by_itself(self, wave: int) -> list[events.Effect]:
        self.waves.start(max(self.wave, wave))
        if "own-report" in self._without:
            return []
        return [events.ToCoordinator(messages.StartWave(self.rank, self.incarnation, self.wave))]

    def _on_coordinator(self, message: messages.ToRank, now: float) -> list[events.Effect]:
        match message:
            case messages.Identify():
                if self.phase is Phase.LOADING:
                    return []
                # Whoever asks may know nothing of this rank: the next turn reports its load too.
                self._reporter.forget()
                return [self._hello(), *map(events.ToCoordinator, self._calls.repeat(self.step, now))]
            case messages.Suspension():
                if self.phase not in (Phase.JOINING, Phase.READY):
                    return []
                self.pause.hear(message)
                self.weights.hear(message)
                # The next agreement would stop the wave, some steps from now: it is brought forward.
                urgent = self._lockstep and self.running and stops(self.pause.packed)
                return [self._hello(), *([events.Urge()] if urgent else [])]
            case messages.Admit():
                return self._on_admit(message)
            case messages.Form():
                return self._on_form(message)
            case messages.StartDPWave(wave, exclude):
                return self._on_start(wave, exclude) if self._lockstep else []
            case messages.KvAsk(rank, incarnation) if (rank, incarnation) == (self.rank, self.incarnation):
                self._kv.ask()
        return []  # Scaling is for its node

    def _on_admit(self, admit: messages.Admit) -> list[events.Effect]:
        # Who is ready may be behind: the others have finished a wave while it joined.
        behind = self.phase is Phase.READY and not self.running and admit.wave > self.wave
        if (admit.rank, admit.incarnation) != (self.rank, self.incarnation):
            return []
        if not behind and self.phase is not Phase.JOINING:
            return []
        self.weights.hear(admit.suspension)
        if self.weights.behind:
            return []  # it has them first, and says hello again
        self.phase = Phase.READY
        self._hello_due = None
        self.waves.reach(admit.wave)
        self.pause.hear(admit.suspension)
        return [self._hello()]

    def _on_form(self, form: messages.Form) -> list[events.Effect]:
        lives = {(member.rank, member.incarnation) for member in form.members}
        if self.phase not in (Phase.JOINING, Phase.READY) or (self.rank, self.incarnation) not in lives:
            return []
        if form.generation <= self.told or not plausible(form.generation, self.told):
            return [self._hello()] if form.generation == self.epoch else []
        if self.bound:
            # Its epoch has ended, and it may be blocked in it.
            return [events.StartAgain()]
        if not self.running:  # it joins, or the others went on without it for a while
            self.waves.reach(form.wave)
        self.pause.hear(form.suspension)
        self.weights.hear(form.suspension)
        # Formed at the next turn, since by then a newer one may have come: they are not to be worked off one by one.
        self.epoch, self.told = 0, form.generation
        self._to_form = form
        return []

    def _on_formed(self, epoch: int) -> list[events.Effect]:
        self.epoch = epoch
        # The members left the one before at different steps: they count anew, together.
        self.waves.recount()
        self.quota.forget()
        self.phase = Phase.READY
        self._hello_due = None
        return [self._hello()]

    def _on_start(self, wave: int, exclude: int | None) -> list[events.Effect]:
        if self.phase is not Phase.READY or exclude == self.rank:
            return []
        if wave < self.wave and "finished-waves-ignored" not in self._without:
            return []
        self.waves.wake(wave)
        return [self._hello()]

    def _on_agreed(self, agreed: events.Agreed, now: float) -> list[events.Effect]:
        self._mid_step = False
        self.waves.reach(agreed.wave)
        self.pause.learn_packed(agreed.suspension)
        # All decide by what they agreed on: what this rank has heard meanwhile is its own.
        self.quota.agreed(agreed.quota, now)
        if agreed.any_work and not stops(agreed.suspension):
            return []
        self.quota.forget()
        effects: list[events.Effect] = [
            events.ToCoordinator(messages.WaveComplete(self.rank, self.incarnation, self.waves.complete()))
        ]
        overdue = self.waves.overdue
        if overdue is not None or (len(self.requests) and self.pause.over):
            # A request came in after the agreement was under way, or the next wave has begun already.
            effects += self._start_by_itself(overdue or self.wave)
        return effects

    def _hello(self) -> events.ToCoordinator:
        pause, quiesced, weights = self.pause, self.quiesced, self.weights.said
        self._said = pause.number, quiesced, weights
        return events.ToCoordinator(
            messages.RankHello(
                messages.PROTOCOL_VERSION, self.rank, self.incarnation, self.address, self.phase is Phase.READY,
                self.wave, self.running, pause.number, pause.mode, quiesced, self._group_address, self.epoch, self.told,
                self._once, weights, self._kv.number,
            )
        )  # fmt: skip
