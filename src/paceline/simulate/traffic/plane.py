"""What stands between the clients and the ranks: whoever decides which rank a request goes to, and what it knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence


class Fleet(Protocol):
    """The ranks, as a control plane reaches them."""

    ranks: list[SimulatedRank]

    def deliver(self, rank: int, sequence: Sequence) -> None:
        """A request arrives at a rank now; it takes it in before its next step."""

    def grown(self, rank: SimulatedRank, when: float) -> int:
        """By how much more KV memory a rank has used at `when` than its last `counts` say."""

    def steps_done(self, rank: SimulatedRank, when: float) -> int:
        """How many steps a rank has made at `when` since its own `step` was counted."""

    def step_end(self, rank: SimulatedRank, when: float) -> float | None:
        """When the step that a rank is in at `when` is over, where it is one of many that only decode."""

    def nudge(self) -> None:
        """Lockstep: there is something to pull: all run if they do not, and pull after the step that runs now."""

    def wake(self) -> None:
        """Lockstep: all run now, if they do not yet."""

    def next_turn(self, rank: SimulatedRank) -> float:
        """When the rank could take something in, at the soonest. For those who know everything."""


class ControlPlane:
    """Does nothing; each of its kinds does some of it."""

    def start(self, fleet: Fleet) -> None:
        """Before anything else."""

    def arrive(self, sequence: Sequence) -> None:
        """A client's request has reached its front-end."""

    def pull(self, ranks: list[SimulatedRank]) -> Iterable[int]:
        """These ranks are between two steps, and take what is given to them (`engine.add`) into the next.

        Returns the numbers of those that were given something.
        """
        return ()

    def between_steps(self, rank: SimulatedRank) -> None:
        """The rank has taken in what has come and begins its next step now; its `counts` are fresh. Independent."""

    def all_between_steps(self, changed: list[SimulatedRank], others: Iterable[SimulatedRank]) -> None:
        """Lockstep: as `between_steps`, for all at once. In `others` nothing has changed but that they have decoded."""

    def ended(self, rank: SimulatedRank, sequences: Iterable[Sequence]) -> None:
        """The rank has just made the last tokens of these."""

    def woken(self, rank: SimulatedRank) -> None:
        """Lockstep: a paused rank has taken a request; the others are running in a moment."""

    def paused(self) -> None:
        """Lockstep: all ranks have agreed to pause."""
