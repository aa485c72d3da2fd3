"""How a node finds the coordinator, and how the two then talk about how many ranks there are to be.

The node with rank 0 answers at `--data-parallel-address`:`--data-parallel-rpc-port` with the coordinator's addresses,
for as long as it serves; a node that joins repeats its question until it is answered. From then on it has a connection
to the coordinator, on which it hears of changes of the size and says what has become of its ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq
from msgspec import Struct

from paceline.core import codec
from paceline.core.messages import PROTOCOL_VERSION, Identify, NodeHello, RankFailed, Scaling
from paceline.core.requests import StartAgain
from paceline.errors import StartupError
from paceline.net.links import CALLS, BadFrames, Callers, Doors
from paceline.net.sockets import DOORS_S, MESSAGES_A_TURN, drain, open_socket, tcp_address
from paceline.process.spawn import Wakeup

if TYPE_CHECKING:
    from paceline.engines.base import EngineSettings
    from paceline.settings import DeploymentConfig

logger = logging.getLogger("paceline.supervisor")


class _SocketThread:
    """A thread that reads one socket, and does what else is to be done, until `close`."""

    def __init__(self, name: str) -> None:
        self._closing = False
        self._wakeup = Wakeup()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._socket: zmq.Socket[bytes]
        self._doors = Doors(())
        self._callers = Callers({})

    def close(self) -> None:
        self._closing = True
        self._wakeup.set()
        self._thread.join(timeout=2.0)
        self._wakeup.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        for file in self._doors.files:
            poller.register(file, zmq.POLLIN)
        while not self._closing:
            poller.poll(int(DOORS_S * 1000))
            self._wakeup.clear()
            self._callers.look(time.monotonic())
            self._doors.count()
            self._turn()
        self._doors.close()
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
        self.inbox: queue.SimpleQueue[Scaling | Identify | StartAgain] = queue.SimpleQueue()
        self._on_news = on_news
        self._outbox: deque[NodeHello | RankFailed] = deque()
        limit = codec.MAX_CONTROL_BYTES
        self._socket = open_socket(self._context, zmq.XSUB, connect=coordinator_input, max_bytes=limit, watched=CALLS)
        self._answers = open_socket(self._context, zmq.PUSH, connect=coordinator_output, max_bytes=limit, watched=CALLS)
        self._callers = Callers({self._socket: coordinator_input, self._answers: coordinator_output})
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
            if isinstance(message, Scaling | Identify | StartAgain):
                self.inbox.put(message)
                self._on_news()


MAX_BYTES = 16384
ASK_AGAIN_MS = 500
SAY_AGAIN_S = 60.0


class WhereIs(Struct, frozen=True, array_like=True, tag="where-is"):
    """A node asks for the coordinator of a deployment. `facts`: what must be the same at all nodes, by its name."""

    version: int
    facts: dict[str, str]


class Here(Struct, frozen=True, array_like=True, tag="here"):
    """The answer: the coordinator's addresses, or why this node does not fit in."""

    front_publish: str = ""
    back_output: str = ""
    back_publish: str = ""
    refusal: str = ""


QUESTION = codec.Decoder[WhereIs](WhereIs, MAX_BYTES)
ANSWER = codec.Decoder[Here](Here, MAX_BYTES)


class Rendezvous(_SocketThread):
    """Answers joining nodes, in a thread, until `close`. Raises StartupError where it cannot be bound."""

    def __init__(self, host: str, port: int, facts: dict[str, str], here: Here) -> None:
        super().__init__("rendezvous")
        self._facts = facts
        self._here = here
        self._socket = open_socket(self._context, zmq.ROUTER, bind=tcp_address(host, port), max_bytes=MAX_BYTES)
        # A node that gave up waiting for the answer is no reason to raise.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        self._doors = Doors((self._socket,))
        self._bad_frames = BadFrames(logger, "the rendezvous socket")
        self._thread.start()

    def _turn(self) -> None:
        for node, frame in drain(self._socket, self._bad_frames, parts=2, messages=MESSAGES_A_TURN):
            question = self._bad_frames.decoded(QUESTION.decode, frame)
            if question is not None:
                answer = answer_to(question, self._here, self._facts)
                if answer.refusal:
                    logger.warning("refused a node that asked to join: %s", answer.refusal)
                self._socket.send_multipart([node, msgspec.msgpack.encode(answer)], zmq.NOBLOCK)


def answer_to(question: WhereIs, here: Here, facts: dict[str, str]) -> Here:
    """`here`, or why the node does not fit in."""
    if question.version != PROTOCOL_VERSION:
        return Here(refusal=f"it speaks protocol version {PROTOCOL_VERSION}, this node {question.version}")
    refusal = difference(facts, question.facts)
    return Here(refusal=refusal) if refusal else here


def difference(there: dict[str, str], here: dict[str, str]) -> str:
    """What differs of the facts at two nodes, empty where nothing does."""
    differ = [name for name in [*there, *(here.keys() - there)] if there.get(name) != here.get(name)]
    shown = [f"{name} is {there.get(name, 'none')} there and {here.get(name, 'none')} here" for name in differ]
    return "; ".join(shown)[:1024]


def facts_of(config: DeploymentConfig, settings: EngineSettings) -> dict[str, str]:
    """What must be the same at all nodes. `settings`: prepared."""
    options = [f"{name}={value}" for name, value in sorted(settings.options.items())]
    return {
        "--data-parallel-size": str(config.parallel.data_parallel_size),
        "--engine": config.engine.engine,
        "the model": fingerprint(settings.model),
        "--max-model-len": str(settings.max_model_len or "the model's"),
        "the engine's options": " ".join([*options, *settings.arguments])[:4096],
    }


METADATA_BYTES = 1 << 20


def fingerprint(model: str | None) -> str:
    """A model's name, and a hash of what its files say of it: a GGUF's head, or a folder's config.json."""
    if model is None:
        return "none"
    path = Path(model)
    head = path / "config.json" if path.is_dir() else path
    try:
        with open(head, "rb") as file:
            digest = hashlib.sha256(file.read(METADATA_BYTES)).hexdigest()[:12]
    except OSError:
        return model
    return f"{path.name} ({digest})"


def find_coordinator(host: str, port: int, facts: dict[str, str]) -> Here:
    """Ask until answered, for ever; says so once a minute. Raises StartupError where this node does not fit in."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = tcp_address(host, port)
    question = msgspec.msgpack.encode(WhereIs(PROTOCOL_VERSION, facts))
    say_at, refused = time.monotonic() + 2 * ASK_AGAIN_MS / 1000, False
    try:
        once = {zmq.SNDHWM: 1}
        asking = open_socket(context, zmq.DEALER, connect=address, max_bytes=MAX_BYTES, options=once, watched=CALLS)
        callers = Callers({asking: address})
        while True:
            with contextlib.suppress(zmq.Again):
                asking.send(question, zmq.NOBLOCK)
            if time.monotonic() >= say_at:
                logger.warning("waiting for the node with rank 0 at %s:%d (--data-parallel-address)", host, port)
                say_at = time.monotonic() + SAY_AGAIN_S
                refused = False
            if callers.look(time.monotonic()) and not refused:
                text = "%s:%d: the connection is refused: one of the two nodes has another --secret-file, or none, or "
                text += "another program has this port"
                logger.warning(text, host, port)
                refused = True
            if not asking.poll(ASK_AGAIN_MS):
                continue
            try:
                answer = ANSWER.decode(asking.recv_multipart()[-1])
            except codec.BadMessage:
                continue
            if answer.refusal:
                raise StartupError(f"the node at {host}:{port} does not take this one: {answer.refusal}")
            return seen_from(host, answer)
    finally:
        context.destroy(linger=0)


def seen_from(host: str, answer: Here) -> Here:
    """The coordinator's addresses, by the name that this node knows the head by: ZeroMQ asks for what is behind it each
    time that it connects, so a head that comes back elsewhere is found.
    """

    def seen(address: str) -> str:
        port = address.rpartition(":")[2]
        return tcp_address(host, int(port)) if address.startswith("tcp://") and port.isdecimal() else address

    return Here(seen(answer.front_publish), seen(answer.back_output), seen(answer.back_publish))


def own_host(towards: str, port: int) -> str:
    """This node's address as `towards` sees it."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, port))
        except OSError as error:
            raise StartupError(f"--data-parallel-address: cannot reach {towards}: {error.strerror or error}") from None
        return str(probe.getsockname()[0])
