"""Tenants share the queue by weight: the line of each, and who is next of those that have had least.

A tenant is whoever has one API key, or one `X-Tenant`. What each is granted is counted, in tokens to compute and to
make, over its weight (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024); the one that has had
least is next. One that did not wait begins with what the last that was granted had had by then (start-time fair
queueing): time without requests earns nothing. So a flood waits behind itself. Priorities, prefixes and turns are
inside a tenant (`line.py`); what fits nowhere lets the next tenant pass, and those passes count for its turn.

With one tenant, which is what a deployment without keys has, a line is its only line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import nsmallest

from paceline.core.dispatch.capacity import Capacity
from paceline.core.dispatch.line import LOOK_AHEAD, Entry, Line, order_of

ANSWER_TOKEN_COSTS = 2
"""A token of an answer is counted for so many of a prompt."""
LOOKED_AT = 1 + LOOK_AHEAD
"""So many tenants are asked, those that have had least first, whether one of theirs fits."""
FORGOTTEN_FROM = 1024
"""Tenants of which nobody waits are forgotten when there are so many: those first that have had no more than others."""


class Tenants:
    """What each tenant of one queue has had. In tokens over weights."""

    def __init__(self) -> None:
        self._had: dict[int, float] = {}
        self._waiting: dict[int, int] = {}
        self._now = 0.0
        """What whoever was granted last had had before."""

    def had(self, tenant: int) -> float:
        return self._had.get(tenant, 0.0)

    def order(self, entry: Entry) -> tuple[float, int, float, int]:
        """Of all that wait, the least is next."""
        return (self._had.get(entry.tenant, 0.0), *order_of(entry))

    def joined(self, tenant: int) -> None:
        count = self._waiting.get(tenant, 0)
        self._waiting[tenant] = count + 1
        if count:
            return
        self._had[tenant] = max(self.had(tenant), self._now)
        if len(self._had) > FORGOTTEN_FROM:
            # Those that came first go first: names may be made up, one for each request.
            idle = [one for one in self._had if one not in self._waiting]
            owes_nothing = [one for one in idle if self._had[one] <= self._now]
            for one in owes_nothing or idle[: FORGOTTEN_FROM // 2]:
                del self._had[one]

    def left(self, tenant: int) -> None:
        count = self._waiting[tenant] - 1
        if count:
            self._waiting[tenant] = count
        else:
            del self._waiting[tenant]

    def granted(self, entry: Entry, answer_tokens: int) -> None:
        """It is to be computed, and about so many tokens made."""
        cost = entry.tokens + ANSWER_TOKEN_COSTS * min(answer_tokens, entry.kv - entry.whole)
        had = self.had(entry.tenant)
        self._now = max(self._now, had)
        self._had[entry.tenant] = had + cost / entry.weight


class TenantLine:
    """Those that wait for one rank, or for any, of all tenants. As `Line`, whose parts these are."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._lines: dict[int, Line] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Entry]:
        for tenant in sorted(self._lines, key=self._tenants.had):
            yield from self._lines[tenant]

    @property
    def tokens(self) -> int:
        return sum(line.tokens for line in self._lines.values())

    @property
    def keeps(self) -> bool:
        return any(line.keeps for line in self._lines.values())

    def join(self, entry: Entry) -> None:
        line = self._lines.get(entry.tenant)
        if line is None:
            line = self._lines[entry.tenant] = Line()
        line.join(entry)

    def leave(self, entry: Entry) -> None:
        self._lines[entry.tenant].leave(entry)

    def granted(self, tenant: int) -> None:
        """One has been granted what this line waits for: it has passed over the others of its tenant, and over those
        of the one that was first."""
        lines = self._lines
        if tenant in lines:
            lines[tenant].passed += 1
        if len(lines) > 1 and (first := min(lines, key=self._tenants.had)) != tenant:
            lines[first].passed += 1

    def next(
        self, best: Callable[[Entry], Capacity | None], most_free: Callable[[], Capacity | None],
        changed: Callable[[Capacity], None], is_open: Callable[[], bool],
    ) -> tuple[Entry, Capacity, bool] | None:  # fmt: skip
        lines, found = self._lines, None
        some = list(lines) if len(lines) == 1 else nsmallest(LOOKED_AT, lines, key=self._tenants.had)
        # Who keeps a rank and has had more than these is seen to all the same: it may be there now.
        some += [tenant for tenant, line in lines.items() if tenant not in some and (line.keeps or not len(line))]
        for tenant in some:
            line = lines[tenant]
            found = line.next(best, most_free, changed, is_open)
            if not len(line) and not line.keeps and len(lines) > 1:
                del lines[tenant]
            if found is not None:
                break
        return found

    def lost(self, rank: int) -> None:
        for line in self._lines.values():
            line.lost(rank)
