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
HOMES = 2
"""A session whose rank has too much to do goes to the next one on the circle: always the same, while that lasts."""

MANY_GONE = 16
"""Beyond so many ranks gone at once, the circle is made anew."""

_EIGHT = struct.Struct("<8Q")


def points_of(rank: int) -> list[float]:
    """A rank's points: places on the circle, from 0 to 1. Floats, because Python sorts them quickest."""
    points: list[float] = []
    for part in range(POINTS // 8):
        words = _EIGHT.unpack(blake2b(b"rank %d %d" % (rank, part)).digest())
        points += [word / 2**64 for word in words]
    return points


def point_of(session: str) -> float:
    """Where a key is on the circle."""
    digest = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


class Session(Policy):
    """The rank that the session's key belongs to, unless it has too much to do (`routing_affinity`).

    Requests without a key, and those whose HOMES ranks are all overloaded, go as with LeastLoad.
    """

    def __init__(self, front_end_index: int = 0, front_end_count: int = 1) -> None:
        super().__init__(front_end_index, front_end_count)
        self._least = LeastLoad(front_end_index, front_end_count)
        self._membership: tuple[Candidates, int] | None = None
        self._ranks: set[int] = set()
        self._circle: list[float] = []
        self._owners: dict[float, int] = {}
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
        circle, owners = self._circle, self._owners
        found: list[int] = []
        most = min(HOMES, len(self._ranks))
        at = bisect_left(circle, point_of(session))
        while len(found) < most:
            rank = owners[circle[at % len(circle)]]
            if rank not in found:
                found.append(rank)
            at += 1
        return found

    def _take_members(self, candidates: Candidates) -> None:
        ranks = set(candidates.ranks)
        gone = self._ranks - ranks
        if len(gone) > MANY_GONE:
            self._ranks, self._circle, self._owners, gone = set(), [], {}, set()
        for rank in gone:
            for point in points_of(rank):
                del self._circle[bisect_left(self._circle, point)], self._owners[point]
        for rank in sorted(ranks - self._ranks):
            points = points_of(rank)
            self._owners.update(dict.fromkeys(points, rank))
            self._circle += points
        # Quick, as all but the new ones are sorted already.
        self._circle.sort()
        self._ranks = ranks
        self._membership = (candidates, candidates.membership)
