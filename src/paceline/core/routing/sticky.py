"""Sticky until saturated, as one front-end does it by itself: to the rank that holds most of the prompt's prefix,
unless another one is done with the whole of it sooner.

This is for requests that are bound when they arrive: where there is no queue, or the coordinator is away. What waits in
the queue is bound by the coordinator, which knows all front-ends' sends (`dispatch/homes.py` has the same rule with
every rank's costs). A front-end remembers what went through it alone; a wrong guess costs what routing without
affinity costs always.

Prompts ahead at a rank and what it would have to compute are both tokens, so they add up: a request goes where the sum
is least; what decodes there only makes steps longer, and counts little. A client's key counts where no prefix is
known, as one that it holds all of.
"""

from __future__ import annotations

from paceline.core.blocks import BLOCK_TOKENS, LEAST_ENTRIES, MAX_ENTRIES, BlockIndex
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Query, least_loaded
from paceline.core.routing.session import session_name

COMPARED = 16
"""Of many ranks with the same prefix, so many least loaded ones are compared as least-load does."""

RUNNING_TOKENS = 32
"""What a request weighs besides its prompt, as in the queue (`dispatch/capacity.py`)."""


class Sticky(LeastLoad):
    """Where the prompts ahead and what is lacking of this one are least. Else, and among equals, as LeastLoad."""

    names = True

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self.index = BlockIndex()
        self._lives: dict[int, int] = {}
        self._membership: tuple[Candidates, int] | None = None
        self._reason = ""

    def choose(self, candidates: Candidates, query: Query) -> int:
        known = self._membership
        if known is None or known[0] is not candidates or known[1] != candidates.membership:
            self._take_members(candidates)
        other = super().choose(candidates, query)
        place = candidates.place(other)
        assert place is not None
        best, least = other, self._ahead(candidates[place])
        self._reason = "no prefix known"
        for held, holders in self._held(query):
            self._reason = f"{held} tokens of prefix"
            places = self._usable(candidates, holders, least + held)
            if places:
                rank = candidates.ranks[places[0]]
                best = rank if len(places) == 1 else self.choose_among(candidates, query, places)
                break
            self._reason = f"ranks with {held} tokens of prefix are overloaded"
        return best

    def held(self, rank: int, query: Query) -> int:
        return next((held for held, holders in self._held(query) if holders >> rank & 1), 0)

    def sent(self, rank: int, query: Query) -> None:
        if query.session is not None:
            self.index.sent(rank, (session_name(query.session),))
        self.index.sent(rank, query.blocks)

    def reason(self) -> str:
        return self._reason

    def _held(self, query: Query) -> list[tuple[int, int]]:
        """Tokens of the prompt, and the ranks that hold them, most first."""
        found = [(count * BLOCK_TOKENS, holders) for count, holders in self.index.held(query.blocks)]
        if not found and query.session is not None:
            found = [(query.prompt_tokens, one) for _, one in self.index.held((session_name(query.session),))]
        return found

    def _usable(self, candidates: Candidates, holders: int, limit: int) -> list[int]:
        """The places of the ranks to choose among, of those in `holders`; empty where all have too much to do."""
        places: list[int] = []
        if holders.bit_count() > COMPARED:
            works = self.works(candidates)
            places = least_loaded(works, holders, candidates.ranks, works.keys[-1] + works.total, COMPARED)
            holders = 0
        while holders:
            lowest = holders & -holders
            holders ^= lowest
            place = candidates.place(lowest.bit_length() - 1)
            if place is not None:
                places.append(place)
        return [place for place in places if self._ahead(candidates[place]) <= limit]

    def _ahead(self, candidate: Candidate) -> int:
        others = self.frontend_count - 1
        requests = candidate.requests + others * candidate.since_view_requests
        return candidate.prefill_tokens + others * candidate.since_view_tokens + RUNNING_TOKENS * requests

    def _take_members(self, candidates: Candidates) -> None:
        lives = {candidate.rank: candidate.life for candidate in candidates}
        for rank, life in self._lives.items():
            if lives.get(rank) != life:
                self.index.forget(rank)
        self._lives = lives
        self._membership = (candidates, candidates.membership)
        self.index.resize(max(LEAST_ENTRIES, MAX_ENTRIES // len(candidates)))
