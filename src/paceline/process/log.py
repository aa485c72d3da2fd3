"""The log of a process: lines on stderr; what cannot be written is lost, since a full disk must not end a deployment.

It is a file of its own because commands that start no child log as well.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import Any


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


def set_up_log(level: str, name: str = "%(processName)s") -> None:
    """Log lines of this process, `name`, to stderr: `level` and above."""
    make_stderr_lossy()
    form = f"%(asctime)s %(levelname)-7s {name}: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
