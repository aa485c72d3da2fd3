"""The steps of ranks, in virtual time: alone, or in a group that really blocks while a member is missing.

A group is one epoch. A rank that leaves it, by dying or by forming another, ends it for all: those that wait in it are
told within milliseconds, those that enter it later at once, and of a collective that was just completing some get the
outcome and some do not.

Steps in which nothing changes are one event: a span of them, which something that arrives cuts short.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from paceline.core.messages import GroupMember
from paceline.core.rank.events import Agree
from paceline.core.rank.prefill_quota import agreed
from paceline.sim.world import Violation, World

SCATTER_S = 0.00005
"""Ranks leave a collective within this time of one another."""
NOTICE_S = 0.002
"""A member's end is noticed within this time."""
FORM_S = 0.003
FORM_TIMEOUT_S = 1.0
"""As in `runtime/group_seat.py`: how long a rank waits for the others to form a group with it."""
ANY_NUMBER = 1 << 40
"""Of steps that a rank without work can go along with."""
ROUNDING = 1e-9
"""Share of a step by which a moment may miss the end of one for want of digits."""

Life = tuple[int, int]
"""(rank, incarnation)."""


class Span:
    """Steps one after another, each `step_s` long, from now on; `over` is called when the last of them is."""

    def __init__(self, world: World, step_s: float, steps: int, over: Callable[[], None]) -> None:
        self.step_s, self.steps, self.begin = step_s, steps, world.now
        self._world, self._over = world, over
        self._arrange()

    def cut(self) -> None:
        steps = self.running
        if steps < self.steps:
            self.steps = steps
            self._arrange()

    @property
    def running(self) -> int:
        """Which step runs now, from 1."""
        if self.steps == 1 or self.step_s <= 0.0:
            return self.steps
        return min(self.steps, math.floor((self._world.now - self.begin) / self.step_s + ROUNDING) + 1)

    @property
    def step_end(self) -> float:
        """When the step that runs now is over."""
        return self.begin + self.step_s * self.running

    def _arrange(self) -> None:
        steps = self.steps
        # One that has been cut has two ends, of which the later is void.
        self._world.at(self.begin + self.step_s * steps, lambda: self._over() if steps == self.steps else None)


class Part(Struct):
    """A rank in a collective: what it gives, how long that takes it (seconds), and whom to tell the outcome.

    `done` gets all values (of an agreement, what came of them), `ended` is called in its place where the epoch
    has ended. `steps`: how many such
    collectives it can take part in without being asked in between.
    """

    value: object
    seconds: float
    done: Callable[[list[Any]], None]
    ended: Callable[[], None]
    steps: int = 1


class Group:
    """One epoch: its members enter the same collectives in the same order. `scatter`: see `SCATTER_S`."""

    def __init__(self, world: World, members: Sequence[Life], scatter: random.Random | None) -> None:
        self.members = frozenset(members)
        self.over = False
        self.span: Span | None = None
        self._world = world
        self._scatter = scatter
        self._entered: dict[int, Part] = {}

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
        if self.over:
            return
        self.over = True
        entered, self._entered = self._entered, {}
        for part in entered.values():
            self._world.after(self._draw(NOTICE_S), part.ended)

    def _complete(self) -> None:
        parts, self._entered = list(self._entered.values()), {}
        steps = min(part.steps for part in parts)
        # Where nobody has work all are about to agree that it is so.
        steps = 1 if steps == ANY_NUMBER else steps
        self.span = Span(self._world, max(part.seconds for part in parts), steps, partial(self._finish, parts))

    def _finish(self, parts: list[Part]) -> None:
        if self.over:
            for part in parts:
                self._world.after(self._draw(NOTICE_S), part.ended)
            return
        values = [part.value for part in parts]
        if isinstance(values[0], Agree):
            # The same at all: reduced once.
            values = [agreed(value for value in values if isinstance(value, Agree))]
        for part in parts:
            if self._scatter is None and not self.over:
                part.done(values)
            else:
                self._world.after(self._draw(SCATTER_S), partial(self._hand_out, part, values))

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
    """All epochs of a deployment. `scatter`: draws how far members are apart, None for not at all."""

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
        self, life: Life, epoch: int, members: Sequence[GroupMember], formed: Callable[[Group], None],
        failed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`life` leaves the group it is in and waits for all `members` to do so too: `formed`, or `failed` in time."""
        self.leave(life)
        lives = frozenset((member.rank, member.incarnation) for member in members)
        coming = self._forming.setdefault((epoch, lives), {})
        coming[life] = (formed, failed)
        if len(coming) < len(lives):
            self._world.after(FORM_TIMEOUT_S, lambda: self._give_up((epoch, lives), life))
            return
        del self._forming[epoch, lives]
        group = Group(self._world, sorted(lives), self._scatter)
        for member, (tell, _) in coming.items():
            self._groups[member] = group
            delay = self._scatter.random() * FORM_S if self._scatter is not None else 0.0
            self._world.after(delay, partial(tell, group))

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
