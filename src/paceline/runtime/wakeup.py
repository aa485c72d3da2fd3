"""Wakes a poll from another thread or from a signal handler."""

from __future__ import annotations

import contextlib
import socket


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
