"""When the coordinator asks the ranks who they are, and when it answers one that joins.

A question is a broadcast that every rank answers, and a new coordinator is subscribed to by all of them within
milliseconds: those subscriptions share one question. A question can be lost to a rank whose connection was not up
yet, and a paused rank says nothing by itself, so while ranks are missing it is asked again. A message from a life
that is not known is a reason to ask too: only an answer introduces it.

Until a coordinator that has taken another's place has heard the ranks, it does not know whether they are suspended.
So it admits nobody, wakes nobody for a front-end and answers no call, before it is acquainted: with all ranks where
they run in lockstep, and otherwise with those that answer within a second, since one of them may be dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

GATHER_S = 0.01
"""Subscriptions within this time share a question."""
FIRST_REPEAT_S = 0.1
LONGEST_REPEAT_S = 4.0
PATIENCE_S = 1.0
"""How long independent ranks are waited for that may be dead."""
ADMIT_AGAIN_S = 0.05
"""A rank asks for admission ten times a second and at each question; one answer serves them all."""


class Introductions:
    """What is to be asked, who was answered when, and whether the ranks were heard.

    `size`: ranks in the deployment. `fresh`: there was no coordinator before, so there is nothing to learn.
    `patience_s`: how long to wait for a rank that says nothing, None for ever.
    """

    def __init__(self, size: int, *, fresh: bool, patience_s: float | None, without: Set[str] = frozenset()) -> None:
        self._unheard = set() if fresh else set(range(size))
        self._patience_s = patience_s
        self._begun: float | None = None
        self._asks = "new-coordinator-asks" not in without
        self._due: float | None = None
        self._asked = float("-inf")
        self._repeat_s = FIRST_REPEAT_S
        self._admitted: dict[int, tuple[int, float]] = {}

    @property
    def due(self) -> float | None:
        """When to ask, or when patience ends, or None."""
        if self._unheard and self._begun is not None and self._patience_s is not None:
            return min(self._due or float("inf"), self._begun + self._patience_s)
        return self._due

    def resize(self, size: int, now: float) -> None:
        """The deployment has so many ranks: nobody waits for a word of the others, and new ones are asked."""
        self._unheard = {rank for rank in self._unheard if rank < size}
        self.wanted(now)

    def heard(self, rank: int) -> None:
        """The rank has said hello."""
        self._unheard.discard(rank)

    def acquainted(self, now: float) -> bool:
        """Whether it is known how the ranks stand."""
        if not self._unheard:
            return True
        if self._begun is None:
            self._begun = now
        if self._patience_s is not None and now >= self._begun + self._patience_s:
            self._unheard.clear()
        return not self._unheard

    def wanted(self, now: float) -> None:
        """Somebody is there who has not been heard: ask, soon and again."""
        if self._asks:
            self._repeat_s = FIRST_REPEAT_S
            self._due = min(self._due or float("inf"), max(now, self._asked + GATHER_S))

    def ask(self, now: float, missing: Callable[[], Sequence[int]]) -> bool:
        """Whether to ask now; `missing`: the ranks of the deployment that are still unknown."""
        if self._due is None or now < self._due:
            return False
        self._asked = now
        self._due = now + self._repeat_s if missing() else None
        self._repeat_s = min(self._repeat_s * 2, LONGEST_REPEAT_S)
        return True

    def admits(self, rank: int, incarnation: int, now: float) -> bool:
        """Whether this hello is to be answered: by whoever is acquainted, and not twice in a moment."""
        if not self.acquainted(now):
            return False
        life, when = self._admitted.get(rank, (-1, float("-inf")))
        if life == incarnation and now < when + ADMIT_AGAIN_S:
            return False
        self._admitted[rank] = (incarnation, now)
        return True
