"""Engines whose steps do not return, for `--engine tests.hanging_engines:NAME`, told by files in a folder.

`--engine-option folder=…`: a rank that finds the file `hang-RANK` there takes it away and hangs in its step until there
is a file `go`. With `progress=1` it says all the while that it gets on, but where there is a file `quiet-RANK`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from paceline.engines.base import EngineSettings, Progress, StepResult
from paceline.engines.timed import TimedEngine

LOOK_S = 0.02


def _split(settings: EngineSettings) -> tuple[EngineSettings, Mapping[str, str]]:
    own = {name: settings.options[name] for name in ("folder", "progress") if name in settings.options}
    rest = {name: value for name, value in settings.options.items() if name not in own}
    return replace(settings, options=rest), own


class Hanging(TimedEngine):
    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        plain, own = _split(settings)
        engine = super().create(plain, progress)
        assert isinstance(engine, cls)
        engine.rank, engine.folder, engine.gets_on = settings.rank, Path(own["folder"]), "progress" in own
        return engine

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        super().check(_split(settings)[0], progress)

    rank: int
    folder: Path
    gets_on: bool

    def step(self) -> StepResult:
        asked = self.folder / f"hang-{self.rank}"
        if asked.exists():
            asked.rename(self.folder / f"hangs-{self.rank}")
            pause, quiet = threading.Event(), (self.folder / f"quiet-{self.rank}").exists()
            while not (self.folder / "go").exists():
                pause.wait(LOOK_S)
                self.progress += self.gets_on and not quiet
        return super().step()


class Stubborn(Hanging):
    """It cannot go on with what another rank has begun."""

    resumes = False
