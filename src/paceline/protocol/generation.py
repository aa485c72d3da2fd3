"""The coordinator's part in generations: which lockstep ranks run their collectives together.

Collectives block until every member takes part, so who is a member must be the same for all, and a member's death
ends the group for all. When every rank of the deployment has said where it is reached, the coordinator gives that
set of lives a number and tells all to form it, again and again until each has said that it has. A new life of a
rank, a member that fell out, or a forming that takes too long makes the next generation, with a higher number.

A new coordinator that hears all ranks name the same generation has nothing to do.
"""

from __future__ import annotations

from msgspec import Struct

from paceline.protocol.messages import GroupMember
from paceline.protocol.wave import FIRST_REPEAT_S, LONGEST_REPEAT_S

FORM_TIMEOUT_S = 10.0
"""After this a generation that is not formed is given up for the next."""


class Position(Struct, frozen=True):
    """A rank's life, where its peers reach it, and the generation that it is a member of (0: none)."""

    incarnation: int
    address: str
    generation: int


class Generations:
    """The current generation of a deployment of `size` ranks, and what is still to be formed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: dict[int, Position] = {}
        self.number = 0
        """The generation that is, or is to be, formed; 0 before the first."""
        self._members: dict[int, int] = {}
        self._due: float | None = None
        self._repeat_s = FIRST_REPEAT_S
        self._give_up_at = float("inf")

    @property
    def due(self) -> float | None:
        """When members must be told (again), or None."""
        return self._due

    def heard(self, rank: int, incarnation: int, address: str, generation: int, now: float) -> None:
        """A rank said hello."""
        before = self._ranks.get(rank)
        self._ranks[rank] = Position(incarnation, address, generation)
        fell_out = (
            before is not None
            and before.incarnation == incarnation
            and before.generation == self.number > 0
            and generation != self.number
        )
        self._settle(fell_out, now)

    def forget(self, rank: int) -> None:
        """The rank is gone; the next hello of any life of it makes a new generation."""
        self._ranks.pop(rank, None)
        self._due = None

    def form(self, now: float) -> tuple[int, list[GroupMember]] | None:
        """The generation and its members, if they are to be told now; the next repeat is set."""
        if self._due is None or now < self._due:
            return None
        if now >= self._give_up_at:
            self._next(self.number + 1, now)
        self._due = now + self._repeat_s
        self._repeat_s = min(self._repeat_s * 2, LONGEST_REPEAT_S)
        return self.number, [GroupMember(r, p.incarnation, p.address) for r, p in sorted(self._ranks.items())]

    def _settle(self, fell_out: bool, now: float) -> None:
        if len(self._ranks) < self._size:
            self._due = None
            return
        named = {position.generation for position in self._ranks.values()}
        lives = {rank: position.incarnation for rank, position in self._ranks.items()}
        if len(named) == 1 and max(named) >= max(self.number, 1) and self._members in ({}, lives):
            self.number, self._members = max(named), lives
            self._due = None
        elif fell_out or lives != self._members or max(named) > self.number:
            self._members = lives
            self._next(max(self.number, *named) + 1, now)

    def _next(self, number: int, now: float) -> None:
        self.number = number
        self._due = now
        self._repeat_s = FIRST_REPEAT_S
        self._give_up_at = now + FORM_TIMEOUT_S
