"""A deployment kept full of requests for a while, and what came of it: for `quota.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import cycle

from paceline.core.frontend.events import Placed, Refuse
from paceline.core.requests import Output, SamplingParams
from paceline.net.frontend import FrontendShell

Size = tuple[int, int]
"""Prompt and answer, in tokens."""


class Answer:
    """Takes one request's answer."""

    def __init__(self, load: FullLoad) -> None:
        self._load = load
        self.request = 0
        self.asked = time.monotonic()
        self.last: float | None = None

    def handle(self, news: Placed | Output | Refuse) -> None:
        """A step's tokens; with the last one, the next request takes this one's place."""
        if isinstance(news, Refuse):
            raise RuntimeError(f"a benchmark in which requests fail measures nothing: {news.text}")
        if isinstance(news, Placed):
            return
        now = time.monotonic()
        if news.token_ids:
            self._load.token(self, now)
            self.last = now
        if news.finish_reason is not None:
            self._load.ended(self)


class FullLoad:
    """Keeps `count` requests at a deployment. Tokens are counted from `begin` seconds on."""

    def __init__(self, client: FrontendShell, sizes: Sequence[Size], count: int, begin_s: float) -> None:
        self._client = client
        self._sizes: Iterator[Size] = cycle(sizes)
        self._open: set[Answer] = set()
        self._begin = time.monotonic() + begin_s
        self._over = False
        self.tokens = 0
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        for _ in range(count):
            self._send()

    async def run(self, seconds: float) -> float:
        """Until so long after `begin`; returns how long was counted. Then everything is taken back."""
        await asyncio.sleep(max(0.0, self._begin + seconds - time.monotonic()))
        counted = time.monotonic() - self._begin
        self._over = True
        self._client.abandon([answer.request for answer in self._open])
        while self._client.machine.running:
            await asyncio.sleep(0.05)
        return counted

    def token(self, answer: Answer, now: float) -> None:
        if now < self._begin or self._over:
            return
        self.tokens += 1
        if answer.last is None:
            self.firsts.append(now - answer.asked)
        else:
            self.gaps.append(now - answer.last)

    def ended(self, answer: Answer) -> None:
        self._open.discard(answer)
        if not self._over:
            self._send()

    def _send(self) -> None:
        prompt, tokens = next(self._sizes)
        answer = Answer(self)
        self._open.add(answer)
        answer.request = self._client.submit(answer.handle, [1] * prompt, SamplingParams(max_tokens=tokens))
