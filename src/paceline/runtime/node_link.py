"""A node's connection to the coordinator: what it says of how many ranks there are to be, and what the node answers."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

import zmq

from paceline.protocol import codec
from paceline.protocol.messages import Identify, NodeHello, RankFailed, Scaling
from paceline.runtime.garbage import Garbage
from paceline.runtime.sockets import open_socket
from paceline.runtime.wakeup import Wakeup

logger = logging.getLogger("paceline.supervisor")


class NodeLink:
    """Carries a node's messages, in a thread, until `close`.

    `node`: its identity. `coordinator_input`, `coordinator_output`: as `DPCoordinator.get_engine_socket_addresses()`
    returns them. `on_news`: called by the thread when there is something in `inbox`. Raises StartupError.
    """

    def __init__(self, node: int, coordinator_input: str, coordinator_output: str, on_news: Callable[[], None]) -> None:
        self.inbox: queue.SimpleQueue[Scaling | Identify] = queue.SimpleQueue()
        self._on_news = on_news
        self._outbox: deque[NodeHello | RankFailed] = deque()
        self._closing = False
        self._wakeup = Wakeup()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        limit = codec.MAX_CONTROL_BYTES
        self._broadcasts = open_socket(self._context, zmq.XSUB, connect=coordinator_input, max_bytes=limit)
        self._answers = open_socket(self._context, zmq.PUSH, connect=coordinator_output, max_bytes=limit)
        self._broadcasts.send(b"\x01")
        self._broadcasts.send(b"\x01" + codec.node_topic(node))
        self._decode = codec.to_rank().decode
        self._garbage = Garbage(logger, "the coordinator's broadcasts")
        self._thread = threading.Thread(target=self._run, name="node-link", daemon=True)
        self._thread.start()

    def send(self, message: NodeHello | RankFailed) -> None:
        """Send when the thread comes to it; never blocks."""
        self._outbox.append(message)
        self._wakeup.set()

    def close(self) -> None:
        """Stop carrying."""
        self._closing = True
        self._wakeup.set()
        self._thread.join(timeout=2.0)
        self._wakeup.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._broadcasts, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._wakeup.fileno() in ready:
                self._wakeup.clear()
            while self._outbox:
                self._send(codec.encode(self._outbox.popleft()))
            if self._broadcasts in ready:
                self._read(self._broadcasts.recv_multipart())
        self._context.destroy(linger=0)

    def _send(self, frame: bytes) -> None:
        try:
            self._answers.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            # It is away, and asks again when it is back.
            return

    def _read(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            self._garbage.add("frames", f"{len(frames)} frames in place of one")
            return
        try:
            message = self._decode(frames[0])
        except codec.BadMessage as error:
            self._garbage.add(error.kind, error.detail)
            return
        # All else is for ranks.
        if isinstance(message, Scaling | Identify):
            self.inbox.put(message)
            self._on_news()
