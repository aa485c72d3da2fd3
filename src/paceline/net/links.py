"""What every process of a deployment needs to be told from others, to be found, and to know who is connected.

A process's life has a number that no other has. The ipc sockets of a deployment lie in a folder of its own, which goes
with it. What arrives and is no message is counted. And a connecting socket knows whether its one connection is up, as
ZeroMQ's own thread sees it: that thread answers and sends heartbeats whatever the program does, so a peer in a long
step is up, and one that is dead, stopped or cut off is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import zmq

from paceline.core.codec import BadMessage
from paceline.errors import StartupError
from paceline.net.sockets import DOORS_S, SECRET, bound_address, drain

T = TypeVar("T")

logger = logging.getLogger("paceline.links")


def new_identity(index: int = 0) -> int:
    """A number that no process of this deployment has had: the time, and `index` among those started together.

    It is odd: as a ZeroMQ routing id its first byte must not be zero.
    """
    return time.time_ns() // 1024 * 1024 + index % 512 * 2 + 1


class BadFrames:
    """What arrived and was no message: counted by kind, the first of each kind logged."""

    def __init__(self, logger: logging.Logger, socket_name: str) -> None:
        self._logger = logger
        self._socket_name = socket_name
        self.counts: Counter[str] = Counter()

    def decoded(self, decode: Callable[[bytes], T], frame: bytes) -> T | None:
        """The message that a frame is; None where it is none, which is counted."""
        try:
            return decode(frame)
        except BadMessage as error:
            self.add(error.kind, error.detail)
            return None

    def add(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            # What a stranger sent does not belong in a log unescaped, or whole.
            shown = detail[:200].encode("unicode_escape").decode()
            self._logger.warning("dropped a message on %s, %s: %s (further ones are only counted)",
                                 self._socket_name, kind, shown)  # fmt: skip


IPC_PATH_BYTES = 107
"""Longest path a Unix socket can have on Linux."""


PREFIX = "paceline-"
LOCK = ".lock"


class SocketFolder:
    """A private folder for the ipc sockets of one deployment, removed with it.

    A process that is killed removes nothing. So its folder holds a lock as long as it lives, and the next
    folder's maker removes those whose lock is nobody's.
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
        # A cleaner may have removed it.
        self.path.mkdir(0o700, exist_ok=True)
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


REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
"""A handshake that ends for no reason that ZeroMQ knows is none: a peer that was stopped, or cut off, gave it up."""
REFUSED_FOLDER = "PACELINE_REFUSED_FOLDER"
"""The environment variable that names where the node's processes put down how many connections they have refused."""
SAY_REFUSED_S = 60.0


class Refusals:
    """Connections that this process has refused, since they do not have the secret: logged at once and then once a
    minute, and counted in a file that the node's front-ends read (`server/metrics.py`). For any thread.
    """

    def __init__(self) -> None:
        self.count = 0
        self._unsaid, self._say_at = 0, float("-inf")
        self._lock = threading.Lock()

    def add(self, where: str) -> None:
        with self._lock:
            self.count += 1
            self._unsaid += 1
            if (folder := os.environ.get(REFUSED_FOLDER)) is not None:
                with contextlib.suppress(OSError):
                    (Path(folder) / f"refused-{os.getpid()}").write_text(str(self.count))
            if time.monotonic() >= self._say_at:
                logger.warning("refused at %s, who does not have the secret: connections: %d", where, self._unsaid)
                self._unsaid, self._say_at = 0, time.monotonic() + SAY_REFUSED_S


refusals = Refusals()


def refused_connections(folder: str) -> int:
    """How many connections the node's processes have refused, those of earlier lives too."""
    total = 0
    for path in Path(folder).glob("refused-*"):
        with contextlib.suppress(OSError, ValueError):
            total += int(path.read_text() or 0)
    return total


class Doors:
    """Bound sockets. Where a cleaner has removed their files (ipc) those are made again, folder and all; who is
    connected notices nothing. Where there is a secret, those who knock without it (tcp) are counted.

    `watched`: False where somebody else has the sockets' monitors.
    """

    def __init__(self, sockets: Iterable[zmq.Socket[bytes]], *, watched: bool = True) -> None:
        self._addresses = {socket: bound_address(socket) for socket in sockets}
        self._look_at = 0.0
        self._bad_frames = BadFrames(logger, "a monitor's socket")
        self._monitors = {
            socket: socket.get_monitor_socket(REFUSED)
            for socket, address in self._addresses.items()
            if watched and address.startswith("tcp:") and SECRET in os.environ
        }
        # A descriptor tells of nothing before the first try to read.
        self.count()

    def look(self, now: float) -> None:
        """Costs nothing within DOORS_S of the last time."""
        if now < self._look_at:
            return
        self._look_at = now + DOORS_S
        for socket, address in self._addresses.items():
            path = address.removeprefix("ipc://")
            if path.startswith("/") and not os.path.exists(path):
                with contextlib.suppress(OSError, zmq.ZMQError):
                    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                    socket.bind(address)

    @property
    def files(self) -> set[int]:
        """File descriptors that change when somebody was refused: then `count` is to be called."""
        return {int(monitor.fd) for monitor in self._monitors.values()}

    def count(self) -> None:
        for socket, monitor in self._monitors.items():
            for _ in drain(monitor, self._bad_frames, parts=2):
                refusals.add(self._addresses[socket])

    def close(self) -> None:
        for socket, monitor in self._monitors.items():
            socket.disable_monitor()
            monitor.close()


CALLS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | REFUSED
"""What a caller's monitor tells of. Who has another secret ends the connection without a word."""


class Callers:
    """Connecting sockets that are never given up, opened with `watched=CALLS`, by the address that each calls.

    ZeroMQ itself connects again for ever, but for one case: where who answers does not speak its protocol, or wants
    other keys than the socket has. So it would miss the head of a deployment that had for a while been started without
    its secret, or whose port another program has had. It says so by what it does not say: that it tries again.
    """

    def __init__(self, sockets: Mapping[zmq.Socket[bytes], str]) -> None:
        self._calls = {
            socket: (address, socket.get_monitor_socket(CALLS))
            for socket, address in sockets.items()
            if address.startswith("tcp:")
        }
        self._ended: set[zmq.Socket[bytes]] = set()
        self._look_at = 0.0
        self._bad_frames = BadFrames(logger, "a monitor's socket")

    def look(self, now: float) -> bool:
        """Call again where that was given up; whether a call was refused. Costs nothing within DOORS_S of the last."""
        if now < self._look_at:
            return False
        self._look_at = now + DOORS_S
        refused = False
        for socket, (address, monitor) in self._calls.items():
            given_up = socket in self._ended
            for frames in drain(monitor, self._bad_frames, parts=2):
                event, given_up = monitored(frames), False
                refused = refused or bool(event & ~(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED))
                if event == zmq.EVENT_CONNECT_RETRIED:
                    self._ended.discard(socket)
                else:
                    self._ended.add(socket)
            if given_up:
                # It has not tried again between two looks.
                refused = True
                self._ended.discard(socket)
                with contextlib.suppress(zmq.ZMQError):
                    socket.disconnect(address)
                socket.connect(address)
        return refused


UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
DOWN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


def monitored(frames: Sequence[bytes]) -> int:
    """The event that a monitor's two frames tell of. pyzmq's own reader of them takes all of asyncio with it."""
    return int.from_bytes(frames[0][:2], sys.byteorder)


class LinkMonitor:
    """Watches one socket's connection. `on_change` is called with True and False as the connection comes up and ends.

    What has not been up yet is taken to come up: only a try that failed is an end. The socket's owner calls `read`
    whenever `socket` can be read, and `close` before it closes its own.
    """

    def __init__(self, watched: zmq.Socket[bytes], on_change: Callable[[bool], None]) -> None:
        self._watched = watched
        self._on_change = on_change
        self._up = True
        self._bad_frames = BadFrames(logger, "a monitor's socket")
        self.socket: zmq.Socket[bytes] = watched.get_monitor_socket(UP | DOWN)

    def read(self) -> None:
        for frames in drain(self.socket, self._bad_frames, parts=2):
            up = bool(monitored(frames) & UP)
            if up != self._up:
                self._up = up
                self._on_change(up)

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close()
