"""The exact accounting: what a front-end knows of a rank, with nothing counted twice and nothing lost.

A load report is always old: requests were on their way to the rank while it was made. Systems that let
a report overwrite what they knew forget those requests, and the next burst piles up on one rank;
systems that add their own sends to a report count some twice. Both are cured by one number. Every
front-end numbers its sends to each life of a rank, and a rank's report says, per front-end, the number
of the last one it has taken in. Sends at or below that number are inside the report's counts, sends
above it are not. A report may therefore come late, twice or out of turn, and the sum is still right:

    what the rank has, as of its report  +  what this front-end has sent it since

`Ledger` is that sum's second half. The coordinator keeps the same ledgers from the front-ends' notices
of their sends, so that a view also tells each front-end what the others have on the wire.
"""

from __future__ import annotations

from collections import deque

import msgspec

from paceline.protocol.messages import Load

REQUEST_TOKENS = 256
"""What one queued request weighs besides its prompt, in prompt tokens: its answer is yet to come."""

MAX_LEDGER_SENDS = 65536
"""Sends kept one by one. A rank that leaves more than this unreported is not taking requests in."""


class Ledger:
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
        if len(self._sends) > MAX_LEDGER_SENDS:
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


def waiting_for_a_slot(load: Load) -> int:
    """How many of the waiting requests cannot start at once, as far as slots go."""
    return max(0, load.waiting - max(0, load.slots - load.running))


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
        """`tokens` took `seconds`."""
        keep = 0.5 ** (seconds / self._half_life_s)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def rate(self) -> float:
        """Tokens a second, 0 until known; three digits, so that noise does not look like a change."""
        if self._seconds <= 0.0:
            return 0.0
        return float(f"{self._tokens / self._seconds:.3g}")
