"""Chaos, as it is made and as clients see it: processes killed and stopped, bad frames on every socket, what operators
do meanwhile; and streams, each compared with the text of the same request undisturbed.

The deployment is suspended and resumed, and scaled, whatever else happens to it. Which front-end is asked, the kernel
chooses; where that is killed meanwhile, the answer never comes.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from tests.fuzz.flood import OURS, Flood, addresses_in, socket_folders
from tests.serving import Deployment, process_name

AGAIN_S = 0.1
TOKENS = {"timed": 200, "moe": 120, "llama": 40}


@dataclass
class Tally:
    """What has come of the requests."""

    requests: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cut: int = 0
    refused: int = 0
    longest_stall_s: float = 0.0
    longest_stall: str = "none"
    """When it was, and where in the stream."""
    longest_suspension_s: float = 0.0
    longest_suspension: str = "none"
    begin: float = field(default_factory=time.monotonic)
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client(threading.Thread):
    """Asks one request after the other, and reads each answer as it comes."""

    def __init__(self, index: int, running: Any, asks: list[dict[str, Any]], texts: list[str], tally: Tally) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(index)
        self._running, self._asks, self._texts, self._tally = running, asks, texts, tally
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            which = self._random.randrange(len(self._asks))
            self._ask(self._asks[which], self._texts[which])

    def _ask(self, ask: dict[str, Any], expected: str) -> None:
        text, finish = "", None
        before = time.monotonic()
        try:
            # A connection of its own: a front-end that is killed takes only what is under way with it.
            with self._running.openai as client:
                for chunk in client.completions.create(**ask, stream=True):
                    now = time.monotonic()
                    self._stalled(now - before, before, len(text))
                    before = now
                    for choice in chunk.choices:
                        text += choice.text
                        finish = choice.finish_reason or finish
        except openai.APITimeoutError as error:
            self._count(lost=f"{error} after {len(text)} characters of {expected[:20]!r}")
            return
        except openai.APIConnectionError:
            self._count(cut=True)
            # Where nobody listens, the next try would fail at once.
            self.over.wait(AGAIN_S)
            return
        except openai.InternalServerError as error:
            # No rank was ready when it came: it is to be asked again. What had begun is not refused but lost.
            refused = error.status_code == 503 and error.code == "no_rank"
            self._count(refused=refused, lost=None if refused else str(error))
            return
        except openai.APIError as error:
            self._count(lost=f"{error} after {len(text)} characters of {expected[:20]!r}")
            return
        except Exception as error:
            # The HTTP client's own errors for a connection that broke in the middle.
            cut = type(error).__module__.startswith("http")
            self._count(cut=cut, lost=None if cut else repr(error))
            return
        wrong = None if text == expected and finish else f"{text[-60:]!r} ({finish}) in place of {expected[-60:]!r}"
        self._count(wrong=wrong)

    def _count(
        self, *, cut: bool = False, refused: bool = False, lost: str | None = None, wrong: str | None = None
    ) -> None:
        tally = self._tally
        with tally.lock:
            tally.requests += 1
            tally.cut += cut
            tally.refused += refused
            tally.lost += [lost] if lost else []
            tally.wrong += [wrong] if wrong else []

    def _stalled(self, seconds: float, since: float, characters: int) -> None:
        tally = self._tally
        with tally.lock:
            if seconds > tally.longest_stall_s:
                tally.longest_stall_s = seconds
                tally.longest_stall = f"after {characters} characters, {since - tally.begin:.0f} s after the beginning"


def asks_of(engine: str, model: str) -> list[dict[str, Any]]:
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "presence_penalty": 0.2}]
    prompts = ["The capital of France is", "Once upon a time there was a", "東京は日本の", "1, 2, 3, 4,"]
    common = {"model": model, "extra_body": {"ignore_eos": True}}
    return [
        {**common, **way, "prompt": prompt, "max_tokens": TOKENS[engine] // divisor}
        for prompt in prompts for way in ways for divisor in (1, 3)
    ]  # fmt: skip


RANKS, FRONTENDS = 4, 2
FAULTS = ("kill a rank", "kill a rank", "stop a rank", "kill a front-end", "kill the coordinator")
PAUSE_S = 0.25
"""Between two rounds of bad frames: with none there would be nothing left of the machine for the streams."""


class Mischief:
    """Kills and stops processes. One rank and one front-end are always left alone: somebody must have the answers."""

    faults: tuple[str, ...] = FAULTS

    def __init__(self, running: Any, seed: int, tally: Tally) -> None:
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._stopped: list[tuple[float, int, bool]] = []
        """When each goes on, its id, and whether the deployment began with it."""
        self._killed: Counter[str] = Counter()

    def go_on(self, until: float) -> None:
        """One fault after the other, a second or two apart."""
        while time.monotonic() < until:
            self._wake()
            kind = self._random.choice(self.faults)
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


def flood_of(running: Any, seed: int, pause_s: float = PAUSE_S) -> Flood:
    """Bad frames for every socket of a deployment of ours, as they come and go."""
    if not isinstance(running, Deployment):
        # Of several nodes: what is not HTTP knows the secret, or is refused.
        return Flood(lambda: {"http": running.url.replace("http", "tcp", 1)}, OURS, seed, pause_s)
    folders, port = socket_folders(running.process.pid), int(running.url.rpartition(":")[2])
    return Flood(lambda: addresses_in(folders, port), OURS, seed, pause_s)


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

    def __init__(self, running: Any, seed: int, tally: Tally) -> None:
        super().__init__(daemon=True)
        self._running, self._random, self._tally = running, random.Random(seed), tally
        self._over = threading.Event()

    def stop(self) -> None:
        """No more calls; returns when the deployment is as it was."""
        self._over.set()
        self.join(2 * CALL_S + RESUMED_S + SCALED_S)

    def _call(self, path: str, timeout_s: float, body: Any = None) -> int:
        try:
            admin_key = getattr(self._running, "admin_key", None)
            key = {} if admin_key is None else {"Authorization": f"Bearer {admin_key}"}
            return int(httpx2.post(self._running.url + path, json=body, headers=key, timeout=timeout_s).status_code)
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

    def __init__(self, running: Any, seed: int, tally: Tally, ranks: int) -> None:
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
