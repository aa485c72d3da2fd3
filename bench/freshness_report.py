"""What `freshness.py` measured, as tables."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.coordinator.load_table import STEP_WAIT_S
from paceline.core.messages import LoadView

MEASURED = """\
## What is measured

A coordinator process as a deployment starts it, on ipc sockets. Processes of the lowest priority stand in for the
ranks, with a socket for each rank and reports of real size; the measuring process subscribes as two front-ends do.

- **First change after quiet**: from just before a rank's report is encoded and sent to just after the view that shows
  it has come to a front-end, with an interval of 20 ms and 35 ms of quiet between. In lockstep all ranks report one
  step, and the time is from when the last of them was sent. **Bare relay**: in turn with it, a frame goes through a
  process that passes it from one such socket on to the other and does nothing else: what the machine itself takes.
- **gap**: between two views as they come to a front-end, in milliseconds.
  **Bare timer**: at the same time, a process that does nothing but send a frame every interval: what the machine itself
  takes.
- **taken**: reports whose content a view shows or a later one of the same rank replaced, by the rank's own count.
  **a CPU second**: over the coordinator's whole CPU time, ZeroMQ's thread and the views included.
- **MB**: the most that the coordinator's process had in memory. **age**: how old a rank's load was when a view with it
  came, the median over all ranks of all views, from before the report was encoded: the sender's queue, the
  coordinator's, its turn, the interval's rest and the way to the front-end.
- **one step**: views in which all ranks show the same step.

On a shared machine of few cores the ranks' stand-ins, ZeroMQ's threads, both front-ends and the coordinator wait for
one another's time slices of some milliseconds, and the far ends of the distributions show that and nothing else.
"""
GOAL_FIRST_MS = 2.0
GOAL_OVER_MS = 5.0


def named(lockstep: bool) -> str:
    return "lockstep" if lockstep else "independent"


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def gaps_ms(came_us: Sequence[int]) -> list[float]:
    return [(after - before) / 1000 for before, after in itertools.pairwise(came_us)]


def within_goal(took_us: Sequence[int]) -> float:
    """The share that took no longer than the goal for a first change."""
    return sum(1 for took in took_us if took <= GOAL_FIRST_MS * 1000) / len(took_us)


@dataclass
class Quiet:
    """How long the first change after quiet took to a front-end, in microseconds."""

    ranks: int
    interval_ms: int
    lockstep: bool
    took_us: list[int]
    bare_us: list[int]
    one_step: float

    def ms(self, share: float) -> float:
        return percentile(self.took_us, share) / 1000

    def __str__(self) -> str:
        who = f"{self.ranks} ranks, {named(self.lockstep)}"
        return f"first change, {who}: p50 {self.ms(0.5):.2f} ms, p99 {self.ms(0.99):.2f} ms"


@dataclass
class Cell:
    """Views and cost under input. Times in milliseconds."""

    ranks: int
    interval_ms: int
    lockstep: bool
    per_second: float
    p50: float
    p99: float
    most: float
    messages_a_second: float
    messages_a_cpu_second: float
    cores: float
    memory_mb: float
    age_ms: float
    one_step: float
    refused: int
    bare_p99: float

    @staticmethod
    def of(
        ranks: int, interval_ms: int, lockstep: bool, per_second: float, views: Sequence[tuple[int, LoadView]],
        seconds: float, cpu_s: float, memory_mb: float, refused: int,
        bare_came: Sequence[int],
    ) -> Cell:  # fmt: skip
        """From the views: when each came, in microseconds, and what it said."""
        came = [when for when, _ in views]
        gaps, bare = gaps_ms(came), gaps_ms(bare_came)
        taken = sum(entry.step for entry in views[-1][1].ranks or ()) - sum(
            entry.step for entry in views[0][1].ranks or ()
        )
        messages = taken / ((came[-1] - came[0]) / 1e6)
        ages = [when - entry.load.prefill_tokens for when, view in views for entry in view.ranks or ()]
        whole = [len({entry.step for entry in view.ranks or ()}) == 1 for _, view in views]
        return Cell(
            ranks, interval_ms, lockstep, per_second, percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps),
            messages, messages * seconds / cpu_s, cpu_s / seconds, memory_mb,
            statistics.median(ages) / 1000, sum(whole) / len(whole), refused,
            percentile(bare, 0.99),
        )  # fmt: skip

    @property
    def kept(self) -> bool:
        return self.p99 <= self.interval_ms + GOAL_OVER_MS

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks, {named(self.lockstep)}, interval {self.interval_ms},"
            f" {self.per_second or 'all'}/s: p50 {self.p50:.1f}"
            f" p99 {self.p99:.1f} max {self.most:.1f} ms (bare timer p99 {self.bare_p99:.1f});"
            f" {self.messages_a_second:,.0f}/s, {self.messages_a_cpu_second:,.0f}/cpu s, {self.cores:.2f} cores,"
            f" {self.memory_mb:.0f} MB,"
            f" age {self.age_ms:.1f} ms, one step {self.one_step:.0%}, refused {self.refused}"
        )


FIRST: dict[str, Callable[[Quiet], str]] = {
    "ranks": lambda one: str(one.ranks),
    "": lambda one: named(one.lockstep),
    "p50 ms": lambda one: f"{one.ms(0.5):.2f}",
    "p99 ms": lambda one: f"{one.ms(0.99):.2f}",
    "most ms": lambda one: f"{one.ms(1):.2f}",
    "within 2 ms": lambda one: f"{within_goal(one.took_us):.1%}",
    "p50, p99": lambda one: ", ".join("met" if one.ms(share) <= GOAL_FIRST_MS else "missed" for share in (0.5, 0.99)),
    "one step": lambda one: f"{one.one_step:.0%}" if one.lockstep else "",
    "bare relay: p50": lambda one: f"{percentile(one.bare_us, 0.5) / 1000:.2f}",
    "p99": lambda one: f"{percentile(one.bare_us, 0.99) / 1000:.2f}",
    "of these within 2 ms": lambda one: f"{within_goal(one.bare_us):.1%}",
}
CELLS: dict[str, Callable[[Cell], str]] = {
    "ranks": lambda cell: str(cell.ranks),
    "": lambda cell: named(cell.lockstep),
    "interval ms": lambda cell: str(cell.interval_ms),
    "gap p50": lambda cell: f"{cell.p50:.1f}",
    "p99": lambda cell: f"{cell.p99:.1f}",
    "most": lambda cell: f"{cell.most:.1f}",
    "bare timer: p99": lambda cell: f"{cell.bare_p99:.1f}",
    "taken a second": lambda cell: f"{cell.messages_a_second:,.0f}",
    "a CPU second": lambda cell: f"{cell.messages_a_cpu_second:,.0f}",
    "cores": lambda cell: f"{cell.cores:.2f}",
    "MB": lambda cell: f"{cell.memory_mb:.0f}",
    "age ms": lambda cell: f"{cell.age_ms:.1f}",
}
FLOOD = CELLS | {"p99 within interval + 5 ms": lambda cell: "met" if cell.kept else "missed"}
PACED = CELLS | {"one step": lambda cell: f"{cell.one_step:.0%}"}


def _table(columns: dict[str, Callable[[Any], str]], measured: Iterable[Quiet | Cell]) -> str:
    lines = [list(columns), ["---:"] * len(columns)]
    lines += [[column(one) for column in columns.values()] for one in measured]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _beside_timer(cells: Sequence[Cell]) -> str:
    """How much of what is over the interval is the machine's."""
    bare = sum(cell.bare_p99 <= cell.interval_ms + GOAL_OVER_MS for cell in cells)
    over = {way: max((cell.p99 - cell.bare_p99 for cell in cells if cell.lockstep is way), default=0.0)
            for way in (False, True)}  # fmt: skip
    return (
        f"p99 within interval + {GOAL_OVER_MS:g} ms: {sum(cell.kept for cell in cells)} of {len(cells)} rows, the bare "
        f"timer {bare}. At most {over[False]:.1f} ms more than the bare timer's p99 where ranks are independent, and "
        f"{over[True]:.1f} ms in lockstep, where a view waits up to {STEP_WAIT_S * 1000:g} ms for the rest "
        "of a step: a process that waits for a core is late, however it is written."
    )


def to_markdown(arguments: str, cores: int, seconds: float, firsts: Sequence[Quiet], cells: Sequence[Cell]) -> str:
    flood = [cell for cell in cells if not cell.per_second]
    parts = [
        "# How fresh the loads are",
        f'    make bench-freshness ARGS="{arguments}"    # {seconds / 60:.1f} minutes',
        f"Machine: {cores} cores, shared with other work. Load average over the run: {os.getloadavg()[1]:.1f}.",
        "## First change after quiet",
        _table(FIRST, firsts),
        "## All ranks report as fast as they can",
        _table(FLOOD, flood),
        _beside_timer(flood),
        "## Lockstep ranks at 100 steps a second",
        _table(PACED, (cell for cell in cells if cell.per_second)),
        MEASURED,
    ]
    return "\n\n".join(parts)
