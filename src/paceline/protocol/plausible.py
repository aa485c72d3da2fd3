"""Numbers that only grow, by one at a time: which of those that somebody names can be.

Waves, suspensions and generations are counted, and whoever hears of a higher one takes it up: so one absurd number
would be everybody's for ever, and the next one after the largest could not be said to anybody. Nobody counts that far,
so what is far beyond all that is known is nobody's number: whoever keeps such a counter asks here, and leaves it out.
"""

from __future__ import annotations

FAR = 2**48
"""Counting a thousand a second, this takes nine thousand years."""
NEAR = 2**40
"""Who knows a number already beyond that takes one that is so much higher, and no more."""


def plausible(number: int, known: int) -> bool:
    """Whether a counter of which `known` is known can have come to this number."""
    return number <= max(known, FAR) + NEAR
