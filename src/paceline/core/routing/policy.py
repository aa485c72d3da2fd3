"""What a routing policy is: a class that chooses a rank for a request.

A policy is pure: the same candidates and queries in the same order give the same ranks. It has no clock, and where
it draws, it draws from a generator of its own with a fixed seed. It may remember what it chose. It must be quick: a
front-end asks it for every request, before the request goes anywhere.

When the preferred rank of a session has too much to do.

Affinity saves work, and blindly followed it makes one rank do everybody's. So a preferred rank is passed over where
its queued work (prompt tokens, and REQUEST_TOKENS for each request) is more than the least loaded rank's by more than

    GUARD_TOKENS + GUARD_SHARE x the mean rank's work

The first term lets an idle deployment keep a session at its rank, the second lets loads differ in a busy one as
they do without affinity too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from msgspec import Struct

from paceline.core.load import REQUEST_TOKENS
from paceline.core.ordering import PLACE_MASK, Ordering
from paceline.core.routing.candidates import Candidate, Candidates


class Query(Struct, frozen=True, gc=False):
    """What is known of a request before it has a rank.

    `prompt_tokens`: how many. `prompt_token_ids`: which; may be empty where nobody knows them. `session`: the key
    that its client gave, None without. `priority`: lower is sooner. `blocks`: names of the prompt's beginnings
    (`core/blocks.py`), for a policy that `names` them.
    """

    prompt_tokens: int
    prompt_token_ids: Sequence[int] = ()
    session: str | None = None
    priority: int = 0
    blocks: Sequence[int] = ()


class Policy(ABC):
    """Chooses ranks for one front-end, `frontend_index` of the `frontend_count` that balance over the same ranks."""

    names = False
    """Whether it looks at `Query.blocks`."""
    frontend_index = 0
    frontend_count = 1

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        self.frontend_index = frontend_index
        self.frontend_count = max(1, frontend_count)

    @abstractmethod
    def choose(self, candidates: Candidates, query: Query) -> int:
        """The rank for a request. `candidates` is never empty; ranks come and go between two calls."""

    def held(self, rank: int, query: Query) -> int:
        """How many tokens of the prompt the rank is believed to hold."""
        return 0

    def sent(self, rank: int, query: Query) -> None:  # noqa: B027
        """The request has gone to this rank, whoever chose it. For who remembers that."""

    def reason(self) -> str:
        """Why the last choice was made, in a few words, where there is more to say than the loads do."""
        return ""


class Belief(Struct, frozen=True):
    """What a decision was based on: the public part of a Candidate."""

    rank: int
    requests: int
    prefill_tokens: int
    in_flight: int


class Decision(Struct, frozen=True, omit_defaults=True):
    """One choice, as its client is told of it if it asks.

    `believed`: what was believed of the chosen rank, before this request. `alternatives`: the same of the least
    loaded others, at most three. `ranks`: how many there were to choose from. `home`: the rank that had best serve it
    of those that hold its beginning, `prefix_tokens` of it, known by `blocks` that were sent there or by its client's
    `key`; `home_ms`, `elsewhere_ms`: the predicted time to its first token there, and at the best of the others.
    """

    policy: str
    rank: int
    prompt_tokens: int
    ranks: int
    believed: Belief
    alternatives: list[Belief]
    reason: str = ""
    home: int | None = None
    prefix_tokens: int = 0
    known_by: str = ""
    home_ms: int | None = None
    elsewhere_ms: int | None = None


def belief(candidate: Candidate) -> Belief:
    return Belief(candidate.rank, candidate.requests, candidate.prefill_tokens, candidate.in_flight)


GUARD_TOKENS = 8 * REQUEST_TOKENS
GUARD_SHARE = 0.5


def guard(works: Ordering[Candidate]) -> int:
    """The most work that a preferred rank may have queued, in prompt tokens."""
    mean = works.total / len(works.keys)
    return works.least() + GUARD_TOKENS + int(GUARD_SHARE * mean)


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
