"""Chaos, as operators make it: the deployment suspended and resumed, and scaled, whatever else happens to it.

Which front-end is asked, the kernel chooses; where that is killed meanwhile, the answer never comes.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import httpx2
from bench.chaos_clients import Tally
from tests.serving import Deployment

CALL_S = 15.0
"""How long a call to suspend or resume may take."""
RESUMED_S = 60.0
SCALED_S = 90.0
"""How long a change of size may take with all that goes wrong; the deployment has its first size again after it."""
MORE_RANKS = 3
"""The deployment has as many more than at the start, at most."""
BUSY = 409


class Operator(threading.Thread):
    """Calls the control endpoints of a deployment, and counts what came of it, until `stop`."""

    def __init__(self, running: Deployment, seed: int, tally: Tally) -> None:
        super().__init__(daemon=True)
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._over = threading.Event()

    def stop(self) -> None:
        """No more calls; returns when the deployment is as it was."""
        self._over.set()
        self.join(2 * CALL_S + RESUMED_S + SCALED_S)

    def _call(self, path: str, timeout_s: float, body: Any = None) -> int:
        """The status of the answer, 0 where none came."""
        try:
            return int(httpx2.post(self._running.url + path, json=body, timeout=timeout_s).status_code)
        except httpx2.HTTPError:
            return 0

    def _count(self, kind: str, status: int) -> None:
        with self._tally.lock:
            self._tally.faults[kind + ("" if status == 200 else f": {status or 'no answer'}")] += 1


class Suspender(Operator):
    """Suspends the deployment now and then, keeping requests or waiting for them, and resumes it a moment later."""

    def run(self) -> None:
        while not self._over.wait(self._random.uniform(1.0, 6.0)):
            mode, begin = self._random.choice(("keep", "wait")), time.monotonic()
            self._count(f"suspend, {mode}", self._call(f"/pause?mode={mode}&timeout={CALL_S:g}", CALL_S + 5.0))
            self._over.wait(self._random.uniform(0.1, 1.0))
            self._resume()
            self._suspended(time.monotonic() - begin, begin)

    def _suspended(self, seconds: float, since: float) -> None:
        tally = self._tally
        with tally.lock:
            if seconds > tally.longest_suspension_s:
                tally.longest_suspension_s = seconds
                tally.longest_suspension = f"{since - tally.begin:.0f} s after the beginning"

    def _resume(self) -> None:
        end = time.monotonic() + RESUMED_S
        while self._call(f"/resume?timeout={CALL_S:g}", CALL_S + 5.0) != 200:
            if time.monotonic() > end:
                self._tally.lost.append(f"the deployment has not been resumed within {RESUMED_S:g} s")
                return


class Scaler(Operator):
    """Gives the deployment up to `MORE_RANKS` more ranks and takes them away again. `ranks`: how many it began with.

    What a leaving rank has left after its drain time, none to a few seconds, others go on with.
    """

    def __init__(self, running: Deployment, seed: int, tally: Tally, ranks: int) -> None:
        super().__init__(running, seed, tally)
        self._ranks = ranks

    def run(self) -> None:
        size = self._ranks
        while not self._over.wait(self._random.uniform(2.0, 8.0)):
            sizes = [other for other in range(self._ranks, self._ranks + MORE_RANKS + 1) if other != size]
            target = self._random.choice(sizes)
            status = self._scale(target, self._random.choice((0.0, 0.5, 5.0)))
            self._count("scale up" if target > size else "scale down", status)
            size = target
        self._back()

    def _scale(self, size: int, drain_s: float) -> int:
        fields = {"new_data_parallel_size": size, "drain_timeout": drain_s, "startup_timeout": 30.0}
        return self._call("/scale_elastic_ep", SCALED_S, fields)

    def _back(self) -> None:
        """The size that it began with. A call whose answer was lost may still be under way."""
        end = time.monotonic() + SCALED_S
        while (status := self._scale(self._ranks, 0.0)) != 200:
            if time.monotonic() > end:
                self._tally.lost.append(f"not at {self._ranks} ranks again within {SCALED_S:g} s: {status}")
                return
            time.sleep(0.2)
