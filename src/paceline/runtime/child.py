"""One process of a node over all its lives: started, heard, started again."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from paceline.runtime.processes import spawn
from paceline.runtime.restarts import Restarts
from paceline.runtime.status import Failed, Progressed, Ready, Status

Settings = Callable[[int], object]
"""What a life is started with, by its number: 0 for the first."""


class Child:
    """A child process that says on a pipe when it is ready.

    `name`: shown to people. `kind`: what it is one of ("rank"). `target`: run as `target(settings=…, status=pipe)`.
    `drains`: it finishes its work on SIGTERM, and is told first.
    """

    def __init__(
        self, name: str, kind: str, target: Callable[..., None], settings: Settings, restarts: Restarts, *,
        drains: bool, log_level: str,
    ) -> None:  # fmt: skip
        self.name, self.kind, self.drains = name, kind, drains
        self.life = 0
        self.state: Status
        self.process: SpawnProcess
        self.status: Connection
        self.due: float | None = None
        """When it is started again, on the monotonic clock; None while it runs, and where it is given up."""
        self.given_up = False
        self.on_trial: Callable[[str], None] | None = None
        """Told why it has ended, in place of starting it again."""
        self._target = target
        self._settings = settings
        self._restarts = restarts
        self._log_level = log_level
        self._ready_at: float | None = None
        self._begin()

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        return isinstance(self.state, Ready)

    def read(self) -> Status | None:
        """What it says; None where it says nothing more."""
        try:
            self.state = self.status.recv()
        except (EOFError, OSError):
            self.status.close()
            return None
        if self.ready and self._ready_at is None:
            self._ready_at = time.monotonic()
        return self.state

    def why(self) -> str:
        """How it ended: the reason it gave, or the signal or exit status."""
        while not self.status.closed and self.status.poll():
            self.read()
        return self.state.why if isinstance(self.state, Failed) else how(self.process.exitcode)

    def ended(self) -> float | None:
        """It has ended: decides when it is started again. Returns in how many seconds; None: never."""
        now = time.monotonic()
        wait_s = self._restarts.ended(0.0 if self._ready_at is None else now - self._ready_at)
        self.given_up = wait_s is None
        self.due = None if wait_s is None else now + wait_s
        return wait_s

    def begin_again(self) -> None:
        """Start its next life."""
        self.status.close()
        self.life += 1
        self._begin()

    def _begin(self) -> None:
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        arguments = {"settings": self._settings(self.life), "status": writer}
        self.process = spawn(self.name, self._target, arguments, self._log_level)
        writer.close()
        self.status = reader
        self.state = Progressed("starting", 0.0)
        self.due = None
        self._ready_at = None


def how(exit_code: int | None) -> str:
    """An exit status in words."""
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit status {exit_code}"
