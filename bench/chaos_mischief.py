"""Chaos, as it is made: processes killed and stopped, garbage on every socket."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter

from bench.chaos_clients import Tally
from tests.fuzz.flood import OURS, Flood, addresses_in, socket_folders
from tests.serving import Deployment, process_name

RANKS, FRONTENDS = 4, 2
FAULTS = ("kill a rank", "kill a rank", "stop a rank", "kill a front-end", "kill the coordinator")
PAUSE_S = 0.25
"""Between two rounds of garbage: with none there would be nothing left of the machine for the streams."""


class Mischief:
    """Kills and stops processes. One rank and one front-end are always left alone: somebody must have the answers."""

    def __init__(self, running: Deployment, seed: int, tally: Tally) -> None:
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._stopped: list[tuple[float, int, bool]] = []
        """When each goes on, its id, and whether the deployment began with it."""
        self._killed: Counter[str] = Counter()

    def go_on(self, until: float) -> None:
        """One fault after the other, a second or two apart."""
        while time.monotonic() < until:
            self._wake()
            kind = self._random.choice(FAULTS)
            if self._strike(kind):
                self._tally.faults[kind] += 1
            time.sleep(self._random.uniform(0.3, 2.0))
        self._wake(everybody=True)

    def _strike(self, kind: str) -> bool:
        """Do it to somebody; returns whether there was anybody left for it."""
        what = {"a rank": "rank", "a front-end": "front-end", "the coordinator": "coordinator"}[kind.partition(" ")[2]]
        stopped = {pid for _, pid, _ in self._stopped}
        alive = {pid: process_name(pid) for pid in sorted(self._running.children())}
        up = {pid: name for pid, name in alive.items() if name.startswith(f"pl:{what}") and pid not in stopped}
        if self._left(what) < 2:
            # Ranks that scaling has brought may die at any time.
            up = {pid: name for pid, name in up.items() if not counts(name)}
        if not up:
            return False
        victim = self._random.choice(list(up))
        lasting = counts(up[victim])
        with contextlib.suppress(ProcessLookupError):
            if kind.startswith("stop"):
                os.kill(victim, signal.SIGSTOP)
                self._stopped.append((time.monotonic() + self._random.choice((0.2, 1.5, 4.0)), victim, lasting))
            else:
                os.kill(victim, signal.SIGKILL)
                self._killed[what] += what != "coordinator" and lasting
        return True

    def _left(self, what: str) -> int:
        """How many of a kind are neither stopped nor away, of those that it began with. Only ranks are stopped."""
        stopped = sum(lasting for _, _, lasting in self._stopped)
        back = re.compile(rf"\b({what} \d+) is back$")
        found = [back.search(line) for line in list(self._running.lines)]
        away = self._killed[what] - sum(one is not None and counts(one[1]) for one in found)
        return {"rank": RANKS - stopped, "front-end": FRONTENDS, "coordinator": 2}[what] - away

    def _wake(self, *, everybody: bool = False) -> None:
        now = time.monotonic()
        for stopped in list(self._stopped):
            at, pid, _ = stopped
            if everybody or now >= at:
                self._stopped.remove(stopped)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def counts(name: str) -> bool:
    """Whether a process is one that the deployment began with, and keeps: any but the ranks that scaling brings."""
    rank = re.search(r"\brank (\d+)$", name)
    return rank is None or int(rank[1]) < RANKS


def flood_of(running: Deployment, seed: int, pause_s: float = PAUSE_S) -> Flood:
    """Garbage for every socket of a deployment of ours, as they come and go."""
    folders, port = socket_folders(running.process.pid), int(running.url.rpartition(":")[2])
    return Flood(lambda: addresses_in(folders, port), OURS, seed, pause_s)
