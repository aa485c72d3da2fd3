"""The exact accounting: what a front-end knows of a rank, with nothing counted twice and nothing lost.

A load report is always old: requests were on their way to the rank while it was made. Systems that let
a report overwrite what they knew forget those requests, and the next burst piles up on one rank;
systems that add their own sends to a report count some twice. Both are cured by one number. Every
front-end numbers its sends to each life of a rank, and a rank's report says, per front-end, the number
of the last one it has taken in. Sends at or below that number are inside the report's counts, sends
above it are not. A report may therefore come late, twice or out of turn, and the sum is still right:

    what the rank has, as of its report  +  what this front-end has sent it since

`Accounting` is that sum's second half. The coordinator keeps the same accountings from the front-ends' notices
of their sends, so that a view also tells each front-end what the others have on the wire.

Numbers that only grow, by one at a time: which of those that somebody names can be.

Waves, pauses and epochs are counted, and whoever hears of a higher one takes it up: so one absurd number
would be everybody's for ever, and the next one after the largest could not be said to anybody. Nobody counts that far,
so what is far beyond all that is known is nobody's number: whoever keeps such a counter asks here, and leaves it out.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

import msgspec
from msgspec import Meta

from paceline.core.requests import Count, Message


class Load(Message, frozen=True):
    """What a rank has queued, and how fast it works it off.

    `waiting`, `running`: requests. `slots`: how many can run at once. `prefill_tokens`: prompt tokens not yet computed,
    of waiting and running requests. `kv_used`, `kv_total`: tokens. `prefill_rate`, `decode_rate`: tokens a second, the
    rank's own moving averages, 0 until known. `finished`: requests this incarnation has ended, however they ended.
    `step_s`, `prompt_token_s`, `answer_token_s`: what a step costs, by the rank's own measurement: so many seconds, and
    more for each prompt token and for each token of an answer; all 0 until known. `step_tokens`: tokens that a step
    computes at most, 0 for any number. `decoding`: running requests that are past their prompts. `kv_reserved`: tokens
    of KV that the running requests may come to need. `answers_left`, `first_end`: of an earlier version, 0 now.
    `answer_tokens`: the expected length of one answer, a mean over all requests there. `kv_waiting`: tokens of KV that
    the waiting requests may come to need. `startable_tokens`: those of `prefill_tokens` that the next step could
    compute, of running requests and of those for which there is a slot and memory; null where the engine does not say.
    `prefill_quota`: prompt tokens that a lockstep step computed at most when this was reported, null for no limit; that
    it has changed is no reason for a report. `prompt_tokens`: of all prompts that have had their first token in this
    life, of which `cached_tokens` need not be computed. `held_tokens`: of prompts' beginnings that it says it holds.
    """

    waiting: Count = 0
    running: Count = 0
    slots: Count = 1
    prefill_tokens: Count = 0
    kv_used: Count = 0
    kv_total: Count = 0
    prefill_rate: Annotated[float, Meta(ge=0)] = 0.0
    decode_rate: Annotated[float, Meta(ge=0)] = 0.0
    finished: Count = 0
    step_s: Annotated[float, Meta(ge=0)] = 0.0
    prompt_token_s: Annotated[float, Meta(ge=0)] = 0.0
    answer_token_s: Annotated[float, Meta(ge=0)] = 0.0
    step_tokens: Count = 0
    decoding: Count = 0
    kv_reserved: Count = 0
    answers_left: Count = 0
    first_end: Count = 0
    answer_tokens: Count = 0
    kv_waiting: Count = 0
    startable_tokens: Count | None = None
    prefill_quota: Count | None = None
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    held_tokens: Count = 0


REQUEST_TOKENS = 256
"""What one queued request weighs besides its prompt, in prompt tokens: its answer is yet to come."""

MAX_ACCOUNTED_SENDS = 65536
"""Sends kept one by one. A rank that leaves more than this unreported is not taking requests in."""


class Accounting:
    """The sends from one front-end to one life of a rank that its reports do not hold yet."""

    __slots__ = ("_sends", "kv", "last", "requests", "taken", "tokens")

    def __init__(self) -> None:
        self._sends: deque[tuple[int, int, int]] = deque()
        self.last = 0
        self.taken = 0
        self.requests = 0
        self.tokens = 0
        self.kv = 0

    def sent(self, number: int, tokens: int, kv: int = 0) -> None:
        """Send `number` is on its way, with `tokens` prompt tokens, and may come to need `kv` tokens of KV.

        A number seen before changes nothing.
        """
        if number <= self.last:
            return
        self.last = number
        if number <= self.taken:
            return
        self._sends.append((number, tokens, kv))
        self.requests += 1
        self.tokens += tokens
        self.kv += kv
        if len(self._sends) > MAX_ACCOUNTED_SENDS:
            self._drop_first()

    def reported(self, taken: int) -> None:
        """A report counts all sends up to `taken`. An older report than the last changes nothing."""
        if taken <= self.taken:
            return
        self.taken = taken
        while self._sends and self._sends[0][0] <= taken:
            self._drop_first()

    def keep(self, count: int) -> None:
        """No more than so many are under way: the first sends have ended."""
        while self.requests > count:
            self._drop_first()

    def _drop_first(self) -> None:
        _, tokens, kv = self._sends.popleft()
        self.requests -= 1
        self.tokens -= tokens
        self.kv -= kv


def believed(load: Load, requests: int, tokens: int) -> Load:
    """`load` with `requests` more waiting, of `tokens` prompt tokens together."""
    if not requests:
        return load
    return msgspec.structs.replace(load, waiting=load.waiting + requests, prefill_tokens=load.prefill_tokens + tokens)


class SpeedMeter:
    """A moving average of tokens a second, weighted by the time they took.

    A step of 200 ms says more of a rank's speed than one of 2 ms, so tokens and seconds are averaged
    apart and divided last.
    """

    __slots__ = ("_half_life_s", "_seconds", "_tokens")

    def __init__(self, half_life_s: float = 5.0) -> None:
        self._half_life_s = half_life_s
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = 0.5 ** (seconds / self._half_life_s)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def rate(self) -> float:
        """Tokens a second, 0 until known; three digits, so that noise does not look like a change."""
        if self._seconds <= 0.0:
            return 0.0
        return float(f"{self._tokens / self._seconds:.3g}")


FAR = 2**48
"""Counting a thousand a second, this takes nine thousand years."""
NEAR = 2**40
"""Who knows a number already beyond that takes one that is so much higher, and no more."""


def plausible(number: int, known: int) -> bool:
    """Whether a counter of which `known` is known can have come to this number."""
    return number <= max(known, FAR) + NEAR
