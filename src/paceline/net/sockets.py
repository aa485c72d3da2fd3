"""ZeroMQ sockets as all shells use them: addresses and limits.

Every socket drops its queue when it is closed, bounds what it keeps for a peer that does not read, and
refuses frames that are too large before they are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import zmq

from paceline.errors import StartupError

SEND_QUEUE_MESSAGES = 10_000
RECEIVE_QUEUE_MESSAGES = 100_000


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
