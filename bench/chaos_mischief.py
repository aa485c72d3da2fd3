"""Chaos, as it is made: processes killed and stopped, the deployment suspended, garbage on every socket."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter

import httpx2
from bench.chaos_clients import Tally
from tests.fuzz.flood import OURS, Flood, addresses_in, socket_folders
from tests.serving import Deployment, process_name

RANKS, FRONT_ENDS = 4, 2
FAULTS = ("kill a rank", "kill a rank", "stop a rank", "kill a front-end", "kill the coordinator")
CALL_S = 15.0
"""How long a call to suspend or resume may take."""
RESUMED_S = 60.0
PAUSE_S = 0.25
"""Between two rounds of garbage: with none there would be nothing left of the machine for the streams."""


class Mischief:
    """Kills and stops processes. One rank and one front-end are always left alone: somebody must have the answers."""

    def __init__(self, running: Deployment, seed: int, tally: Tally) -> None:
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._stopped: list[tuple[float, int]] = []
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
        what = {"a rank": "rank", "a front-end": "front-end", "the coordinator": "coordinator"}[kind.partition(" ")[2]]
        stopped = {pid for _, pid in self._stopped}
        alive = sorted(pid for pid in self._running.children() if process_name(pid).startswith(f"pl:{what}"))
        up = [pid for pid in alive if pid not in stopped]
        left = {"rank": RANKS - len(stopped), "front-end": FRONT_ENDS, "coordinator": 2}[what] - self._down(what)
        if left < 2 or not up:
            return False
        victim = self._random.choice(up)
        with contextlib.suppress(ProcessLookupError):
            if kind.startswith("stop"):
                os.kill(victim, signal.SIGSTOP)
                self._stopped.append((time.monotonic() + self._random.choice((0.2, 1.5, 4.0)), victim))
            else:
                os.kill(victim, signal.SIGKILL)
                self._killed[what] += what != "coordinator"
        return True

    def _down(self, what: str) -> int:
        """How many of a kind have been killed and are not back."""
        back = sum(f" {what} " in line and line.endswith(" is back\n") for line in list(self._running.lines))
        return self._killed[what] - back

    def _wake(self, *, everybody: bool = False) -> None:
        now = time.monotonic()
        for at, pid in list(self._stopped):
            if everybody or now >= at:
                self._stopped.remove((at, pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


class Suspender(threading.Thread):
    """Suspends the deployment now and then, keeping requests or waiting for them, and resumes it a moment later.

    Which front-end is asked, the kernel chooses; where that is killed meanwhile, another one is asked again.
    """

    def __init__(self, running: Deployment, seed: int, tally: Tally) -> None:
        super().__init__(daemon=True)
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._random.uniform(1.0, 6.0)):
            mode = self._random.choice(("keep", "wait"))
            status = self._call(f"/pause?mode={mode}&timeout={CALL_S:g}")
            self._count(f"suspend, {mode}" + ("" if status == 200 else f": {status or 'no answer'}"))
            self._over.wait(self._random.uniform(0.1, 1.0))
            self._resume()

    def stop(self) -> None:
        """No more suspensions; returns when the deployment goes on."""
        self._over.set()
        self.join(2 * CALL_S + RESUMED_S)

    def _resume(self) -> None:
        end = time.monotonic() + RESUMED_S
        while self._call(f"/resume?timeout={CALL_S:g}") != 200:
            if time.monotonic() > end:
                self._tally.lost.append(f"the deployment has not been resumed within {RESUMED_S:g} s")
                return

    def _call(self, path: str) -> int:
        """The status of the answer, 0 where none came."""
        try:
            return int(httpx2.post(self._running.url + path, timeout=CALL_S + 5.0).status_code)
        except httpx2.HTTPError:
            return 0

    def _count(self, kind: str) -> None:
        with self._tally.lock:
            self._tally.faults[kind] += 1


def flood_of(running: Deployment, seed: int, pause_s: float = PAUSE_S) -> Flood:
    """Garbage for every socket of a deployment of ours, as they come and go."""
    folders, port = socket_folders(running.process.pid), int(running.url.rpartition(":")[2])
    return Flood(lambda: addresses_in(folders, port), OURS, seed, pause_s)
