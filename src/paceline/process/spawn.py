"""Child processes: started clean, started again, ended with their parent, and small.

Children are spawned, never forked. A spawned child imports its parent's main module again, which for a command line
drags in everything that the command line imports; a coordinator that must be up in a quarter of a second cannot afford
that, and no child of ours needs it, so the main module is hidden meanwhile. What a burst has taken of memory goes back
to the system when it is over.

A process that served for a while and died met an accident; one that dies each time it is up will do so again, and
starting it in a circle costs its neighbours. So what is counted is restarts in a row: a life that served for `steady_s`
begins the count anew.

Only the standard library is imported: the watchdog under vLLM, which must not die itself, has all this too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from paceline.errors import PacelineError
from paceline.log import defect, set_up_log

END = signal.SIGUSR1
"""Ends a child. SIGTERM does not: whoever sends that to all processes of a deployment at once (systemd, `timeout`,
Slurm) wants what it means to the main one, which drains while its children serve, and then ends them.
"""


def unmoved(*_: object) -> None:
    """The handler of a signal that is for the main process. Unlike an ignored one it is no child's child's."""


class Running(Protocol):
    """One life of a child, of this process or (`ray_link.py`) on another machine. What multiprocessing's has too means
    the same."""

    name: str

    @property
    def pid(self) -> int | None:
        """None where it is not of this machine."""

    @property
    def exitcode(self) -> int | None: ...

    @property
    def sentinel(self) -> int: ...

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...

    def terminate(self) -> None: ...

    def end(self) -> None:
        """Ask it to end; it may have ended already."""


Start = Callable[[str, Callable[..., None], object, str], tuple[Running, Connection]]
"""Starts a life of a child, as `start_child` does."""


class ChildProcess(SpawnProcess):
    """A process of this one's."""

    def end(self) -> None:
        if self.is_alive() and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, END)


AGAIN = 75
"""The exit status (EX_TEMPFAIL) of a process that met no accident of its own and is to be started again at once."""
HUNG = 76
"""That of a rank whose step did not return."""


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    main = sys.modules.get("__main__")
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        if main is not None:
            sys.modules["__main__"] = main


def spawn(name: str, target: Callable[..., None], kwargs: Mapping[str, Any], log_level: str = "info") -> ChildProcess:
    """Start a daemon process that runs `target(**kwargs)`; it must be importable by its module's name."""
    arguments = (name, log_level, target, dict(kwargs))
    process = ChildProcess(target=_child_main, name=name, args=arguments, daemon=True)
    try:
        os.getcwd()
    except FileNotFoundError:
        # Somebody has removed the folder where it was started; a process must have one that is there.
        os.chdir("/")
    with _main_module_hidden():
        process.start()
    return process


def start_child(
    name: str, target: Callable[..., None], settings: object, log_level: str
) -> tuple[ChildProcess, Connection]:  # fmt: skip
    """Start a child that runs `target(settings=…, status=pipe)`; returns it and our end of the pipe. Raises OSError."""
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    try:
        return spawn(name, target, {"settings": settings, "status": writer}, log_level), reader
    except BaseException:
        reader.close()
        raise
    finally:
        writer.close()


def _child_main(name: str, log_level: str, target: Callable[..., None], kwargs: dict[str, Any]) -> None:
    """What every child does first: a log of its own, no Ctrl-C (the parent ends it), no orphan."""
    multiprocessing.current_process().name = name
    _show_name(f"pl:{name}")
    set_up_log(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, unmoved)
    end_with_parent()
    try:
        target(**kwargs)
    except PacelineError as error:
        logging.getLogger("paceline").error("%s", error)
        sys.exit(1)
    except Exception as error:
        defect(logging.getLogger("paceline"), "internal error", error)
        sys.exit(70)


def _show_name(name: str) -> None:
    """Let `ps` and `top` show who is who, where the system can: 15 characters are kept."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(name[:15])


def end_with_parent() -> None:
    """End this process at once when its parent ends, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        # No clean-up: whatever would wait for it is gone.
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def stop(processes: Sequence[Running], timeout_s: float = 2.0) -> None:
    """End processes: ask, wait up to `timeout_s` for all together, then kill."""
    for process in processes:
        process.end()
    if not wait_gone(processes, timeout_s):
        for process in processes:
            if process.is_alive():
                process.kill()
        wait_gone(processes, 5.0)


def wait_gone(processes: Sequence[Running], timeout_s: float) -> bool:
    """Wait until all have ended; False where the time passes first."""
    end = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return not any(process.is_alive() for process in processes)


LOOK_S = 2.0
"""Between two looks at how large the process is."""
GROWN_BYTES = 4 << 20
"""So much more than after the last time is worth the milliseconds that it takes."""

# Where the C library is not glibc there is none.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class MallocTrim:
    """The free memory of this process. Its owner looks whenever it has nothing to do.

    What ZeroMQ's thread reads comes into an arena of its own, and is freed by another thread, here and there. malloc
    gives back only what lies at an arena's end: a process that once fell behind for a second would stay as large for
    ever.
    """

    def __init__(self) -> None:
        self._look_at = 0.0
        self._least = resident_bytes()
        self.times = 0
        """How often memory was given back."""

    def look(self, now: float) -> None:
        """Give free memory back where the process has grown. Costs nothing within LOOK_S of the last time."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        resident = resident_bytes()
        if _trim is not None and resident > self._least + GROWN_BYTES:
            _trim(0)
            self.times += 1
            # What is left is in use: it is no reason to try again.
            self._least = resident_bytes()
        else:
            self._least = min(self._least, resident)


def resident_bytes() -> int:
    """How large this process is in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


class Wakeup:
    """A pair of sockets: `set` on one side makes `fileno` readable on the other until `clear`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        """Make it readable. Never blocks, may be called from anywhere."""
        # Full means that it is readable already; closed, that nobody polls any more.
        with contextlib.suppress(BlockingIOError, OSError):
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Make it unreadable again; call before looking at what it announced."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


STEADY_S = 10.0
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class Restarts:
    """When a process that has ended is started again: at once, then ever later, then not at all. `limit`: restarts in a
    row before it is given up, None for never.

    `first_s`: before the second restart in a row; each wait is twice the one before, up to `longest_s`.
    """

    def __init__(
        self, limit: int | None = None, *, first_s: float = FIRST_WAIT_S, longest_s: float = LONGEST_WAIT_S,
        steady_s: float = STEADY_S,
    ) -> None:  # fmt: skip
        self.in_a_row = 0
        self._limit = limit
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s

    def ended(self, served_s: float, now: float) -> float | None:
        """It has ended at `now`, `served_s` seconds after it was ready, 0 where it never was.

        Returns when to start it again, or None where it is given up.
        """
        if served_s >= self._steady_s:
            self.in_a_row = 0
        if self._limit is not None and self.in_a_row >= self._limit:
            return None
        self.in_a_row += 1
        if self.in_a_row == 1:
            return now
        # From some restart on the wait is the longest, and the power would only grow.
        return now + min(self._first_s * 2.0 ** min(self.in_a_row - 2, 32), self._longest_s)
