"""The `timed-lockstep` engine: `timed` as a rank of an expert-parallel model, whose steps contain collectives.

A step takes the time that the cost model says, and then an all-to-all among all ranks: so it lasts as long as the
slowest rank's. What a model would send there is left out. An idle rank's dummy step costs `step_ms`. The prefill quota
is obeyed. For comparing how lockstep ranks are driven, where `moe` would measure NumPy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.timed import CostModel, TimedEngine, sleep_until

if TYPE_CHECKING:
    from paceline.engines.group import RankGroup


class TimedLockstepEngine(TimedEngine):
    """An engine that only takes time, as long as the slowest of its group does. A `dp_size` of 1 needs no group."""

    lockstep: ClassVar[bool] = True

    def __init__(self, settings: EngineSettings, costs: CostModel) -> None:
        # Here and not at the top: a front-end imports this module for its tokenizer, and does without NumPy.
        import numpy as np

        super().__init__(settings, costs)
        self._alone = settings.dp_size == 1
        self._group: RankGroup | None = None
        self._nothing = np.zeros(0, np.uint8)

    def join(self, group: RankGroup) -> None:
        self._group = group

    def limit_prefill(self, tokens: int | None) -> None:
        self._prefill_limit = tokens

    def dummy_step(self) -> None:
        self._take_time(time.monotonic(), 0, 0)

    def _take_time(self, begin: float, prefilled: int, writing: int) -> None:
        sleep_until(begin + self._costs.seconds(prefilled, writing))
        if self._group is not None:
            self._group.all_to_all([self._nothing] * len(self._group.members))
        elif not self._alone:
            raise EngineError("the timed-lockstep engine steps among several ranks, and has not been given their group")
