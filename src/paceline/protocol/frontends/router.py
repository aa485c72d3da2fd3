"""A front-end's routing: keeps the candidates as its ranks change, asks the policy, and tells what it was based on."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from paceline.protocol.frontends.link import RankLink
from paceline.protocol.ordering import RESORT_SHARE
from paceline.protocol.routing.candidates import Candidates
from paceline.protocol.routing.least import LeastLoad, work
from paceline.protocol.routing.policy import Decision, Policy, Query, belief

MAX_ALTERNATIVES = 3
NAMED = "named"
"""In place of the policy's name, where the client named the rank."""


class Router:
    """The ranks of one front-end as its policy sees them. `name`: what the policy is called."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._candidates = Candidates()
        # Those that say something else than their candidates do. A link tells of itself many times between two choices.
        self._stale: set[RankLink] = set()
        self._waiting = 0
        self._asked = False

    def joined(self, link: RankLink) -> None:
        """A rank has come."""
        self._waiting += link.refresh()
        self._candidates.add(link.candidate)

    def lost(self, link: RankLink) -> None:
        """A rank has gone."""
        self._stale.discard(link)
        self._waiting -= link.waiting
        self._candidates.remove(link.rank)

    def touched(self, link: RankLink) -> None:
        """What is known of a rank has changed."""
        self._stale.add(link)

    def settle(self) -> None:
        """An event has changed many ranks. Take it in now, so that the next choice need not pay for it; but not where
        nobody has asked for one since the last time: an idle front-end shall not sort each view that it is sent.
        """
        if self._asked:
            self._asked = False
            self._refresh()
            self._candidates.settle()

    def waiting(self) -> int:
        """Requests believed to wait for a slot, over all ranks."""
        self._refresh()
        return self._waiting

    def choose(self, query: Query) -> int:
        """The rank for a request. There must be one."""
        self._asked = True
        self._refresh()
        return self._policy.choose(self._candidates, query)

    def choose_among(self, query: Query, ranks: Iterable[int]) -> int:
        """The least loaded of these ranks, of which there must be one. For policies that are LeastLoad alone."""
        assert isinstance(self._policy, LeastLoad)
        self._refresh()
        found = [place for rank in ranks if (place := self._candidates.place(rank)) is not None]
        return self._policy.choose_among(self._candidates, query, found)

    def explain(self, rank: int, query: Query, name: str = "", reason: str = "") -> Decision:
        """What the choice of `rank` was based on; to be asked before anything else changes. Looks at all ranks.

        `name`: who chose it, where that was not the policy; `reason`: why, where there is more to say.
        """
        self._refresh()
        place = self._candidates.place(rank)
        assert place is not None
        others = self._policy.front_end_count - 1
        least = nsmallest(
            MAX_ALTERNATIVES, (one for one in self._candidates if one.rank != rank), lambda one: work(one, others)
        )
        return Decision(
            name or self._name, rank, query.prompt_tokens, len(self._candidates), belief(self._candidates[place]),
            [belief(one) for one in least], reason or ("" if name else self._policy.reason()),
        )  # fmt: skip

    def _refresh(self) -> None:
        stale = self._stale
        if not stale:
            return
        for link in stale:
            self._waiting += link.refresh()
        if len(stale) * RESORT_SHARE > len(self._candidates):
            self._candidates.all_changed()
        else:
            for link in stale:
                self._candidates.changed(link.rank)
        stale.clear()
