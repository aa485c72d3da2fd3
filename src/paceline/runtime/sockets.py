"""ZeroMQ sockets as all shells use them: addresses, limits, and what happens to garbage.

Every socket drops its queue when it is closed, bounds what it keeps for a peer that does not read, and
refuses frames that are too large before they are in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import zmq

from paceline.errors import StartupError

SEND_QUEUE_MESSAGES = 10_000
RECEIVE_QUEUE_MESSAGES = 100_000
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


def tcp_address(host: str, port: int = 0) -> str:
    """A tcp address to bind; port 0 takes a free one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def open_socket(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    *,
    max_bytes: int,
    bind: str | None = None,
    connect: str | None = None,
    routing_id: bytes | None = None,
    kept: int = RECEIVE_QUEUE_MESSAGES,
    options: Mapping[zmq.SocketOption, int] | None = None,
) -> zmq.Socket[bytes]:
    """A socket of `kind`, bound or connected. Frames over `max_bytes` end the sender's connection.

    `kept`: received messages of one peer that wait to be read; the peer keeps what is beyond. `options`: further ones
    of ZeroMQ's, which hold for the first peer too.

    Raises StartupError, naming the address, where it cannot be bound or is no address.
    """
    socket = context.socket(kind)
    socket.linger = 0
    socket.sndhwm = SEND_QUEUE_MESSAGES
    socket.rcvhwm = kept
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    for option, value in (options or {}).items():
        socket.setsockopt(option, value)
    if routing_id is not None:
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
    if kind == zmq.ROUTER:
        # Without it, what is sent to a peer that is gone vanishes without a word.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A front-end that connects anew is the same front-end: its old connection is given up.
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    address = bind or connect or ""
    if "[" in address:
        socket.ipv6 = True
    try:
        if bind is not None:
            socket.bind(bind)
        elif connect is not None:
            socket.connect(connect)
    except zmq.ZMQError as error:
        socket.close()
        verb = "bind" if bind is not None else "connect to"
        raise StartupError(f"cannot {verb} {address}: {error.strerror}") from None
    return socket


def giving_up_after(silence_s: float) -> dict[zmq.SocketOption, int]:
    """Options for a socket that gives up a peer whose process shows no sign of life for so long; 0 for never.

    The peer is asked after half the time and given up when the other half has brought no answer. ZeroMQ's own thread
    answers there: a peer that computes is not silent.
    """
    if not silence_s:
        return {}
    half_ms = max(1, round(silence_s * 500))
    while_connecting = dict.fromkeys((zmq.CONNECT_TIMEOUT, zmq.HANDSHAKE_IVL), 2 * half_ms)
    return {zmq.HEARTBEAT_IVL: half_ms, zmq.HEARTBEAT_TIMEOUT: half_ms, **while_connecting}


def bound_address(socket: zmq.Socket[bytes]) -> str:
    """Where a bound socket can be reached, with the port that was found for port 0."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


class Garbage:
    """What arrived and was no message: counted by kind, the first of each kind logged."""

    def __init__(self, logger: logging.Logger, socket_name: str) -> None:
        self._logger = logger
        self._socket_name = socket_name
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, detail: str) -> None:
        """One more of `kind`."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            # What a stranger sent does not belong in a log unescaped, or whole.
            shown = detail[:200].encode("unicode_escape").decode()
            self._logger.warning("dropped a message on %s, %s: %s (further ones are only counted)",
                                 self._socket_name, kind, shown)  # fmt: skip
