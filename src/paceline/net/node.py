"""How a node finds the coordinator, and how the two then talk about how many ranks there are to be.

The node with rank 0 answers at `--data-parallel-address`:`--data-parallel-rpc-port` with the coordinator's addresses,
for as long as it serves; a node that joins repeats its question until it is answered. From then on it has a connection
to the coordinator, on which it hears of changes of the size and says what has become of its ranks.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import zmq
from msgspec import Struct

from paceline.core import codec
from paceline.core.messages import PROTOCOL_VERSION, Identify, NodeHello, RankFailed, Scaling
from paceline.errors import StartupError
from paceline.net.links import BadFrames
from paceline.net.sockets import MESSAGES_A_TURN, drain, open_socket, tcp_address
from paceline.process.spawn import Wakeup

logger = logging.getLogger("paceline.supervisor")


class _SocketThread:
    """A thread that reads one socket, and does what else is to be done, until `close`."""

    def __init__(self, name: str) -> None:
        self._closing = False
        self._wakeup = Wakeup()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._socket: zmq.Socket[bytes]

    def close(self) -> None:
        """Send and hear nothing more."""
        self._closing = True
        self._wakeup.set()
        self._thread.join(timeout=2.0)
        self._wakeup.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        while not self._closing:
            poller.poll()
            self._wakeup.clear()
            self._turn()
        self._context.destroy(linger=0)

    def _turn(self) -> None:
        raise NotImplementedError


class NodeLink(_SocketThread):
    """A node's connection to the coordinator, served by a thread until `close`.

    `node`: its identity. `coordinator_input`, `coordinator_output`: as `DPCoordinator.get_engine_socket_addresses()`
    returns them. `on_news`: called by the thread when there is something in `inbox`. Raises StartupError.
    """

    def __init__(self, node: int, coordinator_input: str, coordinator_output: str, on_news: Callable[[], None]) -> None:
        super().__init__("node-link")
        self.inbox: queue.SimpleQueue[Scaling | Identify] = queue.SimpleQueue()
        self._on_news = on_news
        self._outbox: deque[NodeHello | RankFailed] = deque()
        limit = codec.MAX_CONTROL_BYTES
        self._socket = open_socket(self._context, zmq.XSUB, connect=coordinator_input, max_bytes=limit)
        self._answers = open_socket(self._context, zmq.PUSH, connect=coordinator_output, max_bytes=limit)
        self._socket.send(b"\x01")
        self._socket.send(b"\x01" + codec.node_topic(node))
        self._decode = codec.to_rank().decode
        self._bad_frames = BadFrames(logger, "the coordinator's broadcasts")
        self._thread.start()

    def send(self, message: NodeHello | RankFailed) -> None:
        """Send when the thread comes to it; never blocks."""
        self._outbox.append(message)
        self._wakeup.set()

    def _turn(self) -> None:
        while self._outbox:
            # Where nobody reads, the coordinator is away, and asks again when it is back.
            with contextlib.suppress(zmq.Again):
                self._answers.send(codec.encode(self._outbox.popleft()), zmq.NOBLOCK)
        for [frame] in drain(self._socket, self._bad_frames, messages=MESSAGES_A_TURN):
            message = self._bad_frames.decoded(self._decode, frame)
            # All else is for ranks.
            if isinstance(message, Scaling | Identify):
                self.inbox.put(message)
                self._on_news()


MAX_BYTES = 4096
ASK_AGAIN_MS = 500


class WhereIs(Struct, frozen=True, array_like=True, tag="where-is"):
    """A node asks for the coordinator of a deployment of `dp_size` ranks with this engine."""

    version: int
    dp_size: int
    engine: str


class Here(Struct, frozen=True, array_like=True, tag="here"):
    """The answer: the coordinator's addresses, or why this node does not fit in."""

    front_publish: str = ""
    back_output: str = ""
    back_publish: str = ""
    refusal: str = ""


class Rendezvous(_SocketThread):
    """Answers joining nodes, in a thread, until `close`. Raises StartupError where it cannot be bound."""

    def __init__(self, host: str, port: int, dp_size: int, engine: str, here: Here) -> None:
        super().__init__("rendezvous")
        self._dp_size = dp_size
        self._engine = engine
        self._here = here
        self._socket = open_socket(self._context, zmq.ROUTER, bind=tcp_address(host, port), max_bytes=MAX_BYTES)
        # A node that gave up waiting for the answer is no reason to raise.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        self._bad_frames = BadFrames(logger, "the rendezvous socket")
        self._thread.start()

    def _turn(self) -> None:
        for node, frame in drain(self._socket, self._bad_frames, parts=2, messages=MESSAGES_A_TURN):
            question = read_question(frame)
            if isinstance(question, str):
                self._bad_frames.add("malformed", question)
                continue
            answer = answer_to(question, self._here, self._dp_size, self._engine)
            self._socket.send_multipart([node, msgspec.msgpack.encode(answer)], zmq.NOBLOCK)


def read_question(frame: bytes) -> WhereIs | str:
    """What a joining node asks, or what is wrong with it."""
    try:
        return msgspec.msgpack.decode(frame, type=WhereIs)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return str(error)


def read_answer(frame: bytes) -> Here | None:
    """What it is told; None for anything else."""
    try:
        return msgspec.msgpack.decode(frame, type=Here)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def answer_to(question: WhereIs, here: Here, dp_size: int, engine: str) -> Here:
    """`here`, or why the node does not fit into a deployment of `dp_size` ranks of this engine."""
    if question.version != PROTOCOL_VERSION:
        return Here(refusal=f"it speaks protocol version {PROTOCOL_VERSION}, this node {question.version}")
    if question.dp_size != dp_size:
        return Here(refusal=f"--data-parallel-size is {dp_size} there and {question.dp_size} here")
    if question.engine != engine:
        return Here(refusal=f"--engine is {engine} there and {question.engine} here")
    return here


def find_coordinator(host: str, port: int, dp_size: int, engine: str, timeout_s: float) -> Here:
    """Ask until answered. Raises StartupError after `timeout_s`, or at once where this node does not fit in."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = tcp_address(host, port)
    question = msgspec.msgpack.encode(WhereIs(PROTOCOL_VERSION, dp_size, engine))
    deadline = time.monotonic() + timeout_s
    try:
        asking = open_socket(context, zmq.DEALER, connect=address, max_bytes=MAX_BYTES)
        while time.monotonic() < deadline:
            asking.send(question, zmq.NOBLOCK)
            if not asking.poll(ASK_AGAIN_MS):
                continue
            answer = read_answer(asking.recv_multipart()[-1])
            if answer is None:
                continue
            if answer.refusal:
                raise StartupError(f"the node at {host}:{port} does not take this one: {answer.refusal}")
            return answer
        raise StartupError(f"no answer from the node with rank 0 at {host}:{port} within {timeout_s:g} s")
    finally:
        context.destroy(linger=0)


def own_host(towards: str, port: int) -> str:
    """This node's address as `towards` sees it."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, port))
        except OSError as error:
            raise StartupError(f"--data-parallel-address: cannot reach {towards}: {error.strerror or error}") from None
        return str(probe.getsockname()[0])
