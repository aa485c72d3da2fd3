"""The load of `overload.py`: streaming clients that ask at set moments, or one request after the other."""

from __future__ import annotations

import asyncio
import json
import random
import time
from array import array
from collections.abc import Iterable

from msgspec import Struct

PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
TOO_MANY = 429


class Got(Struct):
    """What has come of one request. `at`: when it was to be sent; `retry_after_s`: what a refusal said, if any."""

    at: float
    status: int = 0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    retry_after_s: int = 0

    @property
    def served(self) -> bool:
        return self.status == 200 and self.tokens == ANSWER_TOKENS

    @property
    def wait_s(self) -> float:
        return self.first - self.at


class Load:
    """Clients of one port. `got`: the requests' outcomes, in order of their ends; `tokens_at`: when each token came."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._body = json.dumps({"prompt": "x" * PROMPT_TOKENS, "max_tokens": ANSWER_TOKENS, "stream": True}).encode()
        self.got: list[Got] = []
        self.tokens_at: array[float] = array("d")

    async def ask(self, at: float) -> Got:
        """Ask at that moment, on a connection of its own, and read the answer to its end."""
        got = Got(at)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(self._body)}"
            writer.write(head.encode() + b"\r\n\r\n" + self._body)
            await self._read(reader, got)
            writer.close()
        except OSError:
            # No answer: a status of 0 says so.
            pass
        self.got.append(got)
        return got

    async def _read(self, reader: asyncio.StreamReader, got: Got) -> None:
        while line := await reader.readline():
            if not got.status and line.startswith(b"HTTP/1.1 "):
                got.status = int(line.split()[1])
            elif line.lower().startswith(b"retry-after:"):
                got.retry_after_s = int(line.partition(b":")[2])
            elif line.startswith(b"data: {") and b'"text"' in line:
                got.last = time.monotonic()
                got.first = got.first or got.last
                got.tokens += 1
                self.tokens_at.append(got.last)

    async def at_moments(self, moments: Iterable[float]) -> list[Got]:
        """Open loop: a request at each of these moments, whatever has come of the others."""
        return list(await asyncio.gather(*(self.ask(at) for at in moments)))

    async def one_after_the_other(self, clients: int, until: float) -> None:
        """Closed loop: so many clients, of which each asks again as soon as it has its answer."""

        async def client() -> None:
            while time.monotonic() < until:
                await self.ask(time.monotonic())

        await asyncio.gather(*(client() for _ in range(clients)))

    async def until_served(self, at: float) -> int:
        """Ask, and come back when told, until there is an answer; returns how often that was asked for."""
        tries = 1
        while not (got := await self.ask(at)).served and got.status == TOO_MANY:
            tries += 1
            at = time.monotonic() + got.retry_after_s
        return tries

    def tokens_a_second(self, begin: float, end: float) -> float:
        return sum(begin <= at < end for at in self.tokens_at) / (end - begin)


def poisson(begin: float, end: float, a_second: float, seed: int) -> list[float]:
    chance, moments, at = random.Random(seed), [], begin
    while (at := at + chance.expovariate(a_second)) < end:
        moments.append(at)
    return moments
