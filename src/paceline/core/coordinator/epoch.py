"""The coordinator's part in epochs: which lockstep ranks run their collectives together, and which rank holds them up.

Collectives block until every member takes part, so who is a member must be the same for all, and a member's death
ends the group for all. When every rank of the deployment has said where it is reached, the coordinator gives that
set of lives a number and tells all to form it, again and again until each has said that it has.

A new life of a rank, a member that fell out, or a forming that takes too long makes the next epoch, with a number that
no rank has been told before. Whoever fell out knows only that somebody has died, and the dead say nothing: so the next
epoch is formed once every rank has spoken again. Those that live are asked, and answer in mid-step too.

Who does not answer is left out: at once where its connection has ended, else after a longer patience, since it may be
slow; before the first epoch nobody is, since all are still loading. When it speaks, the same life or the next, it makes
the next epoch, with all: that breaks off the step that the others are in, which they make anew.

A new coordinator that hears all ranks name the same epoch has nothing to do.

Some engines' collectives cannot be formed anew (vLLM's): the death of a member is the end of the group, and each rank
says that a life of it is a member *once*. Nobody goes on without whoever is lost, then: the others end their lives,
by themselves as their step fails, or when the next epoch is told, and the one after that is formed of new lives. Such
a group loads as it forms, for minutes: a member's end tells that it will not be formed, and no time does.

Stalls. A rank that waits in a collective for longer than the stall timeout says so, and whose part it lacks. Small
reductions go through one member, so most ranks can only name that one; it names the rank that is late. So of those
that are named, the culprits are the ones that wait for nobody themselves. A rank whose own step does not return names
itself (`core/rank/hang.py`): so do independent ranks, which nobody waits for.
"""

from __future__ import annotations

from collections.abc import Set

from msgspec import Struct

from paceline.core.load import plausible
from paceline.core.messages import GroupMember, RankHello, Stall, StallReport
from paceline.core.retry import Retry

LOST_S = 0.1
"""How long a rank whose connection has ended may take to be back: one that is connected anew, not dead."""
SILENT_S = 2.0
"""How long the others wait for a rank that says nothing. A rank in a step answers all the same."""
FORM_TIMEOUT_S = 2.0
"""After this an epoch that is not formed is given up: a member may have died, or be in a long step."""


class Position(Struct, frozen=True):
    """A rank's life, where its peers reach it, the epoch that it is in (0: none), and the highest that it was told.
    `once`: as in RankHello.
    """

    incarnation: int
    address: str
    epoch: int
    told: int
    once: bool = False

    @classmethod
    def of(cls, hello: RankHello) -> Position:
        """What a rank says of it."""
        return cls(hello.incarnation, hello.group_address, hello.generation, hello.told, hello.once)


class Epochs:
    """The current epoch of a deployment of `size` ranks, and what is still to be formed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: dict[int, Position] = {}
        self.number = 0
        """The epoch that is, or is to be, formed; 0 before the first."""
        self.asks = False
        """Set where all ranks must be asked who they are; whoever asks clears it."""
        self.absent: set[int] = set()
        """Ranks that the others go on without, until they speak."""
        self._members: dict[int, int] = {}
        # Who has spoken since it was known that the epoch has ended; None while it stands, or is being formed.
        self._spoken: set[int] | None = set()
        self._lost: set[int] = set()
        # When whoever is lost, and whoever is silent, is left out; None where nobody is waited for.
        self._lost_at: float | None = None
        self._silent_at: float | None = None
        self._retry = Retry()
        self._give_up_at = float("inf")
        # Whether there is an epoch of all ranks or none.
        self._whole = False

    @property
    def ended(self) -> bool:
        """Whether there is none, and not all ranks have spoken yet who are to form the next."""
        return self._spoken is not None

    @property
    def forming(self) -> bool:
        return self._retry.due is not None

    @property
    def due(self) -> float | None:
        """When members must be told (again), or somebody is left out; None for neither."""
        timers = [at for at in (self._retry.due, self._lost_at, self._silent_at) if at is not None]
        return min(timers, default=None)

    def timers(self) -> dict[str, list[int]]:
        """What is waited for, each with the ranks whose word would end that."""
        spoken = self._spoken or set()
        found = {
            "generation": (self._retry.due, list(self._members)),
            "patience": (None if self._retry.due is None else self._give_up_at, list(self._members)),
            "lost": (self._lost_at, sorted(self._lost)),
            "silent": (self._silent_at, [rank for rank in range(self._size) if rank not in spoken]),
        }
        return {name: ranks for name, (at, ranks) in found.items() if at is not None}

    def expire(self, timer: str, now: float) -> None:
        """One of these has come, whatever its time was. That one takes too long is seen as it is told again."""
        match timer:
            case "generation":
                self._retry.due = now
            case "patience":
                self._retry.due = self._give_up_at = now
            case "lost":
                self._lost_at = now
            case "silent":
                self._silent_at = now

    def members(self) -> dict[int, int]:
        """By rank, the lives that the epoch is, or is to be, formed of; empty while there is none."""
        return self._members if self._spoken is None else {}

    def heard(self, rank: int, position: Position, now: float) -> None:
        if not plausible(max(position.epoch, position.told), self.number):
            return
        before = self._ranks.get(rank)
        self._ranks[rank] = position
        self._whole = self._whole or position.once
        self._lost.discard(rank)
        self.absent.discard(rank)
        if self._complete():
            return
        new_life = before is not None and before.incarnation != position.incarnation
        # Who says that it left one from before may be about to form this one, as it was told.
        left = before is not None and before.epoch >= max(self.number, 1)
        fell_out = left and position.epoch == 0
        if self._spoken is None and (new_life or fell_out or self._members.get(rank) != position.incarnation):
            self._end(now)
        if self._spoken is not None:
            self._spoken.add(rank)
            if self._silent_at is None and max(self.number, position.told):
                self._silent_at = now + SILENT_S
            self._next_if_all_spoke(now)

    def forget(self, rank: int, now: float) -> None:
        """The rank's connection has ended, or its life; the next hello of any life of it makes a new epoch."""
        if self._ranks.pop(rank, None) is not None:
            self._lost.add(rank)
            self._end(now)
            self._lost_at = now + LOST_S

    def resize(self, size: int, now: float) -> None:
        """The deployment has so many ranks. Those that leave are in the next epoch no more; new ones are heard."""
        self._size = size
        gone = [rank for rank in self._ranks if rank >= size]
        for rank in gone:
            del self._ranks[rank]
        for ranks in (self._lost, self.absent, self._spoken or set()):
            ranks.difference_update([rank for rank in ranks if rank >= size])
        if self._spoken is not None:
            self._next_if_all_spoke(now)
        elif gone and self._ranks:
            # Those that are left are known to be there, and need not be asked.
            self._next(now)

    def silent(self) -> list[int]:
        """Ranks that have not spoken since the epoch ended: they are to be asked, again and again."""
        return [] if self._spoken is None else [rank for rank in self._ranks if rank not in self._spoken]

    def form(self, now: float) -> tuple[int, list[GroupMember]] | None:
        """The epoch and its members, if they are to be told now; the next repeat is set."""
        if self._lost_at is not None and now >= self._lost_at:
            self._lost_at = None
            self._leave_out(self._lost, now)
        if self._silent_at is not None and now >= self._silent_at:
            self._silent_at = None
            self._leave_out(set(range(self._size)) - (self._spoken or set()), now)
        if not self._retry.is_due(now):
            return None
        if now >= self._give_up_at:
            self._end(now)
            return None
        self._retry.said(now)
        return self.number, [GroupMember(r, p.incarnation, p.address) for r, p in sorted(self._ranks.items())]

    def _leave_out(self, ranks: Set[int], now: float) -> None:
        """Go on without these, if there has been an epoch and others are left."""
        told = max((position.told for position in self._ranks.values()), default=0)
        if self._whole:
            return
        if self._spoken is None or not max(self.number, told):
            return
        for rank in ranks:
            self._ranks.pop(rank, None)
        self.absent |= ranks
        # A new one in any case, also where the others name one from before: whoever is left out may be in that.
        self._next_if_all_spoke(now)

    def _next_if_all_spoke(self, now: float) -> None:
        if self._spoken and len(self._spoken) == self._size - len(self.absent):
            self._next(now)

    def _complete(self) -> bool:
        """Whether all ranks, but for those left out, are members of one epoch: the one that was to be formed, or
        one from before."""
        named = {position.epoch for position in self._ranks.values()}
        all_there = len(self._ranks) == self._size - len(self.absent)
        if not all_there or len(named) != 1 or max(named) < max(self.number, 1):
            return False
        self.number = max(named)
        self._members = {rank: position.incarnation for rank, position in self._ranks.items()}
        self._retry.stop()
        self._wait_for_nobody()
        return True

    def _end(self, now: float) -> None:
        self._retry.stop()
        self._spoken, self._members = set(), {}
        self._silent_at = now + SILENT_S
        self.asks = True

    def _next(self, now: float) -> None:
        self._wait_for_nobody()
        self._members = {rank: position.incarnation for rank, position in self._ranks.items()}
        self.number = max(self.number, *(position.told for position in self._ranks.values())) + 1
        self._retry.start(now)
        self._give_up_at = float("inf") if self._whole else now + FORM_TIMEOUT_S

    def _wait_for_nobody(self) -> None:
        self._spoken = self._lost_at = self._silent_at = None


class Stalls:
    """What the ranks wait for, as of their last word."""

    def __init__(self) -> None:
        self._reports: dict[int, StallReport] = {}
        self._over: list[int] = []
        self.found: list[Stall] = []
        """Each rank that holds others up."""

    def report(self, report: StallReport) -> bool:
        """A rank waits, or (where it names nobody) waits no longer. Returns whether `found` names other ranks now."""
        if report.ranks:
            self._reports[report.rank] = report
        else:
            self._reports.pop(report.rank, None)
        return self._settle()

    def forget(self, rank: int) -> bool:
        """The rank is gone. Returns as `report` does."""
        self._reports.pop(rank, None)
        return self._settle()

    def lines(self) -> list[str]:
        """What is to be said of it, a line each."""
        return [*map(describe, self.found), *(f"rank {rank} goes on" for rank in self._over)]

    def _settle(self) -> bool:
        before = [stall.rank for stall in self.found]
        named = {rank for report in self._reports.values() for rank in report.ranks}
        wait = {rank for rank, report in self._reports.items() if rank not in report.ranks}
        self.found = [self._stall(rank) for rank in sorted(named - wait or named)]
        found = [stall.rank for stall in self.found]
        self._over = [rank for rank in before if rank not in found]
        return found != before

    def _stall(self, rank: int) -> Stall:
        waiting = [report for report in self._reports.values() if rank in report.ranks]
        # What it says of itself tells more than what others wait for.
        longest = max(waiting, key=lambda report: (report.rank == rank, report.seconds))
        return Stall(
            rank, longest.step, longest.collective, longest.kind, longest.seconds, sorted(self._reports)
        )  # fmt: skip


def describe(stall: Stall) -> str:
    """One line for the log and `/health`."""
    if stall.hangs:
        return f"rank {stall.rank} hangs: step {stall.step} has not returned for {stall.seconds:.1f} s"
    waiting = ", ".join(map(str, stall.waiting))
    kind = stall.kind.encode("unicode_escape").decode()
    return (
        f"rank {stall.rank} holds the group up: {kind} {stall.collective} in step {stall.step}, "
        f"for {stall.seconds:.1f} s; waiting: rank {waiting}"
    )
