"""Who knocks at a rank's address for its peers while a generation forms: all are heard at once.

Anybody who reaches the address can connect and say nothing, or something else; that must not hold up those who are
expected. So nobody is waited for: each is heard as its bytes come.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Set

from msgspec import Struct

GREETING = struct.Struct("<8sQII")
MAGIC = b"paceline"
MOST_WAITING = 128
"""Connections that have not said all of their greeting; beyond that the oldest is dropped."""

Greeting = tuple[int, int, int]
"""(generation, whose it is, whom it means)."""


def packed(greeting: Greeting) -> bytes:
    """A greeting on the wire."""
    return GREETING.pack(MAGIC, *greeting)


def read_greeting(data: bytes | bytearray) -> Greeting | None:
    """A whole greeting; None for anything else of that length."""
    magic, generation, rank, peer = GREETING.unpack(data)
    return (generation, rank, peer) if magic == MAGIC else None


class _Knock(Struct):
    """One connection: what has come of its greeting, and the first one, once that was answered."""

    link: socket.socket
    data: bytearray
    answered: Greeting | None = None


class Doorway:
    """The listening socket of one rank while it forms `generation`; those in `later` are to come.

    A peer greets, is answered, and greets again: one that gave up waiting in the queue, and came again on a new
    connection, does not greet again on the old one.
    """

    def __init__(self, listening: socket.socket, generation: int, rank: int, later: Set[int]) -> None:
        self._listening = listening
        self._generation = generation
        self._rank = rank
        self._later = later
        self._knocks: dict[int, _Knock] = {}

    def wait(self, seconds: float) -> dict[int, socket.socket]:
        """Hear whoever says something within this time, at least once; returns the links of those who are members."""
        poller = select.poll()
        poller.register(self._listening, select.POLLIN)
        for descriptor in self._knocks:
            poller.register(descriptor, select.POLLIN)
        come: dict[int, socket.socket] = {}
        for descriptor, _ in poller.poll(int(seconds * 1000) + 1):
            knock = self._knocks.get(descriptor)
            if knock is None:
                self._open()
            elif (peer := self._hear(knock)) is not None:
                if peer in come:
                    come[peer].close()
                come[peer] = self._knocks.pop(descriptor).link
        return come

    def close(self) -> None:
        """Nobody else is expected."""
        for descriptor in list(self._knocks):
            self._knocks.pop(descriptor).link.close()

    def _open(self) -> None:
        """Let all in who are there."""
        for _ in range(MOST_WAITING):
            try:
                link, _ = self._listening.accept()
            except OSError:
                return
            link.setblocking(False)
            self._knocks[link.fileno()] = _Knock(link, bytearray())
            if len(self._knocks) > MOST_WAITING:
                self._drop(next(iter(self._knocks.values())))

    def _hear(self, knock: _Knock) -> int | None:
        """Read on; returns the peer whose greeting is complete."""
        try:
            part = knock.link.recv(GREETING.size - len(knock.data))
            knock.data += part
            if part and len(knock.data) < GREETING.size:
                return None
            greeting = read_greeting(knock.data) if part else None
            if knock.answered is None and greeting is not None and self._expects(greeting):
                knock.link.sendall(packed((self._generation, self._rank, greeting[1])))
                knock.answered, knock.data = greeting, bytearray()
                return None
            if greeting is not None and greeting == knock.answered:
                return greeting[1]
        except BlockingIOError:
            return None
        except OSError:
            pass
        self._drop(knock)
        return None

    def _expects(self, greeting: Greeting) -> bool:
        generation, peer, meant = greeting
        return generation == self._generation and meant == self._rank and peer in self._later

    def _drop(self, knock: _Knock) -> None:
        del self._knocks[knock.link.fileno()]
        knock.link.close()
