"""A lockstep rank as a member of its group: how the members of an epoch find each other, agree, and wait.

Each rank has one listening socket, and each pair of members one connection: the later rank connects to the earlier
one. The first bytes on a connection are a handshake that says the epoch and the two ranks; a connection that says
anything else is dropped, so that neither a stranger nor a rank of another epoch becomes a member. Anybody who reaches
the address can connect and say nothing. That must not hold up those who are expected, so nobody is waited for: each is
heard as its bytes come.

When all are connected the group is a `SocketGroup` (`net/collective.py`), in which the ranks agree after their steps.
How long a rank waits there for its peers is watched by a thread of its own, since the engine's thread is what waits.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from msgspec import Struct

from paceline.core.messages import GroupMember
from paceline.core.rank.events import Agree, Agreed, Waited
from paceline.core.rank.prefill_quota import REDUCTIONS, integers, outcome
from paceline.engines.group import EpochEnded, RankGroup, Waiting
from paceline.errors import StartupError
from paceline.net.collective import SocketGroup

GREETING = struct.Struct("<8sQII")
MAGIC = b"paceline"
MOST_WAITING = 128
"""Connections that have not said all of their greeting; beyond that the oldest is dropped."""

Greeting = tuple[int, int, int]
"""(epoch, whose it is, whom it means)."""


def packed(greeting: Greeting) -> bytes:
    """A greeting on the wire."""
    return GREETING.pack(MAGIC, *greeting)


def read_greeting(data: bytes | bytearray) -> Greeting | None:
    """A whole greeting; None for anything else of that length."""
    magic, epoch, rank, peer = GREETING.unpack(data)
    return (epoch, rank, peer) if magic == MAGIC else None


class _Handshake(Struct):
    """One connection: what has come of its greeting, and the first one, once that was answered."""

    link: socket.socket
    data: bytearray
    answered: Greeting | None = None


class Handshakes:
    """The listening socket of one rank while it forms `epoch`; those in `later` are to come.

    A peer greets, is answered, and greets again: one that gave up waiting in the queue, and came again on a new
    connection, does not greet again on the old one.
    """

    def __init__(self, listening: socket.socket, epoch: int, rank: int, later: Set[int]) -> None:
        self._listening = listening
        self._epoch = epoch
        self._rank = rank
        self._later = later
        self._handshakes: dict[int, _Handshake] = {}

    def wait(self, seconds: float) -> dict[int, socket.socket]:
        """Hear whoever says something within this time, at least once; returns the links of those who are members."""
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        for descriptor in self._handshakes:
            poller.register(descriptor, select.POLLIN)
        come: dict[int, socket.socket] = {}
        for descriptor, _ in poller.poll(int(seconds * 1000) + 1):
            handshake = self._handshakes.get(descriptor)
            if handshake is None:
                self._open()
            elif (peer := self._hear(handshake)) is not None:
                if peer in come:
                    come[peer].close()
                come[peer] = self._handshakes.pop(descriptor).link
        return come

    def close(self) -> None:
        """Nobody else is expected."""
        for descriptor in list(self._handshakes):
            self._handshakes.pop(descriptor).link.close()

    def _open(self) -> None:
        """Let all in who are there."""
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
            part = handshake.link.recv(GREETING.size - len(handshake.data))
            handshake.data += part
            if part and len(handshake.data) < GREETING.size:
                return None
            greeting = read_greeting(handshake.data) if part else None
            if handshake.answered is None and greeting is not None and self._expects(greeting):
                handshake.link.sendall(packed((self._epoch, self._rank, greeting[1])))
                handshake.answered, handshake.data = greeting, bytearray()
                return None
            if greeting is not None and greeting == handshake.answered:
                return greeting[1]
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
"""How often whoever only waits for others sees whether it is still wanted."""
LISTEN_BACKLOG = 1024


class GroupListener:
    """A rank's address for its peers: `ipc://PATH` or `tcp://HOST:PORT`, port 0 for a free one.

    It outlives epochs. Raises StartupError where the address cannot be had.
    """

    def __init__(self, address: str) -> None:
        self._path: str | None = None
        try:
            if address.startswith("ipc://"):
                self._path = address.removeprefix("ipc://")
                self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.socket.bind(self._path)
                self.address = address
            else:
                host, port = host_and_port(address)
                self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
                self.socket.bind((host, port))
                found = self.socket.getsockname()[1]
                self.address = f"tcp://[{host}]:{found}" if ":" in host else f"tcp://{host}:{found}"
        except OSError as error:
            raise StartupError(f"cannot listen for peers on {address}: {error.strerror or error}") from None
        self.socket.listen(LISTEN_BACKLOG)
        self.socket.setblocking(False)

    def close(self) -> None:
        """Stop listening."""
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
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    handshakes = Handshakes(listener.socket, epoch, rank, {peer for peer in addresses if peer > rank})
    try:
        earlier = [peer for peer in sorted(addresses) if peer < rank]
        while len(links) < len(addresses) - 1:
            for peer in earlier:
                if peer not in links and (link := _connect(addresses[peer], epoch, rank, peer)) is not None:
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
                _prefer_latency(link)
                if peer in links:
                    links[peer].close()
                links[peer] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    finally:
        handshakes.close()
    return SocketGroup(epoch, rank, links)


def _connect(address: str, epoch: int, rank: int, peer: int) -> socket.socket | None:
    """A connection to a peer that listens, greeted and answered; None where there is none yet."""
    if address.startswith("ipc://"):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: object = address.removeprefix("ipc://")
    else:
        host, port = host_and_port(address)
        link = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        target = (host, port)
    try:
        link.settimeout(1.0)
        link.connect(target)  # type: ignore[arg-type]
        _prefer_latency(link)
        link.sendall(packed((epoch, rank, peer)))
        # The peer answers when it forms the same epoch; until then this connection waits in its queue.
        if _answer_on(link) == (epoch, peer, rank):
            link.sendall(packed((epoch, rank, peer)))
            return link
    except OSError:
        pass
    link.close()
    return None


def _answer_on(link: socket.socket) -> Greeting | None:
    """A peer's greeting, waited for; None where it is none, or the peer has gone."""
    data = b""
    while len(data) < GREETING.size:
        part = link.recv(GREETING.size - len(data))
        if not part:
            return None
        data += part
    return read_greeting(data)


def _prefer_latency(link: socket.socket) -> None:
    if link.family != socket.AF_UNIX:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def host_and_port(address: str) -> tuple[str, int]:
    """The two halves of `tcp://HOST:PORT`, brackets taken off. Raises StartupError for anything else."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit():
        raise StartupError(f"{address} is no address: ipc://PATH or tcp://HOST:PORT")
    return host.strip("[]"), int(port)


LOOKS_A_TIMEOUT = 5
LONGEST_LOOK_S = 5.0


class StallWatch:
    """Watches how long a rank has waited for its peers. It decides nothing: whom the ranks wait for goes to the
    coordinator, which finds out of all answers who holds the group up (`core/coordinator/epoch.py`).

    It says `Waited` after `timeout_s` of waiting, again after each `timeout_s`, and when it is over.

    `waiting`: what `RankGroup.waiting` says; `say`: called in the watch's thread.
    """

    def __init__(
        self, timeout_s: float, waiting: Callable[[], Waiting | None], say: Callable[[Waited], object]
    ) -> None:
        self._timeout_s = timeout_s
        self._waiting = waiting
        self._say = say
        self._stopping = threading.Event()
        self._said_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._stopping.set()

    def look(self) -> None:
        """Look once, and say what is new."""
        waiting = self._waiting()
        if waiting is None or waiting.seconds < self._timeout_s:
            if self._said_at_s is not None:
                self._said_at_s = None
                self._say(Waited(()))
        elif self._said_at_s is None or waiting.seconds >= self._said_at_s + self._timeout_s:
            self._said_at_s = waiting.seconds
            self._say(Waited(waiting.ranks, waiting.collective, waiting.kind, waiting.seconds))

    def _run(self) -> None:
        while not self._stopping.wait(min(LONGEST_LOOK_S, self._timeout_s / LOOKS_A_TIMEOUT)):
            self.look()


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
        """Leave, and stop listening."""
        self._close_group()
        self._listener.close()

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
