"""What a person sees while something takes long: how far it is, on a terminal in place, in lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TaskID, TextColumn, TimeElapsedColumn

from paceline.log import in_json, tell

EVERY_S = 10.0
"""Between two lines where there is no terminal."""


class Progress(Protocol):
    """Says how far something is: in words, and the share that is done where that is known; `growing`: where there is
    ever more to do, so that it lasts longer than it looks.
    """

    def __call__(self, text: str, share: float | None = None, growing: bool = False) -> None: ...


class Estimate:
    """How long something will go on that began when this was made. `clock`: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()

    def passed_s(self) -> float:
        return self._clock() - self._begin

    def told(self, text: str, share: float | None, growing: bool = False) -> str:
        """The text, and how much longer that will be: as long for each share as up to now."""
        passed = self.passed_s()
        if not share or share >= 1.0:
            return f"{text}; for {_duration(passed)} so far"
        left = _duration(passed / share - passed)
        return f"{text}; more than {left} left" if growing else f"{text}, {share:.0%}; about {left} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def status_line(clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Says on stderr how far something is: on a terminal in one line, elsewhere in a line each `EVERY_S`."""
    console, estimate = Console(stderr=True, highlight=False), Estimate(clock)
    if console.is_terminal:
        with console.status("") as status:
            yield lambda text, share=None, growing=False: status.update(estimate.told(text, share, growing))
        return
    due = EVERY_S

    def say(text: str, share: float | None = None, growing: bool = False) -> None:
        nonlocal due
        if estimate.passed_s() >= due:
            due = estimate.passed_s() + EVERY_S
            tell(estimate.told(text, share, growing))

    yield say


class StartupDisplay:
    """Shows each process's progress until it is ready. A context manager; writes to stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> StartupDisplay:
        if self._console.is_terminal and not in_json():
            self._bars = Bars(
                TextColumn("{task.fields[name]:12}"), BarColumn(bar_width=30), TextColumn("{task.description}"),
                TimeElapsedColumn(), console=self._console, transient=True,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away. May be called twice."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def progress(self, name: str, what: str, share: float) -> None:
        """`name` is doing `what`, `share` of it done."""
        if self._bars is not None:
            self._bars.update(self._task(name), description=what, completed=share)
        elif self._said.get(name) != what:
            # Without a terminal a line a change of activity is enough.
            self._said[name] = what
            tell(f"{name}: {what}")

    def ready(self, name: str) -> None:
        """`name` is ready."""
        if self._bars is not None:
            self._bars.update(self._task(name), description="ready", completed=1.0)
        else:
            tell(f"{name}: ready")

    def _task(self, name: str) -> TaskID:
        assert self._bars is not None
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task("", name=name, total=1.0)
        return self._tasks[name]
