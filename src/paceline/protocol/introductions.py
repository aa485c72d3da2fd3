"""When the coordinator asks the ranks who they are, and when it answers one that joins.

A question is a broadcast that every rank answers, and a new coordinator is subscribed to by all of them within
milliseconds: those subscriptions share one question. A question can be lost to a rank whose connection was not up
yet, and a paused rank says nothing by itself, so while ranks are missing it is asked again. A message from a life
that is not known is a reason to ask too: only an answer introduces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

GATHER_S = 0.01
"""Subscriptions within this time share a question."""
FIRST_REPEAT_S = 0.1
LONGEST_REPEAT_S = 4.0
ADMIT_AGAIN_S = 0.05
"""A rank asks for admission ten times a second and at each question; one answer serves them all."""


class Introductions:
    """What is to be asked, and who was answered when."""

    def __init__(self, without: Set[str] = frozenset()) -> None:
        self._asks = "new-coordinator-asks" not in without
        self._due: float | None = None
        self._asked = float("-inf")
        self._repeat_s = FIRST_REPEAT_S
        self._admitted: dict[int, tuple[int, float]] = {}

    @property
    def due(self) -> float | None:
        """When to ask, or None."""
        return self._due

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
        """Whether this hello is to be answered."""
        life, when = self._admitted.get(rank, (-1, float("-inf")))
        if life == incarnation and now < when + ADMIT_AGAIN_S:
            return False
        self._admitted[rank] = (incarnation, now)
        return True
