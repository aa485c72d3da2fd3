"""What clients ask for: arrivals from a seed."""

from __future__ import annotations

import math
import random

from msgspec import Struct

MAX_PROMPT_TOKENS = 4096
MAX_ANSWER_TOKENS = 300


class Arrival(Struct, frozen=True):
    """One request: when it comes (seconds from the start), to which front-end, and its sizes in tokens.

    `rank`: the rank that it names, if any. `patience_s`: after how many seconds its client hangs up, None for never.
    """

    at: float
    frontend: int
    prompt_tokens: int
    answer_tokens: int
    rank: int | None = None
    patience_s: float | None = None


def drawn(stream: random.Random, requests: int, duration_s: float, ranks: int, frontends: int) -> list[Arrival]:
    """`requests` arrivals within `duration_s`: singles, bursts and quiet times between, so that waves begin and end."""
    arrivals: list[Arrival] = []
    while len(arrivals) < requests:
        at = stream.random() * duration_s
        burst = stream.choice((1, 1, 1, 2, 4, 8, 16))
        width_s = stream.choice((0.0, 0.002, 0.05, 0.5))
        for _ in range(min(burst, requests - len(arrivals))):
            arrivals.append(_arrival(stream, at + stream.random() * width_s, ranks, frontends))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrival(stream: random.Random, at: float, ranks: int, frontends: int) -> Arrival:
    return Arrival(
        at,
        stream.randrange(frontends),
        _size(stream, 120, 1.2, MAX_PROMPT_TOKENS),
        _size(stream, 12, 1.0, MAX_ANSWER_TOKENS),
        stream.randrange(ranks) if stream.random() < 0.2 else None,
        stream.random() * 0.5 if stream.random() < 0.05 else None,
    )


def _size(stream: random.Random, median: float, spread: float, largest: int) -> int:
    return min(largest, max(1, round(median * math.exp(spread * stream.gauss(0.0, 1.0)))))
