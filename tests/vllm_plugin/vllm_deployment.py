"""For tests of the translation: a coordinator under vLLM, spoken to as vLLM's processes speak; nothing is real."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.coordinator.events import Note
from paceline.vllm.codec import Notice, RankMessage, RankStats, Scale, VllmDialect
from paceline.vllm.translation import (
    Effect,
    Event,
    FrontendSaid,
    FrontendSubscribed,
    Greet,
    Memory,
    RankSaid,
    RankSubscribed,
    Remember,
    Tick,
    View,
    VllmTranslation,
    Wake,
)


class VllmDeployment:
    """`size` ranks of which nobody is real; what the coordinator sends is kept, by kind."""

    def __init__(
        self, size: int = 2, *, lockstep: bool = True, dialect: VllmDialect | None = None, memory: Memory | None = None,
        publish_loads: bool = True, listening: bool = True, interval_s: float = 0.01,
    ) -> None:  # fmt: skip
        self.size = size
        self.now = 100.0
        self.dialect = dialect or VllmDialect()
        self.settings = {"lockstep": lockstep, "publish_loads": publish_loads, "interval_s": interval_s}
        self.sent: list[Effect] = []
        self.memory = memory or Memory(size)
        self.translation = self._new(restarted=memory is not None)
        if listening:
            self.all_subscribe()

    def _new(self, *, restarted: bool) -> VllmTranslation:
        return VllmTranslation(
            self.memory, self.dialect, identity=7, restarted=restarted, stall_s=30.0, **self.settings
        )  # type: ignore[arg-type]

    def restart(self) -> None:
        """The coordinator is killed, and another comes, with what was remembered. Nobody listens yet."""
        self.translation = self._new(restarted=True)
        self.sent.clear()

    def happen(self, event: Event) -> list[Effect]:
        effects = self.translation.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, Remember):
                self.memory = effect.memory
        self.sent += effects
        return effects

    def all_subscribe(self) -> None:
        for _ in range(self.size):
            self.happen(RankSubscribed())

    def report(
        self, rank: int, waiting: int = 0, running: int = 0, *, wave: int = 0, step: int = 0, kv: float = 0.0
    ) -> list[Effect]:
        return self.happen(RankSaid(RankMessage(rank, scheduler_stats=RankStats(waiting, running, step, wave, kv))))

    def start(self, rank: int, wave: int) -> list[Effect]:
        return self.happen(RankSaid(RankMessage(rank, start_wave=wave)))

    def complete(self, wave: int, rank: int = 0) -> list[Effect]:
        return self.happen(RankSaid(RankMessage(rank, wave_complete=wave)))

    def notice(self, rank: int, wave: int) -> list[Effect]:
        notice = Notice(rank.to_bytes(2, "little"), rank, wave)
        at_once = self.translation.wake_at_once(notice)
        effects = self.happen(FrontendSaid(notice))
        # What may be sent before is what comes out then.
        assert at_once is None or wakes(effects)[0] == at_once
        return effects

    def scale(self, size: int) -> list[Effect]:
        self.size = size
        return self.happen(FrontendSaid(Scale(size)))

    def frontend(self) -> list[Effect]:
        return self.happen(FrontendSubscribed())

    def wait(self, seconds: float) -> list[Effect]:
        """Let time pass, with all ticks that are due meanwhile."""
        end = self.now + seconds
        effects: list[Effect] = []
        while self.translation.deadline <= end:
            self.now = max(self.now, self.translation.deadline)
            effects += self.happen(Tick())
        self.now = end
        return effects


def wakes(effects: Sequence[Effect]) -> list[Wake]:
    return [effect for effect in effects if isinstance(effect, Wake)]


def views(effects: Sequence[Effect]) -> list[View]:
    return [effect for effect in effects if isinstance(effect, View)]


def greetings(effects: Sequence[Effect]) -> int:
    return sum(isinstance(effect, Greet) for effect in effects)


def urgent_notes(effects: Sequence[Effect]) -> list[str]:
    return [effect.text for effect in effects if isinstance(effect, Note) and effect.urgent]


def last_view(deployment: VllmDeployment) -> View:
    return views(deployment.sent)[-1]
