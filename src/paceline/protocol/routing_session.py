"""Routing by session: requests with one key go to one rank, whichever front-end they come through.

Consistent hashing: every rank has POINTS points on a circle, and a key belongs to the rank of the first point at or
after its own. Nothing has to be remembered or told: all front-ends that know the same ranks have the same circle.
When a rank comes it takes keys from the others and none of them changes hands between two others; when it goes, its
own keys alone move. That is a 1/N share on average, give or take how evenly POINTS points fall (a tenth of it).

Rendezvous hashing shares more evenly, but hashes once a rank for every request: half a millisecond at 1,024.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from hashlib import blake2b

from paceline.protocol.candidates import Candidates
from paceline.protocol.policy import Policy, Query
from paceline.protocol.routing_affinity import guard
from paceline.protocol.routing_least import LeastLoad

POINTS = 128
RANK_BITS = 16
RANK_MASK = (1 << RANK_BITS) - 1
HOMES = 2
"""A session whose rank has too much to do goes to the next one on the circle: always the same, while that lasts."""

_EIGHT = struct.Struct("<8Q")


def points_of(rank: int) -> list[int]:
    """A rank's points: a 64-bit place on the circle, and the rank in the lowest bits."""
    points: list[int] = []
    for part in range(POINTS // 8):
        words = _EIGHT.unpack(blake2b(b"rank %d %d" % (rank, part)).digest())
        points += [word << RANK_BITS | rank for word in words]
    return points


def point_of(session: str) -> int:
    """Where a key is on the circle."""
    digest = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") << RANK_BITS


class Session(Policy):
    """The rank that the session's key belongs to, unless it has too much to do (`routing_affinity`).

    Requests without a key, and those whose HOMES ranks are all overloaded, go as with LeastLoad.
    """

    def __init__(self, front_end_index: int = 0, front_end_count: int = 1) -> None:
        super().__init__(front_end_index, front_end_count)
        self._least = LeastLoad(front_end_index, front_end_count)
        self._membership: tuple[Candidates, int] | None = None
        self._ranks: set[int] = set()
        self._circle: list[int] = []
        self._reason = ""

    def choose(self, candidates: Candidates, query: Query) -> int:
        if query.session is None:
            self._reason = "no session key"
            return self._least.choose(candidates, query)
        known = self._membership
        if known is None or known[0] is not candidates or known[1] != candidates.membership:
            self._take_members(candidates)
        works = self._least.works(candidates)
        limit = guard(works)
        for number, rank in enumerate(self.homes(query.session)):
            place = candidates.place(rank)
            if place is not None and works.keys[place] <= limit:
                self._reason = f"the session's {'next ' if number else ''}rank"
                return rank
        self._reason = "the session's ranks are overloaded"
        return self._least.choose(candidates, query)

    def reason(self) -> str:
        return self._reason

    def homes(self, session: str) -> list[int]:
        """The ranks that a key belongs to, the first one first; fewer than HOMES only where there are fewer."""
        circle = self._circle
        found: list[int] = []
        most = min(HOMES, len(self._ranks))
        at = bisect_left(circle, point_of(session))
        while len(found) < most:
            rank = circle[at % len(circle)] & RANK_MASK
            if rank not in found:
                found.append(rank)
            at += 1
        return found

    def _take_members(self, candidates: Candidates) -> None:
        ranks = set(candidates.ranks)
        gone, come = self._ranks - ranks, ranks - self._ranks
        if gone:
            self._circle = [point for point in self._circle if point & RANK_MASK not in gone]
        for rank in come:
            self._circle += points_of(rank)
        # Quick, as all but the new ones are sorted already.
        self._circle.sort()
        self._ranks = ranks
        self._membership = (candidates, candidates.membership)
