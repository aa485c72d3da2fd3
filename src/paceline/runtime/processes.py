"""Child processes: started clean, ended with their parent.

Children are spawned, never forked. A spawned child imports its parent's main module again, which for a
command line drags in everything that the command line imports; a coordinator that must be up in a quarter
of a second cannot afford that, and no child of ours needs it, so the main module is hidden meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from typing import Any

from paceline.errors import PacelineError
from paceline.runtime.log import set_up_log


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
