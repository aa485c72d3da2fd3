"""One rank with its engine and its links: what there is to know of it in a state."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from paceline.protocol.rank import Rank
from paceline.protocol.rank_events import Agree
from paceline.simulate.explore_parts import freeze, renumber

FRONT_END = 1


class Broken(Exception):
    """An invariant does not hold, or a machine failed. The text says why."""


class Life:
    """A rank's machine and, by the machine's keys, the steps that its engine has left for each request.

    `agree`: what it has said to the agreement that it is in, None while it is in none.
    """

    def __init__(self, machine: Rank, left: dict[int, int], agree: Agree | None = None) -> None:
        self.machine = machine
        self.left = left
        self.agree = agree

    def copy(self) -> Life:
        """One that can be changed."""
        return Life(renumber(self.machine), dict(self.left), self.agree)

    @property
    def unfinished(self) -> int:
        """Requests that the rank has, with the engine or held back."""
        return len(self.left) + self.machine.requests.held

    def key(self) -> Hashable:
        """Equal for lives that behave alike."""
        machine = self.machine
        if not machine.running:
            machine._steps_in_wave = 0
        if machine._wanted_wave <= machine.wave:
            # Asked for only when this wave has ended, and then it is over.
            machine._wanted_wave = -1
        return (freeze(machine), tuple(sorted(self.left.values())), machine.requests.held, freeze(self.agree))


class Block(NamedTuple):
    """Numbers of the rank's life and of the messages in its links, oldest first; stamps of what front-ends sent.

    `connected`: it hears broadcasts. `asked`: this life of the coordinator has asked it who it is.
    `arriving`: requests on their way. `notices`: notices on their way to the coordinator, that name this rank.
    """

    life: int
    up: tuple[int, ...]
    down: tuple[int, ...]
    connected: bool
    asked: bool
    arriving: tuple[int, ...]
    notices: tuple[int, ...]


class BlockMove(NamedTuple):
    """What can happen at one rank alone. `waits`: not to a rank that is in the barrier."""

    kind: str
    detail: int
    block: int
    waits: bool
