"""Routing by load: the rank with the least work, or with the fewest requests; in turn, of two; and for lockstep.

The difficulty is not to find the smallest number. It is that several front-ends choose at once, from views that are a
moment old, and that each of them would correct the same difference: where rank 2 is one request short, four front-ends
send it four. Two measures keep a burst level without a word between them:

- What a front-end has sent since its view was made counts once for each front-end, because the others
  have most likely done the same meanwhile. `Since` is one cut through the sends to all ranks, which the view
  names (`LoadView.heard`).
- Ranks that differ by less than the other front-ends have most likely put there are equals: a view can hold one round
  of theirs for one rank and not yet for the next. They send about as much as this one does. So that is one round, or
  two at most, where this one has sent to all ranks since the view or between the two before it; and nothing where
  requests come so slowly that each is in a view before the next: there, to take differences for none would level
  requests in place of work. Among equals a front-end keeps its own requests level, and begins at a rank of its own.

With every front-end's own requests level to within one, and each one's odd requests beginning elsewhere,
the ranks are level to within one too (`tests/core/routing/test_policies.py` tries every remainder).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

from paceline.core.load import REQUEST_TOKENS
from paceline.core.ordering import PLACE_MASK, Ordering
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Policy, Query

EQUAL_SHARE = 0.125
"""Loads are not known better than this share of their mean; smaller differences decide nothing."""

MOST_ROUNDS = 2
"""So many rounds over all ranks may be missing in a view, for some ranks and not for others."""

FEW_SHARE = 8
"""Where fewer than one in so many are within the limit, they are compared with each other; otherwise the others are
passed over on the way. Either way a choice looks at a part of the ranks."""


class Rotation:
    """An order among equals: begins at a rank of this front-end's own, and moves on as ranks finish work.

    What all ranks have finished is known to every front-end alike, so the order moves for all of them
    together and they still begin at different ranks.
    """

    def __init__(self, frontend_index: int, frontend_count: int) -> None:
        self._index = frontend_index
        self._count = max(1, frontend_count)

    def begin(self, size: int, finished: int) -> int:
        """The place, of `size`, that is the first in the order."""
        return (self._index * max(1, size // self._count) + finished) % size


def work(candidate: Candidate, others: int) -> int:
    """A rank's queued work in prompt tokens, with what `others` front-ends have most likely sent meanwhile."""
    return (
        candidate.prefill_tokens
        + others * candidate.since_view_tokens
        + REQUEST_TOKENS * (candidate.requests + others * candidate.since_view_requests)
    )


def _in_flight(candidate: Candidate) -> int:
    return candidate.in_flight


class LeastLoad(Policy):
    """The rank with the least work queued: prompt tokens to compute and requests to answer."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._others = self.frontend_count - 1
        self._rotation = Rotation(frontend_index, frontend_count)
        # Own sends that the view did not know when this was last asked, and before the view came.
        self._sent = 0
        self._sent_before = 0

    def choose(self, candidates: Candidates, query: Query) -> int:
        works, flights = self.works(candidates), candidates.ordering(_in_flight)
        size = len(candidates)
        limit = self._limit(candidates, works.least(), works.total / size, query)
        begin = self._rotation.begin(size, candidates.finished)
        within = works.up_to(limit)
        if within * FEW_SHARE > size:
            place = flights.first(begin, works.keys, limit)
        else:
            keys = flights.keys
            places = [entry & PLACE_MASK for entry in works.entries[:within]]
            _, _, place = min([(keys[place], (place - begin) % size, place) for place in places])
        return candidates.ranks[place]

    def choose_among(self, candidates: Candidates, query: Query, places: Iterable[int]) -> int:
        """The same over the candidates at these places alone, at least one."""
        works, keys = self.works(candidates).keys, candidates.ordering(_in_flight).keys
        loads = {place: works[place] for place in places}
        limit = self._limit(candidates, min(loads.values()), sum(loads.values()) / len(loads), query)
        size = len(candidates)
        begin = self._rotation.begin(size, candidates.finished)
        _, _, place = min(
            (keys[place], (place - begin) % size, place) for place, load in loads.items() if load <= limit
        )
        return candidates.ranks[place]

    def works(self, candidates: Candidates) -> Ordering[Candidate]:
        return candidates.ordering(self._work)

    def _limit(self, candidates: Candidates, least: int, mean: float, query: Query) -> int:
        """The largest work that is as good as the least."""
        sent = candidates.since_view
        if sent < self._sent:
            self._sent_before = self._sent
        self._sent = sent
        rounds = min(MOST_ROUNDS, max(sent, self._sent_before) // len(candidates))
        slack = rounds * self._others * (REQUEST_TOKENS + query.prompt_tokens)
        return math.floor(least + slack + EQUAL_SHARE * mean)

    def _work(self, candidate: Candidate) -> int:
        return work(candidate, self._others)


class LeastRequests(Policy):
    """The rank with the fewest requests waiting and running."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._others = self.frontend_count - 1
        self._rotation = Rotation(frontend_index, frontend_count)

    def choose(self, candidates: Candidates, query: Query) -> int:
        counts = candidates.ordering(self._count)
        begin = self._rotation.begin(len(candidates), candidates.finished)
        return candidates.ranks[counts.first(begin, counts.keys, counts.least())]

    def _count(self, candidate: Candidate) -> int:
        return candidate.requests + self._others * candidate.since_view_requests


class RoundRobin(Policy):
    """Each rank in turn, whatever its load."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._next = frontend_index

    def choose(self, candidates: Candidates, query: Query) -> int:
        rank = candidates.ranks[self._next % len(candidates)]
        self._next += 1
        return rank


class PowerOfTwo(Policy):
    """The less loaded of two ranks that are drawn, the first one where they are equal.

    Front-ends that all know the same stale view do not all send to the same rank, because each draws from a
    generator of its own. The seed is the front-end's index, so that a run can be repeated.
    """

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._draw = Random(frontend_index).random

    def choose(self, candidates: Candidates, query: Query) -> int:
        size = len(candidates)
        if size == 1:
            return candidates.ranks[0]
        first = int(self._draw() * size)
        second = (first + 1 + int(self._draw() * (size - 1))) % size
        others = self.frontend_count - 1
        better = first if work(candidates[first], others) <= work(candidates[second], others) else second
        return candidates.ranks[better]


STEP_TOKENS = 512
"""Prompt tokens that a rank computes in a step: what --max-num-batched-tokens is unless it is set."""


class Lockstep(Policy):
    """For lockstep, where what counts is not each rank's load but the slowest rank's.

    Ranks in lockstep make a step together, and it lasts as long as the slowest of them takes. Prefill that one rank has
    ahead is waited for by all, so prefill that another does in the same steps costs nothing more, and prefill in steps
    where nobody else has any costs all ranks its whole time. Each rule decides among those that the one before leaves:

    1. The largest work of a rank shall grow as little as possible: all ranks that stay within it are equally good;
       where no rank does, the least loaded grow it least.
    2. The fewest requests, because the sequences that a rank decodes are what its steps take once the prompts are done;
       STEP_TOKENS of prompt ahead count as one more, because a request waits that many steps longer there.
    3. A rank that has prefill to do already: the ranks without any stay free for a prompt that fits nowhere else.

    In a model of lockstep a backlog is done a few hundredths sooner than with
    `LeastLoad`, and first tokens come no later. It is not the default: with several front-ends a burst is level to
    within a few requests, where least-load's is to within one.
    """

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._others = self.frontend_count - 1
        self._least = LeastLoad(frontend_index, frontend_count)
        self._rotation = Rotation(frontend_index, frontend_count)

    def choose(self, candidates: Candidates, query: Query) -> int:
        works, counts = self._least.works(candidates), candidates.ordering(self._count)
        added = REQUEST_TOKENS + query.prompt_tokens
        limit = max(works.least(), works.most() - added)
        begin = self._rotation.begin(len(candidates), candidates.finished)
        return candidates.ranks[counts.first(begin, works.keys, limit)]

    def _count(self, candidate: Candidate) -> int:
        requests = candidate.requests + self._others * candidate.since_view_requests
        # Twice, so that the third rule decides nothing but ties.
        return 2 * (requests + candidate.prefill_tokens // STEP_TOKENS) + (candidate.prefill_tokens == 0)
