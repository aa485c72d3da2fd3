"""Routing: which rank gets a request. `(candidates, request) -> rank`, one class a policy.

The difficulty is not to find the smallest number. It is that several front-ends choose at once, from
views that are a moment old, and that each of them would correct the same difference: where rank 2 is
one request short, four front-ends send it four. Two measures keep a burst level without a word between
them:

- What a front-end has sent since its view was made counts once for each front-end, because the others
  have most likely done the same meanwhile. `Since` is one cut through the sends to all ranks, which the view
  names (`LoadView.heard`).
- Ranks that differ by less than the other front-ends would put there in two rounds are equals: a view can hold one
  round of theirs for one rank and not yet for the next. Among equals a front-end keeps its own requests level,
  and begins at a rank of its own.

With every front-end's own requests level to within one, and each one's odd requests beginning elsewhere,
the ranks are level to within one too (`tests/protocol/test_routing.py` tries every remainder).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

REQUEST_TOKENS = 256
"""What one queued request weighs besides its prompt, in prompt tokens: its answer is yet to come."""

EQUAL_SHARE = 0.125
"""Loads are not known better than this share of their mean; smaller differences decide nothing."""


class Candidate(Struct, gc=False):
    """One rank as the front-end believes it: reported, plus what is on the wire.

    `requests`, `prefill_tokens`: all of the rank's, every front-end's. `in_flight`: this front-end's own.
    `since_view_requests`, `since_view_tokens`: those the coordinator had not been told of when it made the view.
    `finished`: as in Load.
    """

    rank: int
    requests: int
    prefill_tokens: int
    in_flight: int
    since_view_requests: int
    since_view_tokens: int
    finished: int


class Policy(Protocol):
    """Chooses a rank. Pure: the same candidates and request give the same rank, but for its own memory."""

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> int:
        """The rank for a request of `prompt_tokens`; `candidates` is never empty."""


class Rotation:
    """An order among equals: begins at a rank of this front-end's own, and moves on as ranks finish work.

    What all ranks have finished is known to every front-end alike, so the order moves for all of them
    together and they still begin at different ranks.
    """

    def __init__(self, front_end_index: int, front_end_count: int) -> None:
        self._index = front_end_index
        self._count = max(1, front_end_count)

    def position(self, place: int, size: int, finished: int) -> int:
        """How far back in the order the rank at `place` of `size` is."""
        begin = self._index * max(1, size // self._count) + finished
        return (place - begin) % size


class LeastLoad:
    """The rank with the least work queued: prompt tokens to compute and requests to answer."""

    def __init__(self, front_end_index: int = 0, front_end_count: int = 1) -> None:
        self._count = max(1, front_end_count)
        self._rotation = Rotation(front_end_index, front_end_count)

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> int:
        others = self._count - 1
        work = [
            c.prefill_tokens
            + others * c.since_view_tokens
            + REQUEST_TOKENS * (c.requests + others * c.since_view_requests)
            for c in candidates
        ]
        mean = sum(work) / len(work)
        limit = min(work) + 2 * others * (REQUEST_TOKENS + prompt_tokens) + EQUAL_SHARE * mean
        finished = sum(c.finished for c in candidates)
        _, _, rank = min(
            (c.in_flight, self._rotation.position(place, len(candidates), finished), c.rank)
            for place, c in enumerate(candidates)
            if work[place] <= limit
        )
        return rank


class LeastRequests:
    """The rank with the fewest requests waiting and running."""

    def __init__(self, front_end_index: int = 0, front_end_count: int = 1) -> None:
        self._count = max(1, front_end_count)
        self._rotation = Rotation(front_end_index, front_end_count)

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> int:
        others = self._count - 1
        finished = sum(c.finished for c in candidates)
        _, _, rank = min(
            (
                c.requests + others * c.since_view_requests,
                self._rotation.position(place, len(candidates), finished),
                c.rank,
            )
            for place, c in enumerate(candidates)
        )
        return rank


class RoundRobin:
    """Each rank in turn, whatever its load."""

    def __init__(self, front_end_index: int = 0, front_end_count: int = 1) -> None:
        self._next = front_end_index

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> int:
        rank = candidates[self._next % len(candidates)].rank
        self._next += 1
        return rank


POLICIES: dict[str, type[LeastLoad] | type[LeastRequests] | type[RoundRobin]] = {
    "least-load": LeastLoad,
    "least-requests": LeastRequests,
    "round-robin": RoundRobin,
}
"""`--routing` name to class."""
