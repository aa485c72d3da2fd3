"""What a deployment did lately, as one front-end saw it: for a page that people leave open.

    history.look(now)      # often: it samples by itself when one is due
    history.ranks(now)     # what each rank does at this moment

A rank does one thing at a time (`DOING`, by a letter). Of each `SAMPLE_S` of the last 15 minutes there is kept what
each rank did and how full it was, two characters a rank: a thousand ranks are half a megabyte. What has changed between
two looks is said in words: a rank that is gone, back, or hangs; pausing and scaling; another coordinator.

Tokens and hits of prefixes are this front-end's own; whoever shows a deployment adds them up over all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from paceline.core.frontend.machine import NOBODY, Frontend
from paceline.core.frontend.timeline import Timelines

SAMPLE_S = 3.0
KEPT = 300
"""Samples: 15 minutes."""
WORDS_KEPT = 200
RATE_S = 1.0
"""Over so long, at least, tokens are counted for a rate."""
DOING = {
    "p": "prefill", "d": "decode", "y": "dummy step", "i": "idle", "x": "paused", "l": "loading", "h": "hung",
    "m": "gone",
}  # fmt: skip
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Said(Struct, frozen=True):
    """A line in words. `at`: by the monotonic clock."""

    at: float
    text: str
    urgent: bool = False


class RankNow(Struct, frozen=True):
    """What a rank does, and has. `hangs_s`: for how long its step has not returned."""

    rank: int
    doing: str
    waiting: int = 0
    running: int = 0
    slots: int = 0
    prefill_tokens: int = 0
    kv: float = 0.0
    step_s: float = 0.0
    hangs_s: float = 0.0

    @property
    def full(self) -> str:
        """How full it is, as a digit of 36; beyond the last one where requests wait at it."""
        share = (self.running + self.waiting) / self.slots if self.slots else float(self.running > 0)
        return DIGITS[min(len(DIGITS) - 1, round(share * (len(DIGITS) - 1)))]


class Sample(Struct, frozen=True, gc=False):
    """One moment. `doing`, `full`: a character a rank."""

    at: float
    queued: int
    wave: int
    running: bool
    doing: str
    full: str


class History:
    """Of the deployment that this front-end's `machine` is a part of. `lockstep`: whether its ranks run in waves."""

    def __init__(self, machine: Frontend, timelines: Timelines, *, lockstep: bool = False) -> None:
        self.lockstep = lockstep
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self.words: deque[Said] = deque(maxlen=WORDS_KEPT)
        self.rates: dict[int, float] = {}
        """Tokens a second that each rank made for this front-end."""
        self.lives: list[float] = []
        """When each coordinator was first heard."""
        self._machine, self._timelines = machine, timelines
        self._sampled_at = self._counted_at = float("-inf")
        self._counted: dict[int, int] = {}
        self._coordinator = NOBODY
        self._seen: set[int] = set()
        # The life of each.
        self._ready: dict[int, int] = {}
        self._hung: set[int] = set()
        self._pause = 0
        self._size: tuple[int, bool] | None = None

    def say(self, text: str, urgent: bool, now: float) -> None:
        self.words.append(Said(now, text, urgent))

    def look(self, now: float) -> None:
        """Take note of what has changed, and of this moment where one is due."""
        for text, urgent in self._changes(now):
            self.say(text, urgent, now)
        if now >= self._counted_at + RATE_S:
            made, seconds = self._timelines.made, now - self._counted_at
            self.rates = {rank: (made[rank] - self._counted.get(rank, 0)) / seconds for rank in made}
            self._counted, self._counted_at = dict(made), now
        if now >= self._sampled_at + SAMPLE_S:
            self._sampled_at = now
            ranks = self.ranks()
            doing, full = "".join(one.doing for one in ranks), "".join(one.full for one in ranks)
            machine = self._machine
            self.samples.append(Sample(now, machine.queued(), machine.wave, machine.running, doing, full))

    def ranks(self) -> list[RankNow]:
        """Every rank that there is or should be, in order."""
        machine = self._machine
        loads: dict[int, Any] = {load["rank"]: load for load in machine.loads()}  # type: ignore[misc]
        ready = set(machine.ready_ranks())
        pause = machine.suspension
        stopped = pause.number % 2 == 1
        running = self.lockstep and machine.running
        found = []
        for rank in self._known(loads):
            load = loads.get(rank)
            if load is None:
                found.append(RankNow(rank, "m" if rank in self._seen else "l"))
                continue
            if rank in machine.hung:
                doing = "h"
            elif rank not in ready and rank in machine.missing:
                doing = "m"
            elif stopped and rank not in pause.waiting_for:
                doing = "x"
            elif load["running"] or load["waiting"]:
                doing = "p" if load["prefill_tokens"] else "d"
            else:
                doing = "y" if running else "i"
            found.append(
                RankNow(
                    rank, doing, load["waiting"], load["running"], load["slots"], load["prefill_tokens"],
                    load["kv_used"] / load["kv_total"] if load["kv_total"] else 0.0,
                    load["step_s"] + load["answer_token_s"] * load["decoding"], load.get("hangs_s", 0.0),
                )
            )  # fmt: skip
        return found

    def _known(self, loads: dict[int, Any]) -> list[int]:
        machine = self._machine
        whole = range(machine.scaling.limit) if machine.scaling is not None else ()
        should = set(whole) if machine.ranks is None else set(machine.ranks)
        return sorted(should | set(loads) | set(machine.missing))

    def _changes(self, now: float) -> Iterator[tuple[str, bool]]:
        yield from self._sizes()
        machine = self._machine
        lives = machine.lives()
        ready = set(lives)
        # One that is back with another life has been gone between two looks.
        again = {rank for rank, life in self._ready.items() if lives.get(rank, life) != life}
        for rank in sorted((self._ready.keys() - ready - machine.hung) | again):
            yield (f"rank {rank} leaves", False) if self._leaves(rank) else (f"rank {rank} is gone", True)
        for rank in sorted((ready - self._ready.keys() - self._hung) | again):
            yield (f"rank {rank} is back" if rank in self._seen else f"rank {rank} is ready"), False
        for rank in sorted(machine.hung - self._hung):
            yield f"rank {rank} hangs in a step: its requests go on elsewhere", True
        for rank in sorted((self._hung - machine.hung) & ready):
            yield f"rank {rank} goes on", False
        self._seen |= ready
        self._ready, self._hung = lives, set(machine.hung)
        if machine.coordinator != self._coordinator:
            self._coordinator = machine.coordinator
            self.lives.append(now)
        if machine.suspension.number != self._pause:
            self._pause = machine.suspension.number
            yield ("the deployment is asked to pause" if self._pause % 2 else "the deployment goes on"), False

    def _leaves(self, rank: int) -> bool:
        scaling = self._machine.scaling
        return scaling is not None and rank >= scaling.serving

    def _sizes(self) -> Iterator[tuple[str, bool]]:
        scaling = self._machine.scaling
        if scaling is None or (scaling.target, scaling.under_way) == self._size:
            return
        before, self._size = self._size, (scaling.target, scaling.under_way)
        if scaling.under_way:
            yield f"it is scaled from {scaling.size} to {scaling.target} ranks", False
        elif before is not None:
            why = f": {scaling.why}" if scaling.outcome != "done" else ""
            yield f"there are {scaling.size} ranks{why}", scaling.outcome != "done"
