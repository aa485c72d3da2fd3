"""Routing for lockstep: what counts is not each rank's load but the slowest rank's.

Ranks in lockstep make a step together, and it lasts as long as the slowest of them takes. Prefill that one rank has
ahead is waited for by all, so prefill that another rank does in the same steps costs nothing more, and prefill in
steps where nobody else has any costs all ranks its whole time. Hence three rules, each deciding among those that the
one before leaves:

1. The largest work of a rank (prompt tokens ahead, and REQUEST_TOKENS for each request) shall grow as little as
   possible. All ranks that stay within the largest are equally good; where no rank does, the least loaded grow it
   least.
2. The fewest requests, because the sequences that a rank decodes are what its steps take once the prompts are done;
   STEP_TOKENS of prompt ahead count as one more, because a request waits that many steps longer there.
3. A rank that has prefill to do already: it prefills in the same steps, and the ranks without any stay free for a
   prompt that fits nowhere else.

`LeastLoad` levels work instead, and so tells apart ranks between which the slowest one makes no difference. In a model
of lockstep (`tests/core/lockstep_model.py`) a backlog is done a few hundredths sooner with this policy, and first
tokens come no later. It is not the default: with several front-ends a burst is level to within a few requests, where
least-load's is to within one.
"""

from __future__ import annotations

from paceline.core.load import REQUEST_TOKENS
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.least import LeastLoad, Rotation
from paceline.core.routing.policy import Policy, Query

STEP_TOKENS = 512
"""Prompt tokens that a rank computes in a step: what --max-num-batched-tokens is unless it is set."""


class Lockstep(Policy):
    """The rank that lets the slowest rank's work grow least; among equals, prefills are aligned."""

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
