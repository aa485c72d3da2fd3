"""Pushed events: made once for all, the newest for whoever is slow, ended when the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

from paceline.server.feeds import Feed
from tests.pace import stretched


async def event(stream: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(stretched(10.0)):
        return await anext(stream)


def listen(feed: Feed) -> AsyncIterator[bytes]:
    return cast(AsyncIterator[bytes], feed.response().body_iterator)


async def pushed() -> None:
    said = [b"1"]
    made = 0

    def make() -> bytes:
        nonlocal made
        made += 1
        return said[0]

    feed = Feed(make, 0.001)
    first, second = listen(feed), listen(feed)
    assert await event(first) == await event(second) == b"data: 1\n\n"
    waiting = asyncio.create_task(event(first))
    before = made
    while made < before + 5:
        await asyncio.sleep(0)
    assert not waiting.done(), "nothing is new"
    said[0] = b"2"
    assert await waiting == b"data: 2\n\n"
    said[0] = b"3"
    assert await event(first) == b"data: 3\n\n"
    assert await event(second) == b"data: 3\n\n", "who has not read in between gets the newest"
    feed.close()
    assert [event async for event in first] == []


def test_events_are_pushed_when_they_change_and_end_with_the_server() -> None:
    asyncio.run(pushed())
