"""The collectives of lockstep ranks, in virtual time: a group that really blocks while a member is missing.

A group is one generation. Whoever leaves it, by dying or by forming another, ends it for all: who waits in it is told
within milliseconds, who enters it later at once, and of a collective that was just completing some get the outcome
and some do not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from paceline.core.messages import GroupMember
from paceline.simulate.world import Violation, World

SCATTER_S = 0.00005
"""Ranks leave a collective within this time of one another."""
NOTICE_S = 0.002
"""A member's end is noticed within this time."""
FORM_S = 0.003
FORM_TIMEOUT_S = 1.0
"""As in `runtime/group_seat.py`: how long a rank waits for the others to form a group with it."""

Life = tuple[int, int]
"""(rank, incarnation)."""


class Part(Struct):
    """A rank in a collective: what it gives, how long that takes it (seconds), and whom to tell the outcome.

    `done` gets all values, `ended` is called in its place where the generation has ended.
    """

    value: object
    seconds: float
    done: Callable[[list[Any]], None]
    ended: Callable[[], None]


class Group:
    """One generation: its members enter the same collectives in the same order. `scatter`: see `SCATTER_S`."""

    def __init__(self, world: World, members: Sequence[Life], scatter: random.Random | None) -> None:
        self.members = frozenset(members)
        self.over = False
        self._world = world
        self._scatter = scatter
        self._entered: dict[int, Part] = {}
        self._finishing: list[Part] = []

    def enter(self, rank: int, part: Part) -> None:
        """`rank` takes part. Raises Violation where the others are in another collective."""
        if self.over:
            self._world.after(self._draw(NOTICE_S), part.ended)
            return
        if rank in self._entered:
            raise Violation(f"rank {rank} is in two collectives", f"rank {rank}")
        for other, theirs in self._entered.items():
            if type(theirs.value) is not type(part.value):
                what = f"ranks in different collectives: rank {rank} in {part.value}, rank {other} in {theirs.value}"
                raise Violation(what, f"rank {rank}", f"rank {other}")
            break
        self._entered[rank] = part
        if len(self._entered) == len(self.members):
            self._complete()

    def end(self) -> None:
        """A member has left."""
        if self.over:
            return
        self.over = True
        entered, self._entered = self._entered, {}
        for part in entered.values():
            self._world.after(self._draw(NOTICE_S), part.ended)

    def _complete(self) -> None:
        entered, self._entered = self._entered, {}
        seconds = max(part.seconds for part in entered.values())
        self._world.after(seconds, lambda: self._finish(list(entered.values())))

    def _finish(self, parts: list[Part]) -> None:
        if self.over:
            for part in parts:
                self._world.after(self._draw(NOTICE_S), part.ended)
            return
        values = [part.value for part in parts]
        for part in parts:
            self._world.after(self._draw(SCATTER_S), lambda part=part: self._hand_out(part, values))  # type: ignore[misc]

    def _hand_out(self, part: Part, values: list[Any]) -> None:
        if self.over and self._draw(1.0) < 0.5:
            part.ended()
        else:
            part.done(values)

    def _draw(self, longest: float) -> float:
        return self._scatter.random() * longest if self._scatter is not None else 0.0


Coming = dict[Life, tuple[Callable[[Group], None], Callable[[], None]]]
"""Who has come to form a group, and how to tell them that it is formed, or that it is not."""


class Groups:
    """All generations of a deployment. `scatter`: draws how far members are apart, None for not at all."""

    def __init__(self, world: World, scatter: random.Random | None) -> None:
        self._world = world
        self._scatter = scatter
        # A new coordinator may give a number again that the one before had given to other lives.
        self._forming: dict[tuple[int, frozenset[Life]], Coming] = {}
        self._groups: dict[Life, Group] = {}

    def fixed(self, size: int) -> Group:
        """A group for ever, of engines whose collectives are their own."""
        return Group(self._world, [(rank, 0) for rank in range(size)], self._scatter)

    def form(
        self, life: Life, generation: int, members: Sequence[GroupMember], formed: Callable[[Group], None],
        failed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`life` leaves the group it is in and waits for all `members` to do so too: `formed`, or `failed` in time."""
        self.leave(life)
        lives = frozenset((member.rank, member.incarnation) for member in members)
        coming = self._forming.setdefault((generation, lives), {})
        coming[life] = (formed, failed)
        if len(coming) < len(lives):
            self._world.after(FORM_TIMEOUT_S, lambda: self._give_up((generation, lives), life))
            return
        del self._forming[generation, lives]
        group = Group(self._world, sorted(lives), self._scatter)
        for member, (tell, _) in coming.items():
            self._groups[member] = group
            delay = self._scatter.random() * FORM_S if self._scatter is not None else 0.0
            self._world.after(delay, lambda tell=tell: tell(group))  # type: ignore[misc]

    def leave(self, life: Life) -> None:
        """The rank's process is gone, or goes elsewhere."""
        group = self._groups.pop(life, None)
        if group is not None:
            group.end()
        for coming in self._forming.values():
            coming.pop(life, None)

    def _give_up(self, wanted: tuple[int, frozenset[Life]], life: Life) -> None:
        coming = self._forming.get(wanted)
        if coming is not None and life in coming:
            _, failed = coming.pop(life)
            failed()
