"""The log of every process of a deployment: one form, one place, lines on stderr.

A line says when (with the zone), how grave, which process, and what; `--log-format json` makes an object of each. A
defect's traceback is shown once a kind, the place where it was raised: the next of its kind is a line. What cannot be
logged is lost, since a full disk must not end a deployment. The form travels to all processes in the environment.

Only the standard library is imported: coordinators and the watchdog under vLLM have this too.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import threading
import traceback
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol

FORMAT_VARIABLE = "PACELINE_LOG_FORMAT"
FORMATS = ("text", "json")
MAIN = "paceline"
"""What the process is called that has started all others."""
KINDS_KEPT = 256


class LossyFile(io.FileIO):
    """A file of which what cannot be written is lost. The next write is tried again: there may be room."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def make_stderr_lossy() -> None:
    """From here on nothing that this process prints on stderr, or logs there, can fail for want of room."""
    first = sys.__stderr__
    if first is None or sys.stderr is not first:
        # It is so already, or somebody has put something of his own in its place.
        return
    file = LossyFile(first.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(file), "utf-8", "backslashreplace", line_buffering=True)


class LogLines(logging.Formatter):
    """Records as text or JSON. `name`: the process; if left out what multiprocessing calls it.

    A record's `rank` is the one it is about, its `request` what the request is called, its `trace` a traceback that
    another process has had.
    """

    def __init__(self, as_json: bool, name: str = "") -> None:
        super().__init__()
        self._as_json, self._name = as_json, name
        self._seen: set[object] = set()

    def format(self, record: logging.LogRecord) -> str:
        process = self._name or (MAIN if record.processName == "MainProcess" else record.processName or MAIN)
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        text, trace = record.getMessage(), self._trace(record)
        if not self._as_json:
            return f"{when} {record.levelname:7} {process}: {text}" + (f"\n{trace}" if trace else "")
        said: dict[str, object] = {"time": when, "level": record.levelname.lower(), "process": process}
        said |= {"pid": record.process, "logger": record.name, "message": text}
        about = getattr(record, "rank", None)
        if about is None and process.startswith("rank ") and process[5:].isdecimal():
            about = int(process[5:])
        said |= {} if about is None else {"rank": about}
        said |= {"request": named} if (named := getattr(record, "request", "")) else {}
        return json.dumps(said | ({"traceback": trace} if trace else {}))

    def _trace(self, record: logging.LogRecord) -> str:
        """The traceback, the first time that one of its kind comes."""
        kind: object
        if trace := getattr(record, "trace", ""):
            kind = trace
        elif record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            trace = "".join(traceback.format_exception(error)).rstrip()
            frames = traceback.extract_tb(error.__traceback__)
            kind = type(error), *((frame.filename, frame.lineno) for frame in frames[-1:])
        else:
            return ""
        if kind in self._seen or len(self._seen) >= KINDS_KEPT:
            return ""
        self._seen.add(kind)
        return str(trace)


def set_up_log(level: str, name: str = "") -> None:
    """Log this process's lines to stderr, `level` and above, and what nobody catches too. `name`: as in LogLines."""
    make_stderr_lossy()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines(in_json(), name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda said: _uncaught(said.exc_type, said.exc_value, said.exc_traceback)


def in_json() -> bool:
    return os.environ.get(FORMAT_VARIABLE) == "json"


def defect(logger: logging.Logger, where: str, error: BaseException, request: str = "") -> None:
    """Log a defect of ours, or of an engine. `request`: the one that it is about, by its name."""
    logger.error("%s: %s: %s", where, type(error).__name__, error, exc_info=error, extra=about(request))


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        defect(logging.getLogger("paceline"), f"internal error in {threading.current_thread().name}", error)


class Noted(Protocol):
    """What a machine wants in the log: `core.coordinator.events.Note`."""

    @property
    def text(self) -> str: ...
    @property
    def urgent(self) -> bool: ...
    @property
    def routine(self) -> bool: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def request(self) -> str: ...


def note(logger: logging.Logger, said: Noted) -> None:
    level = logging.WARNING if said.urgent else logging.DEBUG if said.routine else logging.INFO
    logger.log(level, "%s", said.text, extra={"rank": said.rank, **about(said.request)})


def about(request: str) -> dict[str, str]:
    """What a line about a request is given as `extra`."""
    return {"request": request}


def tell(text: str) -> None:
    """Say something to whoever has started this command: a line on stderr, in the log's form where that is JSON."""
    if in_json():
        logging.getLogger("paceline").info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


def fail(error: object) -> None:
    """Say why a command ends."""
    if in_json() and logging.getLogger().handlers:
        logging.getLogger("paceline").error("%s", error)
    else:
        print(f"paceline: error: {error}", file=sys.stderr)


class OomKills:
    """Whether the kernel has killed for want of memory since the last look. It says how often, of whom it does not."""

    def __init__(self, files: tuple[str, ...] | None = None) -> None:
        self._files = _oom_files() if files is None else files
        self._count = self._read()

    def rose(self) -> bool:
        before, self._count = self._count, self._read()
        return self._count > before

    def _read(self) -> int:
        """The sum over all counters: only whether it rises says something."""
        total = 0
        for path in self._files:
            with contextlib.suppress(OSError, ValueError), open(path) as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        return total


def _oom_files() -> tuple[str, ...]:
    """The counters of this process's control group, of both versions, and of the whole machine."""
    files = ["/proc/vmstat", "/sys/fs/cgroup/memory.events"]
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":
                files += [f"/sys/fs/cgroup{root}{path}/memory.events" for root in ("", "/unified")]
            elif "memory" in controllers.split(","):
                files += [f"/sys/fs/cgroup/memory{below}/memory.oom_control" for below in (path, "")]
    return tuple(dict.fromkeys(files))
