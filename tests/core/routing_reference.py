"""How least-load and least-requests choose, written down plainly: every rank is looked at for every choice.

The policies must choose the same, however they keep their ranks in order; `bench/routing_cost.py` compares the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.routing.candidates import Candidate

REQUEST_TOKENS = 256
"""What one queued request weighs besides its prompt, in prompt tokens: its answer is yet to come."""

EQUAL_SHARE = 0.125
"""Loads are not known better than this share of their mean; smaller differences decide nothing."""


class Rotation:
    """An order among equals: begins at a rank of this front-end's own, and moves on as ranks finish work.

    What all ranks have finished is known to every front-end alike, so the order moves for all of them
    together and they still begin at different ranks.
    """

    def __init__(self, frontend_index: int, frontend_count: int) -> None:
        self._index = frontend_index
        self._count = max(1, frontend_count)

    def position(self, place: int, size: int, finished: int) -> int:
        """How far back in the order the rank at `place` of `size` is."""
        begin = self._index * max(1, size // self._count) + finished
        return (place - begin) % size


class LeastLoad:
    """The rank with the least work queued: prompt tokens to compute and requests to answer."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        self._count = max(1, frontend_count)
        self._rotation = Rotation(frontend_index, frontend_count)
        self._sent = self._sent_before = 0

    def choose(self, candidates: Sequence[Candidate], prompt_tokens: int) -> int:
        others = self._count - 1
        sent = sum(c.since_view_requests for c in candidates)
        if sent < self._sent:
            self._sent_before = self._sent
        self._sent = sent
        rounds = min(2, max(sent, self._sent_before) // len(candidates))
        work = [
            c.prefill_tokens
            + others * c.since_view_tokens
            + REQUEST_TOKENS * (c.requests + others * c.since_view_requests)
            for c in candidates
        ]
        mean = sum(work) / len(work)
        limit = min(work) + rounds * others * (REQUEST_TOKENS + prompt_tokens) + EQUAL_SHARE * mean
        finished = sum(c.finished for c in candidates)
        _, _, rank = min(
            (c.in_flight, self._rotation.position(place, len(candidates), finished), c.rank)
            for place, c in enumerate(candidates)
            if work[place] <= limit
        )
        return rank


class LeastRequests:
    """The rank with the fewest requests waiting and running."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        self._count = max(1, frontend_count)
        self._rotation = Rotation(frontend_index, frontend_count)

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
