"""Where the ipc sockets of one deployment are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from paceline.errors import StartupError

IPC_PATH_BYTES = 107
"""Longest path a Unix socket can have on Linux."""


PREFIX = "paceline-"
LOCK = ".lock"


class SocketFolder:
    """A private folder for the ipc sockets of one deployment, removed with it.

    A process that is killed removes nothing. So its folder holds a lock as long as it lives, and whoever makes the next
    folder removes those whose lock is nobody's.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Locked before it has its name: one that is being made never looks abandoned.
        self._lock = open(self.path / f"{LOCK}.new", "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(self._lock.name, self.path / LOCK)
        _remove_abandoned(self.path.parent)

    def address(self, name: str) -> str:
        """The ipc address of socket `name`."""
        path = str(self.path / name)
        if len(os.fsencode(path)) > IPC_PATH_BYTES:
            raise StartupError(f"socket path too long for this system ({len(path)} > {IPC_PATH_BYTES}): set TMPDIR")
        return f"ipc://{path}"

    def close(self) -> None:
        """Remove the folder and what is in it. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{PREFIX}*/{LOCK}"):
        # Another user's folder, or one that is going just now.
        with contextlib.suppress(OSError), open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
