"""A routing policy of one's own, whole: long prompts go to the last quarter of the ranks, the others to the rest.

paceline serve --engine timed -dp 4 --routing examples.split_policy:SplitByLength
"""

from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Policy, Query

LONG = 2048


class SplitByLength(Policy):
    def choose(self, candidates: Candidates, query: Query) -> int:
        size = len(candidates)
        begin = size - max(1, size // 4)
        self.long = query.prompt_tokens >= LONG
        part = candidates[begin:] if self.long else candidates[:begin] or candidates[:]
        return min(part, key=queued).rank

    def reason(self) -> str:
        return "a long prompt" if self.long else "a short prompt"


def queued(candidate: Candidate) -> tuple[int, int]:
    return candidate.requests, candidate.in_flight
