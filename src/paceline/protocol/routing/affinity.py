"""What routing by prefix and by session share: when the preferred rank has too much to do.

Affinity saves work, and blindly followed it makes one rank do everybody's. So a preferred rank is passed over where
its queued work (prompt tokens, and REQUEST_TOKENS for each request) is more than the least loaded rank's by more than

    GUARD_TOKENS + GUARD_SHARE x the mean rank's work + the prompt tokens that going there saves

The first term lets an idle deployment keep a session at its rank, the second lets loads differ in a busy one as
they do without affinity too, and the third is what going there is worth.
"""

from __future__ import annotations

from paceline.protocol.load import REQUEST_TOKENS
from paceline.protocol.ordering import PLACE_MASK, Ordering
from paceline.protocol.routing.candidates import Candidate

GUARD_TOKENS = 8 * REQUEST_TOKENS
GUARD_SHARE = 0.5


def guard(works: Ordering[Candidate], saved_tokens: int = 0) -> int:
    """The most work that a preferred rank may have queued, in prompt tokens."""
    mean = works.total / len(works.keys)
    return works.least() + GUARD_TOKENS + int(GUARD_SHARE * mean) + saved_tokens


def least_loaded(works: Ordering[Candidate], mask: int, ranks: list[int], limit: int, most: int) -> list[int]:
    """The places of the `most` least loaded ranks of `mask` (bit n for rank n) with work of at most `limit`."""
    found: list[int] = []
    for entry in works.entries[: works.up_to(limit)]:
        place = entry & PLACE_MASK
        if mask >> ranks[place] & 1:
            found.append(place)
            if len(found) == most:
                break
    return found
