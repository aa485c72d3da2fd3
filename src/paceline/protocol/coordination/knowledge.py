"""All that one coordinator knows of its deployment, part by part, and what concerns several parts at once."""

from __future__ import annotations

from collections.abc import Set

from paceline.protocol.binding.brokerage import Brokerage
from paceline.protocol.coordination.board import STEP_WAIT_S, Board
from paceline.protocol.coordination.generation import Generations
from paceline.protocol.coordination.introductions import PATIENCE_S, Introductions
from paceline.protocol.coordination.membership import Membership
from paceline.protocol.coordination.publishing import Publisher
from paceline.protocol.coordination.scaling import DeploymentScaling
from paceline.protocol.coordination.stalls import Stalls, describe
from paceline.protocol.coordination.suspending import Suspending
from paceline.protocol.coordination.wave import GroupWave
from paceline.protocol.rules import checked


class Knowledge:
    """The parts, and who is forgotten in all of them.

    `engine_count`: ranks in the deployment. `identity`: this life's own number.
    `interval_s`: least time between two load views; 0 publishes every change. `step_wait_s`: how much earlier one goes
    out in lockstep where all ranks have reported one step, and how long a late one waits for that.
    `lockstep`: whether the ranks run in waves. `publish_loads`: False in external mode, where views
    carry the wave and no loads. `fresh`: no other came before it. `presence`: all ranks show theirs. `most_ranks`: what
    the deployment may be scaled to, None for four times the ranks that it has and at least 16. `without`: rules
    (`rules.py`) left out, to show what breaks.
    """

    def __init__(
        self, engine_count: int, identity: int, interval_s: float, *, lockstep: bool = True, publish_loads: bool = True,
        fresh: bool = True, presence: bool = False, step_wait_s: float = STEP_WAIT_S,
        most_ranks: int | None = None, without: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.identity = identity
        self.lockstep = lockstep
        self._membership = Membership(engine_count, presence=presence)
        self._without = checked(without)
        self._group = GroupWave(self._without)
        patience_s = None if lockstep else PATIENCE_S
        self._introductions = Introductions(engine_count, fresh=fresh, patience_s=patience_s, without=without)
        self._generations = Generations(engine_count)
        self._scaling = DeploymentScaling(engine_count, most_ranks, self._without)
        self._stalls = Stalls()
        self._suspension = Suspending(identity, lockstep, self._without)
        self._board = Board()
        self.broker = Brokerage(identity, self._without)
        wait_s = step_wait_s if lockstep else None
        self._publisher = Publisher(identity, interval_s, with_loads=publish_loads, step_wait_s=wait_s)
        self._dropped = 0
        self._front_ends: set[int] = set()

    @property
    def size(self) -> int:
        """Ranks in the deployment."""
        return self._membership.size

    @property
    def deadline(self) -> float:
        """When the next Tick is due, at the latest."""
        waking, suspending, forming = self._group.wake_due, self._suspension.due, self._generations.due
        timers = (waking, suspending, forming, self._introductions.due, self.broker.due, self._scaling.due)
        return min(self._publisher.deadline, *(due for due in timers if due is not None), float("inf"))

    def statistics(self) -> dict[str, object]:
        """What this machine knows, for `/health`, metrics and tests."""
        return {
            "wave": self._group.wave,
            "running": self._group.running,
            "ready": [member.rank for member in self._membership.members()],
            "missing": self._membership.missing(),
            "lagging": self._group.lagging(),
            "stalls": [describe(stall) for stall in self._stalls.found],
            "generation": self._generations.number,
            "suspension": self._suspension.shown.number,
            "suspension_settled": self._suspension.shown.settled,
            "front_ends": len(self._front_ends),
            "queued": self.broker.queued,
            "views_published": self._publisher.views,
            "void_messages": self._dropped,
        }

    def _forget_rank(self, rank: int, now: float) -> None:
        """What the rank last said of loads, waves, groups and suspensions does not hold any more."""
        self._board.forget_rank(rank)
        self._group.forget(rank, now)
        self._generations.forget(rank, now)
        self._suspension.forget(rank)
        self._stalls.forget(rank)
        self._scaling.lost(rank)
        self.broker.lost(rank)
        self._suspension_changed(now)
        self._publisher.members_changed(now)

    def _forget_front_end(self, front_end: int, now: float) -> None:
        self._suspension.calls.forget_front_end(front_end)
        self._scaling.forget_front_end(front_end)
        self._front_ends.discard(front_end)
        self._board.forget_front_end(front_end)
        self.broker.forget_front_end(front_end)
        self._publisher.loads_changed(now)

    def _suspension_changed(self, now: float) -> None:
        if self._suspension.settle(self._membership, self._generations, now):
            self._publisher.changed(now)
        if not self._suspension.standing.free:
            self._group.no_notice(now)

    def _late(self) -> list[int]:
        """Ranks that were told, with their generation, a wave that the others have finished meanwhile."""
        return self._group.late() if self._generations.number else []
