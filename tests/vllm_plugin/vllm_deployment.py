"""For tests of the translation: a coordinator under vLLM, spoken to as vLLM's processes speak; nothing is real."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.coordinator.events import Note
from paceline.vllm import translation
from paceline.vllm.codec import Notice, RankMessage, RankStats, Scale, VllmDialect


class VllmDeployment:
    """`size` ranks of which nobody is real; what the coordinator sends is kept, by kind."""

    def __init__(
        self, size: int = 2, *, lockstep: bool = True, dialect: VllmDialect | None = None,
        memory: translation.Memory | None = None, publish_loads: bool = True, listening: bool = True,
        interval_s: float = 0.01,
    ) -> None:  # fmt: skip
        self.size = size
        self.now = 100.0
        self.dialect = dialect or VllmDialect()
        self.settings = {"lockstep": lockstep, "publish_loads": publish_loads, "interval_s": interval_s}
        self.sent: list[translation.Effect] = []
        self.memory = memory or translation.Memory(size)
        self.translation = self._new(restarted=memory is not None)
        if listening:
            self.all_subscribe()

    def _new(self, *, restarted: bool) -> translation.VllmTranslation:
        return translation.VllmTranslation(
            self.memory, self.dialect, identity=7, restarted=restarted, stall_s=30.0, **self.settings
        )  # type: ignore[arg-type]

    def restart(self) -> None:
        """The coordinator is killed, and another comes, with what was remembered. Nobody listens yet."""
        self.translation = self._new(restarted=True)
        self.sent.clear()

    def happen(self, event: translation.Event) -> list[translation.Effect]:
        effects = self.translation.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, translation.Remember):
                self.memory = effect.memory
        self.sent += effects
        return effects

    def all_subscribe(self) -> None:
        for _ in range(self.size):
            self.happen(translation.RankSubscribed())

    def report(
        self, rank: int, waiting: int = 0, running: int = 0, *, wave: int = 0, step: int = 0, kv: float = 0.0
    ) -> list[translation.Effect]:
        return self.happen(
            translation.RankSaid(RankMessage(rank, scheduler_stats=RankStats(waiting, running, step, wave, kv)))
        )

    def start(self, rank: int, wave: int) -> list[translation.Effect]:
        return self.happen(translation.RankSaid(RankMessage(rank, start_wave=wave)))

    def complete(self, wave: int, rank: int = 0) -> list[translation.Effect]:
        return self.happen(translation.RankSaid(RankMessage(rank, wave_complete=wave)))

    def notice(self, rank: int, wave: int) -> list[translation.Effect]:
        notice = Notice(rank.to_bytes(2, "little"), rank, wave)
        at_once = self.translation.wake_at_once(notice)
        effects = self.happen(translation.FrontendSaid(notice))
        # What may be sent before is what comes out then.
        assert at_once is None or wakes(effects)[0] == at_once
        return effects

    def scale(self, size: int) -> list[translation.Effect]:
        self.size = size
        return self.happen(translation.FrontendSaid(Scale(size)))

    def frontend(self) -> list[translation.Effect]:
        return self.happen(translation.FrontendSubscribed())

    def wait(self, seconds: float) -> list[translation.Effect]:
        """Let time pass, with all ticks that are due meanwhile."""
        end = self.now + seconds
        effects: list[translation.Effect] = []
        while self.translation.deadline <= end:
            self.now = max(self.now, self.translation.deadline)
            effects += self.happen(translation.Tick())
        self.now = end
        return effects


def wakes(effects: Sequence[translation.Effect]) -> list[translation.Wake]:
    return [effect for effect in effects if isinstance(effect, translation.Wake)]


def views(effects: Sequence[translation.Effect]) -> list[translation.View]:
    return [effect for effect in effects if isinstance(effect, translation.View)]


def greetings(effects: Sequence[translation.Effect]) -> int:
    return sum(isinstance(effect, translation.Greet) for effect in effects)


def urgent_notes(effects: Sequence[translation.Effect]) -> list[str]:
    return [effect.text for effect in effects if isinstance(effect, Note) and effect.urgent]


def last_view(deployment: VllmDeployment) -> translation.View:
    return views(deployment.sent)[-1]
