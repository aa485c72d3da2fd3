"""What a person sees while something takes long: of a deployment that starts, bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paceline.log import in_json, tell


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that says how far something is; nothing anywhere else."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update


class StartupDisplay:
    """Shows each process's progress until it is ready. A context manager; writes to stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> StartupDisplay:
        if self._console.is_terminal and not in_json():
            self._bars = Progress(
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
