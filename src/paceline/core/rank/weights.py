"""Weights as one rank knows them: which its engine has, and what it is to do with others (`coordinator/weights.py`).

A rank takes up the newest word. Where that names other weights than its engine has, it puts them in force before it
takes another step, or ends and comes back without any. So the one thing that must never be, two ranks that step with
different weights, hangs on no answer: a rank hears that it may step again, and with which weights, in one message.
"""

from __future__ import annotations

from paceline.core.load import plausible
from paceline.core.messages import Suspension
from paceline.core.rank.events import Effect, StageWeights, StartAgain, UseWeights, WeightsDone
from paceline.core.requests import Weights, WeightsOfRank


class RankWeights:
    """`known`: the newest word. `has`: the number of the weights in the engine, `ready`: of those beside them."""

    def __init__(self) -> None:
        self.known = Weights()
        self.has = 0
        self._ready = 0
        self._failed = 0
        self._why = ""
        self._spoiled = False

    @property
    def behind(self) -> bool:
        """Whether the engine has others than are in force."""
        return self.known.current != self.has

    @property
    def said(self) -> WeightsOfRank | None:
        """For the coordinator; nothing where nobody has brought any."""
        return WeightsOfRank(self.known, self.has, self._ready, self._failed, self._why) if self.known.number else None

    def hear(self, told: Suspension | None) -> None:
        if told is None or told.weights is None:
            return
        if told.weights.number > self.known.number and plausible(told.weights.number, self.known.number):
            self.known = told.weights

    def to_do(self, quiesced: bool) -> Effect | None:
        """What the engine has to do before it may step again."""
        known = self.known
        spoiled = self._spoiled and not known.under_way and known.current != self._ready
        if self.behind or spoiled:
            if not known.current or spoiled:
                return StartAgain("it has weights that are not to be")
            return UseWeights(known.current, known.source, known.keep_kv)
        if known.under_way and quiesced and known.next not in (self._ready, self._failed):
            return StageWeights(known.next, known.next_source)
        return None

    def done(self, event: WeightsDone) -> list[Effect]:
        if event.used:
            if event.error:
                return [StartAgain(f"weights {event.number}: {event.error}")]
            self.has, self._spoiled = event.number, False
            return []
        self._spoiled = self._spoiled or event.spoils
        if event.error:
            self._failed, self._why = event.number, event.error[:1024]
        else:
            self._ready = event.number
        return []
