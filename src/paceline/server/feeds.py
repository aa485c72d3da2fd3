"""What is pushed: server-sent events that say the same to all who listen.

    feed = Feed(make, interval_s)
    return feed.response(beat_s)

While somebody listens, `make` is called at the interval, once for all, and what has changed goes out. Whoever reads too
slowly misses what came meanwhile and gets the newest: nothing is queued for anybody. Where nothing changes, a comment
goes out every few seconds, so that no proxy cuts the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

from msgspec import Meta, Struct
from starlette.responses import StreamingResponse

QUIET_S = 5.0
COMMENT = b": nothing new\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""The second has nginx hand on each event as it comes."""


class LoadsQuery(Struct):
    """What `/loads` may be asked."""

    stream: Annotated[bool, Meta(description="push them as server-sent events, as often as they change")] = False
    interval: Annotated[float, Meta(ge=0, le=3600, description="least seconds between two of them")] = 0.0


class Feed:
    """One kind of events. `make`: the data of one, as JSON; `interval_s`: the least time between two."""

    def __init__(self, make: Callable[[], bytes | Awaitable[bytes]], interval_s: float) -> None:
        self.interval_s = interval_s
        self._make = make
        self._data = b""
        self._number = 0
        self._changed = asyncio.Event()
        self._listeners = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        self._changed.set()

    def response(self, interval_s: float = 0.0) -> StreamingResponse:
        """The events as an answer, at most one each `interval_s`."""
        return StreamingResponse(self._events(interval_s), media_type="text/event-stream", headers=HEADERS)

    async def _events(self, interval_s: float) -> AsyncIterator[bytes]:
        self._listeners += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        seen = 0
        try:
            while not self._closed:
                if seen != self._number:
                    seen = self._number
                    yield b"data: " + self._data + b"\n\n"
                    if interval_s > self.interval_s:
                        await asyncio.sleep(interval_s)
                    continue
                changed = self._changed
                try:
                    await asyncio.wait_for(changed.wait(), QUIET_S)
                except TimeoutError:
                    yield COMMENT
        finally:
            self._listeners -= 1

    async def _run(self) -> None:
        while self._listeners:
            made = self._make()
            data = made if isinstance(made, bytes) else await made
            if data != self._data:
                self._data = data
                self._number += 1
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(self.interval_s)
