"""vLLM's two kinds of frames, and the translation with the machine behind them."""

from __future__ import annotations

import json
from typing import Any

from paceline.core.limits import MAX_CONTROL_BYTES
from paceline.vllm import codec as vllm_codec, translation
from paceline.vllm.codec import Notice, RankMessage, VllmDialect
from tests.fuzz.target import Target

RANKS = 4


class VllmTarget(Target):
    """A coordinator under vLLM, of one version or another."""

    corpus = "vllm-rank"
    largest = 40_000

    def begin(self) -> None:
        dialect = VllmDialect(count_fields=self.draw.choice((2, 3)), says_started=self.draw.random() < 0.7)
        self.translation = translation.VllmTranslation(
            translation.Memory(RANKS), dialect, identity=7, interval_s=0.01, lockstep=self.draw.random() < 0.7
        )
        for _ in range(RANKS):
            self.handle(translation.RankSubscribed())

    def handle(self, event: translation.Event) -> None:
        """Its door; what comes out must go on the wire, and fit."""
        for effect in self.translation.handle(event, self.now):
            match effect:
                case translation.View(counts, wave, running):
                    assert len(vllm_codec.view(counts, wave, running)) <= MAX_CONTROL_BYTES
                case translation.Wake(wave, exclude):
                    assert 0 <= wave < 2**63
                    vllm_codec.wake(wave, exclude)
                case translation.Remember(memory):
                    json.dumps({"memory": memory.wave})
        json.dumps(self.translation.statistics())

    def live(self) -> None:
        if self.draw.random() < 0.01:
            self.handle(translation.FrontendSubscribed())
            self.handle(translation.RankUnsubscribed())
            self.handle(translation.RankSubscribed())
        self.pass_time()
        if self.now >= self.translation.deadline:
            self.handle(translation.Tick())

    def machines(self) -> list[Any]:
        return [self.translation]


class VllmRanks(VllmTarget):
    """What its ranks push."""

    name = "vllm-ranks"
    kinds = (RankMessage,)
    known = (0, 1, 2, 3)
    decode = staticmethod(vllm_codec.read_rank)

    def feed(self, frame: bytes) -> None:
        self._is_report = vllm_codec.whose_report(frame) is not None
        super().feed(frame)

    def take(self, message: Any) -> None:
        self.handle(translation.RanksReported([message]) if self._is_report else translation.RankSaid(message))
        self.live()


class VllmFrontends(VllmTarget):
    """What its front-ends send."""

    name = "vllm-front-ends"
    corpus = "vllm-front-end"

    decode = staticmethod(vllm_codec.read_frontend)

    def take(self, message: Any) -> None:
        if isinstance(message, Notice):
            self.translation.wake_at_once(message)
        self.handle(translation.FrontendSaid(message))
        self.live()
