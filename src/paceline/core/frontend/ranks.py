"""One rank as a front-end knows it: its report, what is on the wire, and how routing is told of both.

A front-end's routing: keeps the candidates as its ranks change, asks the policy, and tells what it was based on.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nsmallest

from paceline.core.load import Accounting, Load, believed
from paceline.core.messages import RankView
from paceline.core.ordering import RESORT_SHARE
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.least import LeastLoad, work
from paceline.core.routing.policy import Decision, Policy, Query, belief


class RankHandle:
    """One life of one rank, as this front-end knows it.

    `candidate`, and `waiting`, how many requests wait for a slot there, are as of the last `refresh`.
    """

    __slots__ = (
        "accounting",
        "candidate",
        "in_flight",
        "incarnation",
        "left",
        "load",
        "rank",
        "step",
        "unacked_requests",
        "unacked_tokens",
        "unheard",
        "waiting",
    )  # fmt: skip

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.load = Load()
        self.step = -1
        self.accounting = Accounting()
        # By the ids that the rank knows: those that are under way, and those that went elsewhere while it was away.
        self.in_flight: set[int] = set()
        self.left: list[int] = []
        # What the other front-ends have on the wire, by the latest view.
        self.unacked_requests = 0
        self.unacked_tokens = 0
        # This front-end's sends that the coordinator had not been told of when it made the latest view.
        self.unheard = Accounting()
        self.candidate = Candidate(rank, 0, 0, 0, 0, 0, 0, incarnation)
        self.waiting = 0

    def believed(self) -> Load:
        """What the rank has, plus what is on the wire from this front-end."""
        return believed(self.load, self.accounting.requests, self.accounting.tokens)

    def refresh(self) -> int:
        """Bring `candidate` and `waiting` up to date; returns by how much `waiting` grew."""
        load, accounting, candidate = self.load, self.accounting, self.candidate
        candidate.requests = load.waiting + load.running + accounting.requests + self.unacked_requests
        candidate.prefill_tokens = load.prefill_tokens + accounting.tokens + self.unacked_tokens
        candidate.in_flight = len(self.in_flight)
        candidate.since_view_requests = self.unheard.requests
        candidate.since_view_tokens = self.unheard.tokens
        candidate.finished = load.finished
        # Those that cannot start at once, as far as slots go.
        free = load.slots - load.running
        waiting = load.waiting + accounting.requests - (free if free > 0 else 0)
        before, self.waiting = self.waiting, waiting if waiting > 0 else 0
        return self.waiting - before

    def take_view(self, entry: RankView, frontend: int) -> None:
        """Take in what a view says of this rank; `frontend`: whose link this is. An older step changes nothing."""
        if entry.step < self.step:
            return
        self.step = entry.step
        self.load = entry.load
        self.accounting.reported(entry.taken.get(frontend, 0))
        self.unacked_requests = sum(wire_id.requests for wire_id in entry.on_the_wire if wire_id.frontend != frontend)
        self.unacked_tokens = sum(wire_id.tokens for wire_id in entry.on_the_wire if wire_id.frontend != frontend)


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
        self._stale: set[RankHandle] = set()
        self._waiting = 0
        self._asked = False

    def joined(self, handle: RankHandle) -> None:
        """A rank has come."""
        self._waiting += handle.refresh()
        self._candidates.add(handle.candidate)

    def lost(self, handle: RankHandle) -> None:
        """A rank has gone."""
        self._stale.discard(handle)
        self._waiting -= handle.waiting
        self._candidates.remove(handle.rank)

    def touched(self, handle: RankHandle) -> None:
        """What is known of a rank has changed."""
        self._stale.add(handle)

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
        others = self._policy.frontend_count - 1
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
        for handle in stale:
            self._waiting += handle.refresh()
        if len(stale) * RESORT_SHARE > len(self._candidates):
            self._candidates.all_changed()
        else:
            for handle in stale:
                self._candidates.changed(handle.rank)
        stale.clear()
