"""Engines of which ranks from 2 on do not come up, for `--engine tests.late_engines:NAME`."""

from __future__ import annotations

import threading

from paceline.engines.base import EngineError, EngineSettings, Progress
from paceline.engines.timed import TimedEngine

FIRST_BAD_RANK = 2


class Unloadable(TimedEngine):
    """Its new ranks fail."""

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        if settings.rank >= FIRST_BAD_RANK:
            raise EngineError("there is no memory for this rank")
        return super().create(settings, progress)


class Slow(TimedEngine):
    """Its new ranks never get there."""

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        if settings.rank >= FIRST_BAD_RANK:
            progress("loading for ever", 0.1)
            threading.Event().wait()
        return super().create(settings, progress)
