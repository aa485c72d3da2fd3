"""Which rank holds the others up, out of what each rank says of whom it waits for.

A rank that waits in a collective for longer than the stall timeout says so, and whose part it lacks. Small
reductions go through one member, so most ranks can only name that one; it names the rank that is late. So of those
that are named, the culprits are the ones that wait for nobody themselves.
"""

from __future__ import annotations

from paceline.protocol.messages import Stall, StallReport


class Stalls:
    """What the ranks wait for, as of their last word."""

    def __init__(self) -> None:
        self._reports: dict[int, StallReport] = {}
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
        return [describe(stall) for stall in self.found] or ["no rank holds the group up any more"]

    def _settle(self) -> bool:
        before = [stall.rank for stall in self.found]
        named = {rank for report in self._reports.values() for rank in report.ranks}
        self.found = [self._stall(rank) for rank in sorted(named - set(self._reports) or named)]
        return [stall.rank for stall in self.found] != before

    def _stall(self, rank: int) -> Stall:
        waiting = [report for report in self._reports.values() if rank in report.ranks]
        longest = max(waiting, key=lambda report: report.seconds)
        return Stall(
            rank, longest.step, longest.collective, longest.kind, longest.seconds, sorted(self._reports)
        )  # fmt: skip


def describe(stall: Stall) -> str:
    """One line for the log and `/health`."""
    waiting = ", ".join(map(str, stall.waiting))
    kind = stall.kind.encode("unicode_escape").decode()
    return (
        f"rank {stall.rank} holds the group up: {kind} {stall.collective} in step {stall.step}, "
        f"for {stall.seconds:.1f} s; waiting: rank {waiting}"
    )
