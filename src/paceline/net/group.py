"""A lockstep rank as a member of its group: how the members of an epoch find each other, agree, and wait.

Each rank has one listening socket, and each pair of members one connection: the later rank connects to the earlier
one. The first bytes on a connection are a handshake that says the epoch and the two ranks; a connection that says
anything else is dropped, so that neither a stranger nor a rank of another epoch becomes a member. Where the nodes share
a secret, both sides prove in it that they have it, and what follows is sealed (`net/secret.py`). Anybody that reaches
the address can connect and say nothing. That must not hold up those that are expected, so nobody is waited for: each is
heard as its bytes come.

When all are connected the group is a `SocketGroup` (`net/collective.py`), in which the ranks agree after their steps.
How long a rank waits there for its peers is watched by a thread of its own, since the engine's thread is what waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from paceline.core.messages import GroupMember
from paceline.core.rank.events import Agree, Agreed
from paceline.core.rank.prefill_quota import REDUCTIONS, integers, outcome
from paceline.engines.group import EpochEnded, RankGroup, Waiting
from paceline.errors import StartupError
from paceline.net.collective import SocketGroup
from paceline.net.links import refusals
from paceline.net.secret import NONCE_BYTES, PROOF_BYTES, Seal, peer_key, proof, proves
from paceline.net.sockets import tcp_address

GREETING = struct.Struct("<8sQII")
MAGIC = b"paceline"
MOST_WAITING = 128
"""Connections that have not said all of their greeting; beyond that the oldest is dropped."""

Greeting = tuple[int, int, int]
"""(epoch, whose it is, whom it means)."""


def packed(greeting: Greeting) -> bytes:
    return GREETING.pack(MAGIC, *greeting)


def read_greeting(data: bytes | bytearray) -> Greeting | None:
    """A whole greeting; None for anything else of that length."""
    magic, epoch, rank, peer = GREETING.unpack(data)
    return (epoch, rank, peer) if magic == MAGIC else None


def answer_bytes(key: bytes | None) -> int:
    return GREETING.size + (0 if key is None else NONCE_BYTES + PROOF_BYTES)


def nonce(key: bytes | None) -> bytes:
    return b"" if key is None else os.urandom(NONCE_BYTES)


class Link(NamedTuple):
    """A connection to a peer. `seal`: None where there is no secret."""

    socket: socket.socket
    seal: Seal | None


class _Handshake(Struct):
    """One connection: what has come of its greeting; the first one, once that was answered; all that was said."""

    link: socket.socket
    data: bytearray
    answered: Greeting | None = None
    said: bytes = b""

    def lacks(self, key: bytes | None) -> int:
        """How many bytes are still to come of what the peer says now."""
        further = NONCE_BYTES if self.answered is None else PROOF_BYTES
        return GREETING.size + (0 if key is None else further) - len(self.data)


class Handshakes:
    """The listening socket of one rank while it forms `epoch`; those in `later` are to come.

    A peer greets, is answered, and greets again: one that gave up waiting in the queue, and came again on a new
    connection, does not greet again on the old one. With a `key` the first greeting brings a random number, the answer
    another and a proof, and the second greeting a proof.
    """

    def __init__(
        self, listening: socket.socket, epoch: int, rank: int, later: Set[int], key: bytes | None = None
    ) -> None:
        self._listening = listening
        self._key = key
        self._epoch = epoch
        self._rank = rank
        self._later = later
        self._handshakes: dict[int, _Handshake] = {}

    def wait(self, seconds: float) -> dict[int, Link]:
        """Hear what is said within this time, at least once; returns the links of those that are members."""
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        for descriptor in self._handshakes:
            poller.register(descriptor, select.POLLIN)
        come: dict[int, Link] = {}
        for descriptor, _ in poller.poll(int(seconds * 1000) + 1):
            handshake = self._handshakes.get(descriptor)
            if handshake is None:
                self._open()
            elif (peer := self._hear(handshake)) is not None:
                if peer in come:
                    come[peer].socket.close()
                done = self._handshakes.pop(descriptor)
                come[peer] = Link(
                    done.link, None if self._key is None else Seal.of(self._key, done.said, connects=False)
                )
        return come

    def close(self) -> None:
        for descriptor in list(self._handshakes):
            self._handshakes.pop(descriptor).link.close()

    def _open(self) -> None:
        """Accept all that connect now."""
        for _ in range(MOST_WAITING):
            try:
                link, _ = self._listening.accept()
            except OSError:
                return
            link.setblocking(False)
            self._handshakes[link.fileno()] = _Handshake(link, bytearray())
            if len(self._handshakes) > MOST_WAITING:
                self._drop(next(iter(self._handshakes.values())))

    def _hear(self, handshake: _Handshake) -> int | None:
        """Read on; returns the peer whose greeting is complete."""
        try:
            part = handshake.link.recv(handshake.lacks(self._key))
            handshake.data += part
            if part and handshake.lacks(self._key):
                return None
            data = bytes(handshake.data)
            greeting = read_greeting(data[: GREETING.size]) if part else None
            if handshake.answered is None and greeting is not None and self._expects(greeting):
                answer = packed((self._epoch, self._rank, greeting[1])) + nonce(self._key)
                handshake.said = data + answer
                answer += b"" if self._key is None else proof(self._key, b"answers", handshake.said)
                handshake.link.sendall(answer)
                handshake.answered, handshake.data = greeting, bytearray()
                return None
            proven = self._key is None or proves(self._key, b"greets", handshake.said, data[GREETING.size :])
            if greeting is not None and greeting == handshake.answered and proven:
                return greeting[1]
            # Who ranks of another epoch are is no secret: they give up, and come again.
            if part and self._key is not None and (greeting is None or handshake.answered is not None):
                refusals.add("the peers' port")
        except BlockingIOError:
            return None
        except OSError:
            pass
        self._drop(handshake)
        return None

    def _expects(self, greeting: Greeting) -> bool:
        epoch, peer, meant = greeting
        return epoch == self._epoch and meant == self._rank and peer in self._later

    def _drop(self, handshake: _Handshake) -> None:
        del self._handshakes[handshake.link.fileno()]
        handshake.link.close()


TRY_AGAIN_S = 0.02
LOOK_UP_S = 0.2
"""How often a rank that only waits for others sees whether it is still wanted."""
LISTEN_BACKLOG = 1024


class GroupListener:
    """A rank's address for its peers: `ipc://PATH` or `tcp://HOST:PORT`, port 0 for a free one.

    It outlives epochs. Raises StartupError where the address cannot be had.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.key = peer_key(address)
        """What its peers must have."""
        self._path: str | None = None
        self.socket: socket.socket
        self.listen()

    def listen(self) -> None:
        """Begin, or begin anew where a cleaner has removed the socket's file."""
        address = self.address
        if self._path is not None:
            if os.path.exists(self._path):
                return
            self.socket.close()
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        self.socket, target = _socket_for(address)
        self._path = target if isinstance(target, str) else None
        # The port is the same in every life.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind(target)
        except OSError as error:
            raise StartupError(f"cannot listen for peers on {address}: {error.strerror or error}") from None
        self.address = address if isinstance(target, str) else tcp_address(target[0], self.socket.getsockname()[1])
        self.socket.listen(LISTEN_BACKLOG)
        self.socket.setblocking(False)

    def close(self) -> None:
        self.socket.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(self._path).unlink()


def form_group(
    listener: GroupListener, epoch: int, rank: int, addresses: Mapping[int, str], timeout_s: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> SocketGroup:  # fmt: skip
    """Connect with all other members of `epoch`; `addresses` has every member's, this rank's included.

    Raises StartupError after `timeout_s`, naming the ranks that did not come, or soon after `cancelled`.
    """
    links: dict[int, Link] = {}
    deadline, key = time.monotonic() + timeout_s, listener.key
    handshakes = Handshakes(listener.socket, epoch, rank, {peer for peer in addresses if peer > rank}, key)
    try:
        earlier = [peer for peer in sorted(addresses) if peer < rank]
        while len(links) < len(addresses) - 1:
            for peer in earlier:
                if peer not in links and (link := _connect(addresses[peer], epoch, rank, peer, key)) is not None:
                    links[peer] = link
            if len(links) == len(addresses) - 1:
                break
            left_s = deadline - time.monotonic()
            if left_s <= 0 or cancelled():
                missing = ", ".join(str(peer) for peer in sorted(addresses) if peer != rank and peer not in links)
                raise StartupError(f"epoch {epoch}: rank {missing} did not come within {timeout_s:g} s")
            waits_for_others = any(peer not in links for peer in earlier)
            pause_s = min(left_s, TRY_AGAIN_S if waits_for_others else LOOK_UP_S)
            for peer, link in handshakes.wait(pause_s).items():
                _prefer_latency(link.socket)
                if peer in links:
                    links[peer].socket.close()
                links[peer] = link
    except BaseException:
        for link in links.values():
            link.socket.close()
        raise
    finally:
        handshakes.close()
    seals = {peer: link.seal for peer, link in links.items() if link.seal is not None}
    return SocketGroup(epoch, rank, {peer: link.socket for peer, link in links.items()}, seals)


def _connect(address: str, epoch: int, rank: int, peer: int, key: bytes | None) -> Link | None:
    """A connection to a peer that listens, greeted and answered; None where there is none yet."""
    link, target = _socket_for(address)
    try:
        link.settimeout(1.0)
        link.connect(target)
        _prefer_latency(link)
        greeting = packed((epoch, rank, peer))
        said = greeting + nonce(key)
        link.sendall(said)
        # The peer answers when it forms the same epoch; until then this connection waits in its queue.
        answer = _answer_on(link, answer_bytes(key))
        if answer is not None and read_greeting(answer[: GREETING.size]) == (epoch, peer, rank):
            if key is None:
                link.sendall(greeting)
                return Link(link, None)
            said += answer[:-PROOF_BYTES]
            if proves(key, b"answers", said, answer[-PROOF_BYTES:]):
                link.sendall(greeting + proof(key, b"greets", said))
                return Link(link, Seal.of(key, said, connects=True))
    except OSError:
        pass
    link.close()
    return None


def _answer_on(link: socket.socket, size: int) -> bytes | None:
    """What a peer answers, waited for; None where it has gone."""
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            return None
        data += part
    return data


def _prefer_latency(link: socket.socket) -> None:
    if link.family != socket.AF_UNIX:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _socket_for(address: str) -> tuple[socket.socket, str | tuple[str, int]]:
    """A stream socket of an address's family, and what to bind it or connect it to. Raises StartupError."""
    if address.startswith("ipc://"):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), address.removeprefix("ipc://")
    host, port = host_and_port(address)
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM), (host, port)


def host_and_port(address: str) -> tuple[str, int]:
    """The two halves of `tcp://HOST:PORT`, brackets taken off. Raises StartupError for anything else."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit():
        raise StartupError(f"{address} is no address: ipc://PATH or tcp://HOST:PORT")
    return host.strip("[]"), int(port)


FORM_TIMEOUT_S = 1.0
"""How long a rank waits for its peers. Shorter than the coordinator's patience, which then calls the next one."""


class GroupMembership:
    """The listener that peers connect to, and the group of the current epoch, if there is one.

    `address`: where to listen, as for `GroupListener`. All but `leave` is called by the engine's thread.
    """

    def __init__(self, rank: int, address: str) -> None:
        self._rank = rank
        self._listener = GroupListener(address)
        self._group: SocketGroup | None = None
        self._left = False
        self.address = self._listener.address

    def form(self, epoch: int, members: Sequence[GroupMember]) -> RankGroup:
        """Leave the group there was, and form this one. Raises StartupError naming the ranks that did not come."""
        self._close_group()
        self._listener.listen()
        addresses = {member.rank: member.address for member in members}
        self._group = form_group(self._listener, epoch, self._rank, addresses, FORM_TIMEOUT_S, lambda: self._left)
        return self._group

    def agree(self, agree: Agree) -> Agreed:
        """What all ranks' parts come to. Raises EpochEnded."""
        if self._group is None:
            raise EpochEnded("this rank is in no epoch")
        reduced = self._group.all_reduce(integers(agree), REDUCTIONS)
        try:
            return outcome(reduced)
        except ValueError as error:
            self._group.leave()
            raise EpochEnded(f"epoch {self._group.epoch} has ended: {error}") from None

    def urge(self) -> None:
        """Have all ranks agree soon; any thread may call it."""
        if self._group is not None:
            self._group.urge()

    def urged(self) -> bool:
        """Whether some rank has asked for that since this was last called, at the end of each step."""
        return self._group is not None and self._group.urged()

    def waiting(self) -> Waiting | None:
        """For whom this rank waits, and how long; any thread may ask."""
        group = self._group
        return None if group is None else group.waiting()

    def break_off(self, epoch: int) -> None:
        """End the group that there is for all its members, if it is of an earlier epoch; any thread may call it.

        A step that is in it is made anew in the next one.
        """
        group = self._group
        if group is not None and group.epoch < epoch:
            group.leave()

    def leave(self) -> None:
        """End the epoch for this rank and so for all, for good; any thread may call it."""
        self._left = True
        if self._group is not None:
            self._group.leave()

    def close(self) -> None:
        self._close_group()
        self._listener.close()

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
