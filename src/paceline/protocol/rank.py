"""A rank's machine: joining, taking requests in, running and pausing in waves, reporting load.

    effects = rank.handle(event, now)

The shell turns the wheel: it feeds what sockets brought, then a `Turn`, and does what the effects say:
`Step` and `DummyStep` are answered by `Stepped`, `Agree` by `Agreed`, and after `Wait` it sleeps until
something comes or `until` passes. In lockstep all ranks of a wave take part in the same sequence of
collectives, so in a running wave every turn is a step, real or dummy, and every `sync_interval` steps, and
on the first, the ranks agree whether any has work left; when none has, all pause at that same step.

The wave number travels with the agreement. A rank that joined with an old number and was woken by its
first request runs in the group's wave from the first agreement on, and all end it with the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from paceline.protocol.load import SpeedMeter
from paceline.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    Admit,
    Identify,
    Load,
    Output,
    Outputs,
    RankHello,
    RankLeaving,
    RankReport,
    StartDPWave,
    StartWave,
    ToRank,
    WaveComplete,
)
from paceline.protocol.rank_events import (
    Agree,
    Agreed,
    CoordinatorSaid,
    Drop,
    DummyStep,
    Effect,
    Event,
    FrontEndGone,
    FrontEndSaid,
    Leave,
    Loaded,
    Step,
    StepOutput,
    Stepped,
    Take,
    ToCoordinator,
    ToFrontEnd,
    Turn,
    Wait,
)

HELLO_REPEAT_S = 0.1


class Phase(Enum):
    """Where a rank is in its life; waves are a matter of READY alone."""

    LOADING = "loading"
    JOINING = "joining"
    READY = "ready"
    LEFT = "left"


class Rank:
    """One life of one rank.

    `lockstep`: whether it runs in waves. `report_loads`: False in external mode. `sync_interval`: steps
    between agreements.
    """

    def __init__(
        self, rank: int, incarnation: int, address: str, *, lockstep: bool = False, report_loads: bool = True,
        sync_interval: int = 16,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.incarnation = incarnation
        self.address = address
        self.phase = Phase.LOADING
        self.wave = 0
        self.running = False
        self.step = 0
        self._lockstep = lockstep
        self._report_loads = report_loads
        self._sync_interval = sync_interval
        self._steps_in_wave = 0
        self._wanted_wave = -1
        self._hello_due: float | None = None
        self._taken: dict[int, int] = {}
        self._keys: dict[tuple[int, int], int] = {}
        self._owners: dict[int, tuple[int, int]] = {}
        self._next_key = 1
        self._finished = 0
        self._prefill = SpeedMeter()
        self._decode = SpeedMeter()
        self._reported: RankReport | None = None
        self._void = 0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to do, in order."""
        match event:
            case FrontEndSaid(front_end, AddRequest() as request):
                return self._on_add(front_end, request)
            case FrontEndSaid(front_end, AbortRequests(requests)):
                return self._drop([(front_end, request) for request in requests])
            case Stepped():
                return self._on_stepped(event)
            case Turn(load, has_work):
                return self._on_turn(load, has_work, now)
            case CoordinatorSaid(message):
                return self._on_coordinator(message)
            case Agreed(any_work, wave):
                return self._on_agreed(any_work, wave)
            case FrontEndGone(front_end):
                self._taken.pop(front_end, None)
                return self._drop([pair for pair in self._keys if pair[0] == front_end])
            case Loaded():
                self.phase = Phase.JOINING
                self._hello_due = now + HELLO_REPEAT_S
                return [self._hello()]
            case Leave():
                self.phase = Phase.LEFT
                return [ToCoordinator(RankLeaving(self.rank, self.incarnation))]
        raise TypeError(f"rank {self.rank}: {type(event).__name__} is not an event of this machine")

    def statistics(self) -> dict[str, object]:
        """For logs and tests."""
        return {
            "phase": self.phase.value,
            "wave": self.wave,
            "running": self.running,
            "step": self.step,
            "requests": len(self._keys),
            "finished": self._finished,
            "void_messages": self._void,
        }

    # Requests -----------------------------------------------------------------------------------

    def _on_add(self, front_end: int, request: AddRequest) -> list[Effect]:
        pair = (front_end, request.request)
        if request.incarnation == self.incarnation:
            self._taken[front_end] = max(request.number, self._taken.get(front_end, 0))
        if request.incarnation != self.incarnation or pair in self._keys:
            self._void += 1
            why = "meant for another life of this rank" if pair not in self._keys else "sent twice"
            refusal = Output(request.request, [], finish_reason="error", error=f"rank {self.rank}: {why}")
            return [ToFrontEnd(front_end, Outputs(self.rank, self.incarnation, [refusal]))]
        key = self._next_key
        self._next_key += 1
        self._keys[pair] = key
        self._owners[key] = pair
        effects: list[Effect] = [Take(key, request)]
        if self._lockstep and not self.running:
            self._run(max(self.wave, request.wave))
            effects.append(ToCoordinator(StartWave(self.rank, self.incarnation, self.wave)))
        return effects

    def _drop(self, pairs: list[tuple[int, int]]) -> list[Effect]:
        effects: list[Effect] = []
        for pair in pairs:
            key = self._keys.pop(pair, None)
            if key is not None:
                del self._owners[key]
                self._finished += 1
                effects.append(Drop(key))
        return effects

    # Steps --------------------------------------------------------------------------------------

    def _on_turn(self, load: Load, has_work: bool, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self.phase is Phase.JOINING and self._hello_due is not None and now >= self._hello_due:
            self._hello_due = now + HELLO_REPEAT_S
            effects.append(self._hello())
        effects += self._report(load)
        if self._lockstep and self.running:
            effects.append(Step() if has_work else DummyStep())
        elif has_work and not self._lockstep:
            effects.append(Step())
        else:
            effects.append(Wait(self._hello_due))
        return effects

    def _on_stepped(self, done: Stepped) -> list[Effect]:
        self.step += 1
        if done.prefilled_tokens or done.decoded_tokens:
            self._measure(done)
        effects = self._hand_out(done.outputs)
        effects += self._report(done.load)
        if self._lockstep:
            due = self._steps_in_wave % self._sync_interval == 0
            self._steps_in_wave += 1
            if due:
                effects.append(Agree(done.has_work, self.wave))
        return effects

    def _hand_out(self, outputs: Sequence[StepOutput]) -> list[Effect]:
        by_front_end: dict[int, list[Output]] = {}
        owners = self._owners
        for out in outputs:
            owner = owners.get(out.key)
            if owner is None:
                continue
            front_end, request = owner
            if out.finish_reason is not None:
                del owners[out.key]
                del self._keys[owner]
                self._finished += 1
            by_front_end.setdefault(front_end, []).append(
                Output(request, out.token_ids, out.text, out.finish_reason, out.stop_reason, out.logprobs, out.error)
            )
        return [ToFrontEnd(to, Outputs(self.rank, self.incarnation, made)) for to, made in by_front_end.items()]

    def _measure(self, done: Stepped) -> None:
        # A step that does both is split by tokens: a decoding request costs about what a prompt token does.
        tokens = done.prefilled_tokens + done.decoded_tokens
        share = done.prefilled_tokens / tokens
        if done.prefilled_tokens:
            self._prefill.add(done.prefilled_tokens, done.seconds * share)
        if done.decoded_tokens:
            self._decode.add(done.decoded_tokens, done.seconds * (1 - share))

    def _report(self, load: Load) -> list[Effect]:
        """A report, where it would say anything that the last one did not."""
        if not self._report_loads or self.phase is not Phase.READY:
            return []
        full = msgspec.structs.replace(
            load, prefill_rate=self._prefill.rate, decode_rate=self._decode.rate, finished=self._finished
        )
        report = RankReport(self.rank, self.incarnation, self.step, self.wave, self.running, full, dict(self._taken))
        last = self._reported
        if last is not None and (last.load, last.taken, last.wave, last.running) == (
            report.load, report.taken, report.wave, report.running
        ):  # fmt: skip
            return []
        self._reported = report
        return [ToCoordinator(report)]

    # Waves --------------------------------------------------------------------------------------

    def _on_coordinator(self, message: ToRank) -> list[Effect]:
        match message:
            case Identify():
                if self.phase is Phase.LOADING:
                    return []
                # Whoever asks may know nothing of this rank: the next turn reports its load too.
                self._reported = None
                return [self._hello()]
            case Admit(rank, incarnation, wave):
                if (rank, incarnation) != (self.rank, self.incarnation) or self.phase is not Phase.JOINING:
                    return []
                self.phase = Phase.READY
                self._hello_due = None
                self.wave = max(self.wave, wave)
                return [self._hello()]
            case StartDPWave(wave, exclude):
                return self._on_start(wave, exclude) if self._lockstep else []
        raise TypeError(f"rank {self.rank}: {type(message).__name__} is no message to a rank")

    def _on_start(self, wave: int, exclude: int | None) -> list[Effect]:
        if self.phase is not Phase.READY or exclude == self.rank or wave < self.wave:
            return []
        if self.running:
            # The group is a wave ahead: this rank has not yet come to the end that they agreed on.
            self._wanted_wave = max(self._wanted_wave, wave)
            return [self._hello()]
        self._run(wave)
        return [self._hello()]

    def _run(self, wave: int) -> None:
        self.wave = wave
        self.running = True
        self._steps_in_wave = 0

    def _on_agreed(self, any_work: bool, wave: int) -> list[Effect]:
        self.wave = max(self.wave, wave)
        if any_work:
            return []
        complete = WaveComplete(self.rank, self.incarnation, self.wave)
        self.wave += 1
        self.running = False
        effects: list[Effect] = [ToCoordinator(complete)]
        if self._keys or self._wanted_wave >= self.wave:
            # A request came in after the agreement was under way, or the next wave has begun already.
            self._run(max(self.wave, self._wanted_wave))
            effects.append(ToCoordinator(StartWave(self.rank, self.incarnation, self.wave)))
        return effects

    def _hello(self) -> ToCoordinator:
        ready = self.phase is Phase.READY
        return ToCoordinator(
            RankHello(PROTOCOL_VERSION, self.rank, self.incarnation, self.address, ready, self.wave, self.running)
        )
