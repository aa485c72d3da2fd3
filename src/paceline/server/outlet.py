"""Sends an answer from wherever its parts come into being: no task is woken for a token.

ASGI's `send` is a coroutine that nearly never waits, so it is started by hand and is over at once. Where it
does wait, because the client does not read, a task goes on with it, and what comes meanwhile is kept, up to
a bound: a client past it is given up. `bench/results/http_stacks.md` has what this saves.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from starlette.types import Message, Send

MAX_KEPT_BYTES = 4 * 1024 * 1024
"""What is kept for a client that does not read, besides what the socket and the server hold."""


class Outlet:
    """The way out of one answer. `give_up` is called once where the client does not read; `full` says so."""

    __slots__ = ("_drainer", "_ended", "_give_up", "_kept", "_kept_bytes", "_send", "full")

    def __init__(self, send: Send, give_up: Callable[[], object]) -> None:
        self._send = send
        self._give_up = give_up
        self._kept: deque[Message] = deque()
        self._kept_bytes = 0
        self._drainer: asyncio.Task[None] | None = None
        self._ended = False
        self.full = False

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin the answer. Called once, first."""
        self._push({"type": "http.response.start", "status": status, "headers": headers}, 0)

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Send `data`, now or as soon as the client reads. `last`: it ends the answer; what comes after is void."""
        if self._ended:
            return
        self._ended = last
        self._push({"type": "http.response.body", "body": data, "more_body": not last}, len(data))

    def close(self) -> None:
        """Nothing more is to be sent."""
        self._ended = True
        self._kept.clear()
        if self._drainer is not None:
            self._drainer.cancel()

    def _push(self, message: Message, size: int) -> None:
        if self._drainer is not None:
            self._keep(message, size)
            return
        sending: Any = self._send(message)
        try:
            awaited = sending.send(None)
        except StopIteration:
            return
        self._drainer = asyncio.get_running_loop().create_task(self._drain(sending, awaited))

    def _keep(self, message: Message, size: int) -> None:
        self._kept.append(message)
        self._kept_bytes += size
        if self._kept_bytes > MAX_KEPT_BYTES:
            self.full = True
            self.close()
            self._give_up()

    async def _drain(self, sending: Any, awaited: Any) -> None:
        await _go_on(sending, awaited)
        while self._kept:
            message = self._kept.popleft()
            self._kept_bytes -= len(message.get("body", b""))
            await self._send(message)
        self._drainer = None


@types.coroutine
def _go_on(started: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Await a coroutine that was started by hand and now waits for `awaited`."""
    yield awaited
    yield from started.__await__()
