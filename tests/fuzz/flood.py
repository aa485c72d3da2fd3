"""Bad frames for the sockets of real processes: over ZeroMQ, as each socket's peers speak, and as plain bytes."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from paceline.net.links import LOCK
from tests.fuzz.corpus import frames_of
from tests.fuzz.mutate import Mutator
from tests.pace import stretched

AT_ONCE = 200
"""Frames of one connection."""
LINGER_MS = 5000
"""How long a stopped process's socket is waited for. ZeroMQ 4.3.5 aborts where a connection breaks just after this, in
the middle of a message of several frames. What processes of ours send has one."""
MOST_OPEN = 20
"""Plain connections of one flood that are left open and say nothing more."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)
"""How ZeroMQ's own begin."""

# A socket's name to the kind of its peers and the corpus of what they say; None for plain bytes alone.
Ways = Sequence[tuple[str, int | None, str]]
OURS: Ways = (
    ("front-publish", zmq.XSUB, "front-end-to-coordinator"),
    ("back-output", zmq.PUSH, "rank-to-coordinator"),
    ("back-publish", zmq.XSUB, "subscriptions"),
    ("rank-", zmq.DEALER, "front-end-to-rank"),
    ("group-", None, "greeting"),
    ("http", None, "http-requests"),
)
# Under vLLM: the coordinator's three and the watchdog's port.
VLLM: Ways = (
    ("front", zmq.XSUB, "vllm-front-end"),
    ("output", zmq.PUSH, "vllm-rank"),
    ("publish", zmq.XSUB, "subscriptions"),
    ("status", None, "watchdog"),
)


def socket_folders(pid: int) -> list[Path]:
    """Where a deployment's supervisor keeps its sockets: it holds a lock in each such folder."""
    folders = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = descriptor.readlink()
            folders += [target.parent] if target.name == LOCK else []
    return folders


def addresses_in(folders: list[Path], port: int) -> dict[str, str]:
    """The addresses of a deployment as they are now, by name."""
    found = {path.name: f"ipc://{path}" for folder in folders for path in folder.iterdir() if path.is_socket()}
    return found | {"http": f"tcp://127.0.0.1:{port}"}


class Flood(threading.Thread):
    """Bad frames from one seed, until `stop`. `addresses`: asked for again and again, since processes come and go."""

    def __init__(self, addresses: Callable[[], dict[str, str]], ways: Ways, seed: int, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.sent: Counter[str] = Counter()
        """Inputs by kind of socket: frames, or connections where plain bytes are sent."""
        self._addresses = addresses
        self.ways = ways
        """May be changed while it runs."""
        self._draw = random.Random(seed)
        self._pause_s = pause_s
        self._over = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 10_000)
        self._mutators = {corpus: Mutator(self._draw, frames_of(corpus), None) for _, _, corpus in ways}
        self._open: list[socket.socket] = []

    def stop(self) -> None:
        self._over.set()
        self.join(stretched(30))
        for one in self._open:
            one.close()
        self._context.destroy(linger=0)

    def run(self) -> None:
        while not self._over.is_set():
            for name, address in self._addresses().items():
                way = next((way for way in self.ways if name.startswith(way[0])), None)
                if way is not None and not self._over.is_set():
                    self._strike(*way, address)
            self._over.wait(self._pause_s)

    def _strike(self, name: str, kind: int | None, corpus: str, address: str) -> None:
        plain = kind is None or self._draw.random() < 0.2
        try:
            if plain:
                self._speak_plainly(name, self._mutators[corpus], address)
            else:
                self._speak(name, kind, self._mutators[corpus], address)
        except (OSError, zmq.ZMQError):
            # It has just gone, or its queue is full.
            return

    def _speak(self, name: str, kind: int | None, mutator: Mutator, address: str) -> None:
        assert kind is not None
        with self._context.socket(kind) as peer:
            peer.linger = LINGER_MS
            if kind == zmq.DEALER and self._draw.random() < 0.8:
                peer.setsockopt(zmq.ROUTING_ID, self._draw.randbytes(8))
            peer.sndtimeo = 1000
            peer.connect(address)
            for _ in range(AT_ONCE):
                frames = [mutator.next()]
                if self._draw.random() < 0.05:
                    frames += [mutator.next() for _ in range(self._draw.choice((1, 2, 50)))]
                peer.send_multipart(frames)
                self.sent[name] += 1

    def _speak_plainly(self, name: str, mutator: Mutator, address: str) -> None:
        peer: Any = socket.socket(socket.AF_UNIX if address.startswith("ipc") else socket.AF_INET)
        peer.settimeout(0.5)
        path, (host, _, port) = address[6:], address[6:].rpartition(":")
        # A rank listens for its peers while it forms a generation; until then a thousand wait, and more are refused.
        self.sent[name] += 1
        self._open.append(peer)
        while len(self._open) > MOST_OPEN:
            self._open.pop(self._draw.randrange(len(self._open))).close()
        peer.connect(path if address.startswith("ipc") else (host, int(port)))
        draw = self._draw.random()
        begin = GREETING[: self._draw.randrange(len(GREETING))] if draw < 0.3 else b""
        if draw < 0.9:
            peer.sendall(begin + mutator.next())
        if draw < 0.7:
            self._open.remove(peer)
            peer.close()
