"""Starts real deployments for tests: `paceline serve` as a user would, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx2
import openai

from tests.pace import Deadline, pace, stretched

DEADLINE_S = 120.0


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = 30.0) -> Any:
    """Poll `condition` until it is true; fails naming `what`. Returns what the condition returned."""
    deadline = Deadline(deadline_s)
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if deadline.over():
            raise AssertionError(f"not within {deadline_s:g} s, stretched by {pace():.1f}: {what}")
        pause.wait(0.02)


class Command:
    """A `paceline` command as a process, with all that it prints. `to`: where it prints that, in place of here.
    `python`: another environment's; `variables`: on top of this process's. `prefix`: what runs the command.
    """

    def __init__(
        self, *arguments: str, to: IO[str] | None = None, python: str = sys.executable,
        variables: Mapping[str, str] | None = None, prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.lines: list[str] = []
        self.url = ""
        self.http: Any = None
        # Each takes a megabyte; those that are not held any more have been closed.
        self._clients: weakref.WeakSet[openai.OpenAI] = weakref.WeakSet()
        self.process = subprocess.Popen(
            [*prefix, python, "-m", "paceline", *arguments],
            stderr=subprocess.STDOUT, stdout=to or subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            start_new_session=True, env=os.environ | dict(variables or {}),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_line(self, text: str, deadline_s: float = DEADLINE_S) -> str:
        """Until a line that holds `text` is printed; returns it."""

        def found() -> str | None:
            for line in list(self.lines):
                if text in line:
                    return line
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before {text!r}:\n{self.output}")
            return None

        return str(wait_until(found, f"{text!r} in\n{self.output}", deadline_s))

    def wait_end(self, deadline_s: float = DEADLINE_S) -> int:
        """Until the process has ended and all it printed is read; returns the exit status."""
        try:
            status = self.process.wait(stretched(deadline_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s:g} s:\n{self.output}") from None
        self._reader.join(stretched(10))
        return status

    def signal(self, number: int) -> None:
        """Send a signal to the parent process alone."""
        self.process.send_signal(number)

    def children(self) -> list[int]:
        return descendants(self.process.pid)

    def connect(self) -> None:
        """Wait for the line that says where it serves, and open a client."""
        line = self.wait_line("serves on http")
        self.open(line.split("serves on ")[1].split("/v1")[0])

    def open(self, url: str) -> None:
        self.url = url
        self.http = httpx2.Client(base_url=self.url, timeout=stretched(60.0))

    @property
    def openai(self) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=stretched(60.0))
        self._clients.add(client)
        return client

    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=stretched(60.0))

    def health(self) -> dict[str, Any]:
        return dict(self.http.get("/health").json())

    def pid_of(self, name: str) -> int:
        """Process id of the child that is called `name`, like "rank 0"."""
        return next(pid for pid in self.children() if process_name(pid) == f"pl:{name}")

    def close(self) -> None:
        if self.http is not None:
            self.http.close()
        for client in list(self._clients):
            client.close()
        left = self.children()
        for pid in [self.process.pid, *left]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(stretched(10))
        self._reader.join(stretched(10))
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)


class Deployment(Command):
    """`paceline serve` on a free port, ready."""

    def __init__(self, *arguments: str, **how: Any) -> None:
        super().__init__("serve", "--port", "0", *arguments, **how)
        try:
            self.connect()
        except BaseException:
            self.close()
            raise


@contextlib.contextmanager
def deployment(*arguments: str, **how: Any) -> Iterator[Deployment]:
    """A running deployment, ended at the block's end; what it printed is shown where the test fails."""
    running = Deployment(*arguments, **how)
    try:
        yield running
    except BaseException:
        print(running.output)
        raise
    finally:
        running.close()


@contextlib.contextmanager
def command(*arguments: str, **how: Any) -> Iterator[Command]:
    running = Command(*arguments, **how)
    try:
        yield running
    finally:
        running.close()


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def process_name(pid: int) -> str:
    """The name that a child of ours gives itself, like `pl:rank 0`."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return ""


def cpu_s(pid: int) -> float:
    """CPU time that all threads of a process have used, in seconds."""
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int, name: str = "VmRSS") -> float:
    """The resident memory of a process, in MiB; the most that it ever was: `VmHWM`."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    fields = _stat(pid)
    return fields is not None and fields[0] != "Z"


def _stat(pid: int) -> list[str] | None:
    """The fields of a process after its name: state, parent, …"""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
