"""One rank with its engine and its links: what there is to know of it in a state."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from paceline.core.rank.events import Agree, Phase
from paceline.core.rank.machine import Rank
from paceline.simulate.explore_parts import freeze, renumber

FRONT_END = 1


class Group(NamedTuple):
    """A generation: its number, the life of the coordinator that gave it, and how many members it has.

    One coordinator gives a number to one set of lives, and two that give the same number give it to different sets:
    before the second does, all of its set have said what the first has told them. So no two sets have one name.
    """

    number: int
    by: int
    size: int


class Broken(Exception):
    """An invariant does not hold, or a machine failed. The text says why."""


def demand(why: str | None) -> None:
    """Raises Broken where an invariant says why it does not hold."""
    if why is not None:
        raise Broken(why)


class Life:
    """A rank's machine and, by the machine's keys, the steps that its engine has left for each request.

    `agree`: what it has said to the agreement that it is in, None while it is in none. `group`: the generation whose
    connections it holds, `forming`: the one that it waits to be told that it is formed; None where there is none.
    """

    def __init__(
        self, machine: Rank, left: dict[int, int], agree: Agree | None = None, group: Group | None = None,
        forming: Group | None = None,
    ) -> None:  # fmt: skip
        self.machine = machine
        self.left = left
        self.agree = agree
        self.group = group
        self.forming = forming

    def copy(self) -> Life:
        """One that can be changed."""
        return Life(renumber(self.machine), dict(self.left), self.agree, self.group, self.forming)

    @property
    def busy(self) -> bool:
        """Whether it is in an agreement or forms a group: it reads then only what is read in mid-step."""
        return self.agree is not None or self.forming is not None

    @property
    def loading(self) -> bool:
        """Whether the life before has died, and this one has not yet loaded its engine."""
        return self.machine.phase is Phase.LOADING

    @property
    def idle(self) -> bool:
        """Whether its next turn would begin nothing that others take part in."""
        return not self.busy and not self.machine._may_step() and self.machine._to_form is None

    @property
    def unfinished(self) -> int:
        """Requests that the rank has, with the engine or held back."""
        return len(self.left) + self.machine.requests.held

    def key(self) -> Hashable:
        """Equal for lives that behave alike."""
        machine = self.machine
        if not machine.running:
            machine.waves.recount()
        if machine.waves.wanted <= machine.wave:
            # Asked for only when this wave has ended, and then it is over.
            machine.waves.wanted = -1
        return (
            freeze(machine),
            tuple(sorted(self.left.values())),
            machine.requests.held,
            freeze(self.agree),
            self.group,
            self.forming,
        )


class Block(NamedTuple):
    """Numbers of the rank's life and of the messages in its links, oldest first; stamps of what front-ends sent.

    `connected`: it hears broadcasts. `asked`: this life of the coordinator has asked it who it is.
    `arriving`: requests on their way. `notices`: notices on their way to the coordinator, that name this rank.
    `late`: what the life before said that may still be read. `gone`: a life of which the coordinator may still hear
    that its connection has ended, 0 for none. `ended`: there is no process, and none is started by itself.
    """

    life: int
    up: tuple[int, ...]
    down: tuple[int, ...]
    connected: bool
    asked: bool
    arriving: tuple[int, ...]
    notices: tuple[int, ...]
    late: tuple[int, ...] = ()
    gone: int = 0
    ended: bool = False


class BlockMove(NamedTuple):
    """What can happen at one rank alone. `waits`: not to a rank that is in the barrier."""

    kind: str
    detail: int
    block: int
    waits: bool
