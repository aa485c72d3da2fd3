"""ZeroMQ sockets as all shells use them: how one is opened, and the one loop in which all are read.

Every socket drops its queue when it is closed, bounds what it keeps for a peer that does not read, and refuses frames
that are too large before they are in memory. A shell reads a socket until nothing is left or a bound is reached, so
that no peer, however much it says, keeps the others from their turn.

Where the deployment has a secret, what leaves the machine is encrypted (`secret.py`). A coordinator under vLLM binds
its sockets before it imports anything else, so this module imports pyzmq alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import zmq

from paceline.core.limits import MAX_CONTROL_BYTES
from paceline.errors import StartupError

if TYPE_CHECKING:
    from paceline.net.links import BadFrames

SEND_QUEUE_MESSAGES = 10_000
RECEIVE_QUEUE_MESSAGES = 100_000
MESSAGES_A_TURN = 256
"""Read from one socket before the others get their turn and what is due is sent."""

# As plain numbers: to combine enumerations takes longer than to receive.
NOBLOCK, MORE, EVENTS, POLLIN = int(zmq.NOBLOCK), int(zmq.RCVMORE), int(zmq.EVENTS), int(zmq.POLLIN)


def tcp_address(host: str, port: int = 0) -> str:
    """A tcp address to bind; port 0 takes a free one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def open_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, *, max_bytes: int, bind: str | None = None,
    connect: str | None = None, routing_id: bytes | None = None, kept: int = RECEIVE_QUEUE_MESSAGES,
    options: Mapping[zmq.SocketOption, int] | None = None, watched: int = 0,
) -> zmq.Socket[bytes]:  # fmt: skip
    """A socket of `kind`, bound or connected. Frames over `max_bytes` end the sender's connection.

    `kept`: received messages of one peer that wait to be read; the peer keeps what is beyond. `options`: further ones
    of ZeroMQ's, which hold for the first peer too. `watched`: the events that its monitor socket shall tell of, from
    the first try to connect on.

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
    if address.startswith("tcp://") and SECRET in os.environ:
        # Not needed where nothing leaves the machine, nor under vLLM.
        from paceline.net.secret import keys_of

        keys = keys_of(os.environ[SECRET])
        curve: dict[zmq.SocketOption, bytes | int] = {
            zmq.CURVE_SERVERKEY: keys.binder_public,
            zmq.CURVE_PUBLICKEY: keys.public,
        }
        if bind is not None:
            curve = {zmq.CURVE_SERVER: 1}
        curve[zmq.CURVE_SECRETKEY] = keys.secret if bind is None else keys.binder_secret
        for key, given in curve.items():
            socket.setsockopt(key, given)
    if watched:
        socket.get_monitor_socket(watched)
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


SECRET = "PACELINE_CURVE_SECRET"
"""Names the file of the deployment's secret to the node's processes (`secret.py`)."""
DOORS_S = 2.0
"""Between two looks whether the files of sockets are there."""


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


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether something can be read now; this costs a fraction of what a poll does."""
    return bool(int(socket.getsockopt(EVENTS)) & POLLIN)


def drain(
    socket: zmq.Socket[bytes], bad_frames: BadFrames, *, parts: int | None = 1, messages: int = sys.maxsize,
    until: float = float("inf"), clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[bytes]]:  # fmt: skip
    """What is there, a message of `parts` frames at a time; messages of other lengths are bad frames.

    It ends when nothing is left, after so many `messages`, at the time `until`, or when the socket is closed.
    `parts`: None takes each frame for a message. To ask after each whether it was the last costs as much as all else;
    what belongs to none is then no message either.
    """
    receive, more = socket.recv, socket.getsockopt
    for _ in range(messages):
        if socket.closed:
            return
        try:
            message = [receive(NOBLOCK)]
        except zmq.Again:
            return
        while parts is not None and more(MORE):
            message.append(receive(NOBLOCK))
        if parts is None or len(message) == parts:
            yield message
        else:
            bad_frames.add("frames", f"{len(message)} frames in place of {parts}")
        # A flood of bad frames is bounded too.
        if clock() >= until:
            return


class CoordinatorSockets:
    """The three sockets of a coordinator, bound; raises StartupError where an address cannot be.

    `front`: what front-ends hear, and say; `back_in`: what ranks say; `back_out`: what ranks hear. `kept`: messages of
    one rank that wait unread. `front_options`, `back_options`: ZeroMQ's, for the two that publish.
    """

    def __init__(
        self, front_publish: str, back_output: str, back_publish: str, *, kept: int,
        front_options: Mapping[zmq.SocketOption, int], back_options: Mapping[zmq.SocketOption, int],
    ) -> None:  # fmt: skip
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context, limit = self._context, MAX_CONTROL_BYTES
        self.front = open_socket(context, zmq.XPUB, bind=front_publish, max_bytes=limit, options=front_options)
        self.back_in = open_socket(context, zmq.PULL, bind=back_output, max_bytes=limit, kept=kept)
        self.back_out = open_socket(context, zmq.XPUB, bind=back_publish, max_bytes=limit, options=back_options)

    def addresses(self) -> tuple[str, str, str]:
        """Where each of the three can be reached, with the ports that were found for port 0."""
        return bound_address(self.front), bound_address(self.back_in), bound_address(self.back_out)

    def close(self) -> None:
        self._context.destroy(linger=0)
