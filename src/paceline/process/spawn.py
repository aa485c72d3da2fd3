"""Child processes: started clean, ended with their parent, and small.

Children are spawned, never forked. A spawned child imports its parent's main module again, which for a command line
drags in everything that the command line imports; a coordinator that must be up in a quarter of a second cannot afford
that, and no child of ours needs it, so the main module is hidden meanwhile. What a burst has taken of memory goes back
to the system when it is over.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from typing import Any

from paceline.errors import PacelineError
from paceline.process.log import set_up_log


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    main = sys.modules.get("__main__")
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        if main is not None:
            sys.modules["__main__"] = main


def spawn(name: str, target: Callable[..., None], kwargs: Mapping[str, Any], log_level: str = "info") -> SpawnProcess:
    """Start a daemon process that runs `target(**kwargs)`; it must be importable by its module's name."""
    process = multiprocessing.get_context("spawn").Process(
        target=_child_main, name=name, args=(name, log_level, target, dict(kwargs)), daemon=True
    )
    with _main_module_hidden():
        process.start()
    return process


def _child_main(name: str, log_level: str, target: Callable[..., None], kwargs: dict[str, Any]) -> None:
    """What every child does first: a log of its own, no Ctrl-C (the parent ends it), no orphan."""
    multiprocessing.current_process().name = name
    _show_name(f"pl:{name}")
    set_up_log(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    try:
        target(**kwargs)
    except PacelineError as error:
        logging.getLogger("paceline").error("%s", error)
        sys.exit(1)
    except Exception as error:
        # A defect of ours. The one line is for the user, the traceback for whoever turns on debug.
        logging.getLogger("paceline").error("internal error: %s: %s", type(error).__name__, error)
        logging.getLogger("paceline").debug("traceback", exc_info=True)
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


def stop(processes: list[SpawnProcess], timeout_s: float = 2.0) -> None:
    """End processes: ask, wait up to `timeout_s` for all together, then kill."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    if not wait_gone(processes, timeout_s):
        for process in processes:
            if process.is_alive():
                process.kill()
        wait_gone(processes, 5.0)


def wait_gone(processes: list[SpawnProcess], timeout_s: float) -> bool:
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
        """What to poll for reading."""
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
        """Close both sides."""
        self._reader.close()
        self._writer.close()
