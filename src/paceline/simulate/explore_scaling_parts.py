"""A deployment whose size changes: what is added to a rank's block, and to the coordinator as a number."""

from __future__ import annotations

from collections.abc import Hashable

from paceline.core.coordinator.events import FrontEndSaid, RankSaid
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    FrontEndHello,
    Members,
    NodeHello,
    RankFailed,
    RankReport,
    ScaleRequest,
    Scaling,
)
from paceline.simulate.explore_block import FRONT_END, Block
from paceline.simulate.explore_coordinator import TIMERS, Answer, Coordinators
from paceline.simulate.explore_group_rank import GroupedBlocks
from paceline.simulate.explore_parts import LATER, NOW, RankLabel, Register, freeze

PATIENCE_MS = 1000
"""Of each change, to drain and to load: whether that is over is the walk's choice."""


class ScaledBlocks(GroupedBlocks):
    """Blocks of ranks that may not be there: `Block.ended`."""

    def absent(self) -> int:
        """The block of a rank that there never was."""
        life = self._lives.number(self._new_life(0))
        return self.number(Block(life, (), (), False, False, (), (), ended=True))

    def started(self, number: int) -> int:
        """The block after the node has started the rank, which has still to load its engine."""
        life = self._lives.number(self._new_life(self.incarnation[number] + 1))
        return self.number(self[number]._replace(life=life, ended=False))

    def stopped(self, number: int) -> list[int]:
        """The blocks after the rank's process has ended for good: what it had said is lost, or may still be read.

        (That it says that it leaves is left out: it is ended when the coordinator knows it no more.)
        """
        life = self._lives.number(self._new_life(self.incarnation[number]))
        block, known = self[number], not self.loading[number]
        after = block._replace(
            life=life, up=(), down=(), connected=False, asked=False, arriving=(), ended=True,
            gone=self.incarnation[number] if known else block.gone,
        )  # fmt: skip
        return list(dict.fromkeys((self.number(after), self.number(after._replace(late=block.up or block.late)))))

    def closed(self, number: int) -> int:
        """The block after front-ends have closed their connections to the rank: what was on its way is lost."""
        return self.number(self[number]._replace(arriving=()))

    def idle(self, number: int) -> bool:
        """Whether the rank has nothing left, and has said all that it has to say."""
        block = self[number]
        return not block.ended and not block.up and not self.life(number).unfinished

    def report(self, number: int, rank: int) -> RankReport:
        """What it says then of its load."""
        machine = self.life(number).machine
        return RankReport(RankLabel(rank), machine.incarnation, 0, machine.wave, machine.running, Load(), {})


class ScaledCoordinators(Coordinators):
    """Coordinators that hear of scaling. `scalings`: what they have said of it, by number."""

    timers_kept = {**TIMERS, "scaling": ("_scaling", "_due"), "scaling-late": ("_scaling", "_deadline")}

    def __init__(self, size: int, without: frozenset[str] = frozenset()) -> None:
        super().__init__(size, without)
        self.scalings: Register[Scaling] = Register()

    def key(self, machine: Coordinator) -> Hashable:
        """Of loads only this matters: whether a rank that is to leave has said that it has nothing left."""
        scaling, members = machine._scaling, machine._membership
        idle = [machine._board.idle(rank, members.ready_life(rank)) for rank in scaling.state.leaving]
        return super().key(machine), freeze(machine._front_ends), tuple(idle)

    def scaling_in(self, message: Members) -> int:
        """The number of what is said there of scaling."""
        return -1 if message.scaling is None else self.scalings.number(message.scaling)

    def scaling(self, number: int) -> Scaling:
        """How many ranks there are, or are to be, as this coordinator holds."""
        return self[number]._scaling.state

    def has_loaded(self, number: int, rank: int) -> bool:
        """Whether it knows that this rank, which is to join, has loaded."""
        return rank in self[number]._scaling._loaded

    def hears_of_idle(self, number: int) -> bool:
        """Whether the next report of a leaving rank that has nothing left is the last word that is waited for."""
        machine = self[number]
        known, state = machine._scaling._known_by, machine._scaling.state
        heard = all(known.get(front_end, -1) >= state.number for front_end in machine._front_ends)
        return heard and not machine._introductions._unheard

    def is_current(self, number: int, rank: int, incarnation: int) -> bool:
        """Whether what this life of the rank says counts."""
        return self[number]._membership.is_current(rank, incarnation)

    def reported(self, number: int, report: RankReport) -> Answer:
        """A rank's report of its load."""
        name = ("reported", int(report.rank), report.incarnation, report.wave, report.running)
        return self._answer(number, name, lambda: RankSaid(report))

    def node_said(self, number: int, message: NodeHello | RankFailed, name: int) -> Answer:
        """A node's message; `name`: its number."""
        return self._answer(number, ("node", name), lambda: RankSaid(message))

    def front_end_said(self, number: int, scaling: int) -> Answer:
        """The front-ends say hello. `scaling`: the number of the newest that they know."""
        known = self.scalings[scaling] if self.scalings[scaling].number else None
        hello = FrontEndHello(PROTOCOL_VERSION, FRONT_END, scaling=known)
        return self._answer(number, ("front-end", scaling), lambda: FrontEndSaid(hello))

    def asked_to_scale(self, number: int, call: int, size: int) -> Answer:
        """A front-end's request for so many ranks, or its repeat."""
        request = ScaleRequest(FRONT_END, call, size, PATIENCE_MS, PATIENCE_MS)
        return self._answer(number, ("scale", call, size), lambda: FrontEndSaid(request))

    def late(self, number: int) -> bool:
        """Whether a change is under way whose time may be up."""
        return self[number]._scaling._deadline in (NOW, LATER)
