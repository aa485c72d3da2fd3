"""Engines that do not come up, for `--engine tests.late_engines:NAME`: most of them from rank 2 on."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref

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


class InCallback(TimedEngine):
    """Loads in the callback of a weak reference, out of which no exception comes, and then for ever."""

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        def callback(_: object) -> None:
            progress("loading", 0.1)
            threading.Event().wait()

        class Thing:
            pass

        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
        threading.Event().wait()
        assert reference() is None
        return super().create(settings, progress)


class Once(TimedEngine):
    """Its rank 1 comes up once."""

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        if settings.rank == 1:
            try:
                os.mkdir(f"{tempfile.gettempdir()}/paceline-once-{os.getppid()}")
            except FileExistsError:
                raise EngineError("there is no memory for this rank any more") from None
        return super().create(settings, progress)
