"""Routing by session: requests with one key go to one rank, whichever front-end they come through.

Consistent hashing: every rank has POINTS points on a circle. A key looks from PROBES places of the circle for the next
point, and belongs to the rank of the one that is closest (Appleton and O'Reilly, arXiv 1505.00062). Nothing has to be
remembered or told: all front-ends that know the same ranks have the same circle. When a rank comes it takes keys from
the others and none of them changes hands between two others; when it goes, its own keys alone move. That is one in N:
ranks' shares differ by one or two hundredths, where a key that looked from one place alone would leave a tenth.

Rendezvous hashing shares more evenly, but hashes once a rank for every request: half a millisecond at 1,024.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import blake2b

from paceline.core.routing.candidates import Candidates
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy, Query, guard

POINTS = 128
PROBES = 16
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


def probes_of(session: str) -> list[float]:
    """The places on the circle from which a key looks."""
    digest = blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    first, step = int.from_bytes(digest[:8], "little") / 2**64, int.from_bytes(digest[8:], "little") / 2**64
    return [(first + probe * step) % 1.0 for probe in range(PROBES)]


def session_name(key: str) -> int:
    """The name of a client's key, beside those of blocks."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=7).digest()) + 1


class Session(Policy):
    """The rank that the session's key belongs to, unless it has too much to do (`policy.guard`).

    Requests without a key, and those whose HOMES ranks are all overloaded, go as with LeastLoad.
    """

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._least = LeastLoad(frontend_index, frontend_count)
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

    def homes(self, session: str) -> Iterator[int]:
        """The ranks that a key belongs to, the first one first; the next one is looked for when it is asked for."""
        probes, found = probes_of(session), set[int]()
        for _ in range(min(HOMES, len(self._ranks))):
            rank = self._closest(probes, found)
            found.add(rank)
            yield rank

    def _closest(self, probes: list[float], passed: set[int]) -> int:
        """The rank with the closest point after one of `probes`, but for those in `passed`."""
        circle, owners, closest, least = self._circle, self._owners, -1.0, 2.0
        for probe in probes:
            at, around = bisect_left(circle, probe), 0.0
            while True:
                if at == len(circle):
                    at, around = 0, 1.0
                point = circle[at]
                if not passed or owners[point] not in passed:
                    break
                at += 1
            if point + around - probe < least:
                closest, least = point, point + around - probe
        return owners[closest]

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
