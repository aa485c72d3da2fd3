"""How the members of a generation find each other: one listening socket a rank, one connection a pair.

Of each pair the later rank connects to the earlier one. The first bytes on a connection say the generation and
the two ranks; a connection that says anything else is dropped, so that neither a stranger nor a rank of another
generation becomes a member.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from paceline.errors import StartupError
from paceline.runtime.collective import SocketGroup
from paceline.runtime.doorway import GREETING, Doorway, Greeting, packed, read_greeting

TRY_AGAIN_S = 0.02
LOOK_UP_S = 0.2
"""How often whoever only waits for others sees whether it is still wanted."""
LISTEN_BACKLOG = 1024


class GroupListener:
    """A rank's address for its peers: `ipc://PATH` or `tcp://HOST:PORT`, port 0 for a free one.

    It outlives generations. Raises StartupError where the address cannot be had.
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
    listener: GroupListener, generation: int, rank: int, addresses: Mapping[int, str], timeout_s: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> SocketGroup:  # fmt: skip
    """A group of sockets; see `connect_members`."""
    return SocketGroup(generation, rank, connect_members(listener, generation, rank, addresses, timeout_s, cancelled))


def connect_members(
    listener: GroupListener, generation: int, rank: int, addresses: Mapping[int, str], timeout_s: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[int, socket.socket]:  # fmt: skip
    """Connect with all other members of `generation`; `addresses` has every member's, this rank's included.

    Raises StartupError after `timeout_s`, naming the ranks that did not come, or soon after `cancelled`.
    """
    links: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout_s
    doorway = Doorway(listener.socket, generation, rank, {peer for peer in addresses if peer > rank})
    try:
        earlier = [peer for peer in sorted(addresses) if peer < rank]
        while len(links) < len(addresses) - 1:
            for peer in earlier:
                if peer not in links and (link := _connect(addresses[peer], generation, rank, peer)) is not None:
                    links[peer] = link
            if len(links) == len(addresses) - 1:
                break
            left_s = deadline - time.monotonic()
            if left_s <= 0 or cancelled():
                missing = ", ".join(str(peer) for peer in sorted(addresses) if peer != rank and peer not in links)
                raise StartupError(f"generation {generation}: rank {missing} did not come within {timeout_s:g} s")
            waits_for_others = any(peer not in links for peer in earlier)
            pause_s = min(left_s, TRY_AGAIN_S if waits_for_others else LOOK_UP_S)
            for peer, link in doorway.wait(pause_s).items():
                _prefer_latency(link)
                if peer in links:
                    links[peer].close()
                links[peer] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    finally:
        doorway.close()
    return links


def _connect(address: str, generation: int, rank: int, peer: int) -> socket.socket | None:
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
        link.sendall(packed((generation, rank, peer)))
        # The peer answers when it forms the same generation; until then this connection waits in its queue.
        if _answer_on(link) == (generation, peer, rank):
            link.sendall(packed((generation, rank, peer)))
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


def group_path(folder: str | os.PathLike[str], rank: int) -> str:
    """The ipc address of a rank's listener in a folder."""
    return f"ipc://{os.fspath(folder)}/group-{rank}"
