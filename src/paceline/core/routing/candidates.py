"""The ranks that a request can go to, kept so that choosing among a thousand costs little more than among ten.

Going through all ranks for every request costs a front-end more than the request's HTTP does once there are
hundreds. What changes between two choices is little, though: the rank that was chosen, and those that have finished
something. So a policy asks for an `Ordering` of the ranks by a number it makes of each, and gets it kept: a change
moves one entry of a sorted list, and a whole new view sorts it again, which is quick where it is nearly sorted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import overload

from msgspec import Struct

from paceline.core.ordering import Ordering


class Candidate(Struct, gc=False):
    """One rank as the front-end believes it: reported, plus what is on the wire. Policies only read it.

    `requests`, `prefill_tokens`: all of the rank's, every front-end's. `in_flight`: this front-end's own.
    `since_view_requests`, `since_view_tokens`: those the coordinator had not been told of when it made the view.
    `finished`: as in Load. `life`: another number is another process, whose caches are empty.
    """

    rank: int
    requests: int
    prefill_tokens: int
    in_flight: int
    since_view_requests: int
    since_view_tokens: int
    finished: int
    life: int = 0


Key = Callable[[Candidate], int]


class Candidates:
    """All candidates, in order of rank. The front-end changes it, policies read it.

    `ranks`: the rank at each place. `membership`: another number once ranks have come or gone. `finished`: the
    sum of what all have finished. `since_view`: of this front-end's sends that the view does not know yet.
    """

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._candidates = sorted(candidates, key=lambda candidate: candidate.rank)
        self.ranks = [candidate.rank for candidate in self._candidates]
        self._finished = [candidate.finished for candidate in self._candidates]
        self.finished = sum(self._finished)
        self._since_view = [candidate.since_view_requests for candidate in self._candidates]
        self.since_view = sum(self._since_view)
        self.membership = 0
        self._orderings: dict[Key, Ordering[Candidate]] = {}

    def __len__(self) -> int:
        return len(self._candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._candidates)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> list[Candidate]: ...
    def __getitem__(self, place: int | slice) -> Candidate | list[Candidate]:
        return self._candidates[place]

    def place(self, rank: int) -> int | None:
        """Where `rank` is, None if it is not among them."""
        place = bisect_left(self.ranks, rank)
        return place if place < len(self.ranks) and self.ranks[place] == rank else None

    def ordering(self, key: Key) -> Ordering[Candidate]:
        """The ordering by `key`, up to date. Kept for the next time: ask with the same function again."""
        found = self._orderings.get(key)
        if found is None:
            found = self._orderings[key] = Ordering(self._candidates, key)
        if found.changed is None or found.changed:
            found.refresh()
        return found

    def add(self, candidate: Candidate) -> None:
        """A rank has come. It must not be there already."""
        place = bisect_left(self.ranks, candidate.rank)
        self.ranks.insert(place, candidate.rank)
        self._candidates.insert(place, candidate)
        self._finished.insert(place, candidate.finished)
        self.finished += candidate.finished
        self._since_view.insert(place, candidate.since_view_requests)
        self.since_view += candidate.since_view_requests
        self._members_changed()

    def remove(self, rank: int) -> None:
        """A rank has gone. Raises ValueError where it is not there."""
        place = self.ranks.index(rank)
        del self.ranks[place], self._candidates[place]
        self.finished -= self._finished.pop(place)
        self.since_view -= self._since_view.pop(place)
        self._members_changed()

    def changed(self, rank: int) -> None:
        place = bisect_left(self.ranks, rank)
        finished, since_view = self._candidates[place].finished, self._candidates[place].since_view_requests
        self.finished += finished - self._finished[place]
        self._finished[place] = finished
        self.since_view += since_view - self._since_view[place]
        self._since_view[place] = since_view
        for ordering in self._orderings.values():
            if ordering.changed is not None:
                ordering.changed.add(place)

    def all_changed(self) -> None:
        self._finished = [candidate.finished for candidate in self._candidates]
        self.finished = sum(self._finished)
        self._since_view = [candidate.since_view_requests for candidate in self._candidates]
        self.since_view = sum(self._since_view)
        for ordering in self._orderings.values():
            ordering.changed = None

    def settle(self) -> None:
        """Bring all orderings up to date now, so that the next choice need not."""
        for ordering in self._orderings.values():
            ordering.refresh()

    def _members_changed(self) -> None:
        self.membership += 1
        for ordering in self._orderings.values():
            ordering.changed = None
