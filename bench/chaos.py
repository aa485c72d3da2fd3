"""Chaos: a real deployment under steady streams, while its processes are killed and stopped at random from a seed.

    python -m bench.chaos --seed 7 --minutes 2 --engine timed

Each stream is compared with the text of the same request undisturbed. Printed are the faults by kind, the requests,
those lost (an error, or no end) and wrong (another text), those refused on arrival since no rank was ready, those whose
front-end was killed under them, and the longest stall: the longest time between two pieces of one stream. The exit
status is 1 where one was lost or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai
from tests.serving import Deployment, deployment, process_name

RANKS, FRONT_ENDS = 4, 2
MOE_SIZES = ("layers=2", "d_model=32", "heads=2", "expert_hidden=32")
ENGINES = {
    "timed": ["--engine", "timed", "--engine-option", "step_ms=10"],
    "moe": ["--engine", "moe", *(part for size in MOE_SIZES for part in ("--engine-option", size))],
    "llama": ["--max-model-len", "512", "--max-num-seqs", "8"],
}
TOKENS = {"timed": 200, "moe": 120, "llama": 40}
RANK_TIMEOUT_S = 1.0
FAULTS = ("kill a rank", "kill a rank", "stop a rank", "kill a front-end", "kill the coordinator")
SETTLE_S = 30.0


@dataclass
class Tally:
    """What has come of the requests."""

    requests: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    cut: int = 0
    refused: int = 0
    longest_stall_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client(threading.Thread):
    """Asks one request after the other, and reads each answer as it comes."""

    def __init__(
        self, index: int, running: Deployment, asks: list[dict[str, Any]], texts: list[str], tally: Tally
    ) -> None:
        super().__init__(daemon=True)
        self._random = random.Random(index)
        self._running, self._asks, self._texts, self._tally = running, asks, texts, tally
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            which = self._random.randrange(len(self._asks))
            self._ask(self._asks[which], self._texts[which])

    def _ask(self, ask: dict[str, Any], expected: str) -> None:
        text, finish, stall_s = "", None, 0.0
        before = time.monotonic()
        try:
            # A connection of its own: a front-end that is killed takes only what is under way with it.
            with self._running.openai as client:
                for chunk in client.completions.create(**ask, stream=True):
                    now = time.monotonic()
                    stall_s, before = max(stall_s, now - before), now
                    for choice in chunk.choices:
                        text += choice.text
                        finish = choice.finish_reason or finish
        except openai.APIConnectionError:
            self._count(cut=True)
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
        self._count(wrong=wrong, stall_s=stall_s)

    def _count(
        self,
        *,
        cut: bool = False,
        refused: bool = False,
        lost: str | None = None,
        wrong: str | None = None,
        stall_s: float = 0.0,
    ) -> None:
        tally = self._tally
        with tally.lock:
            tally.requests += 1
            tally.cut += cut
            tally.refused += refused
            tally.lost += [lost] if lost else []
            tally.wrong += [wrong] if wrong else []
            tally.longest_stall_s = max(tally.longest_stall_s, stall_s)


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


def asks_of(engine: str, model: str) -> list[dict[str, Any]]:
    """Requests of some variety; each has one right answer."""
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.0, "seed": 5, "presence_penalty": 0.2}]
    prompts = ["The capital of France is", "Once upon a time there was a", "東京は日本の", "1, 2, 3, 4,"]
    common = {"model": model, "extra_body": {"ignore_eos": True}}
    return [
        {**common, **way, "prompt": prompt, "max_tokens": TOKENS[engine] // divisor}
        for prompt in prompts for way in ways for divisor in (1, 3)
    ]  # fmt: skip


def chaos(engine: str, seed: int, minutes: float, clients: int) -> Tally:
    """Run it; returns what came of it."""
    tally = Tally()
    arguments = [*ENGINES[engine], "-dp", str(RANKS), "-asc", str(FRONT_ENDS), "--rank-timeout", str(RANK_TIMEOUT_S),
                 "--max-rank-restarts", "100000"]  # fmt: skip
    with deployment(*arguments) as running:
        asks = asks_of(engine, running.openai.models.list().data[0].id)
        texts = [running.openai.completions.create(**ask).choices[0].text for ask in asks]
        readers = [Client(index, running, asks, texts, tally) for index in range(clients)]
        for reader in readers:
            reader.start()
        Mischief(running, seed, tally).go_on(time.monotonic() + 60 * minutes)
        for reader in readers:
            reader.over.set()
        end = time.monotonic() + SETTLE_S
        for reader in readers:
            reader.join(max(0.1, end - time.monotonic()))
            if reader.is_alive():
                tally.lost.append(f"no end within {SETTLE_S:g} s after the last fault")
        tally.lost += ["a traceback in the log"] if "Traceback" in running.output else []
        if tally.lost or tally.wrong:
            print(running.output, file=sys.stderr)
    return tally


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="timed")
    parser.add_argument("--clients", type=int, default=12)
    given = parser.parse_args()
    tally = chaos(given.engine, given.seed, given.minutes, given.clients)
    for kind, count in sorted(tally.faults.items()):
        print(f"{kind}: {count}")
    print(f"requests: {tally.requests}, lost: {len(tally.lost)}, wrong: {len(tally.wrong)}")
    print(f"refused on arrival (503 with Retry-After): {tally.refused}")
    print(f"connections that broke with their front-end: {tally.cut}")
    print(f"longest stall: {tally.longest_stall_s:.2f} s")
    for what in [*tally.lost, *tally.wrong][:20]:
        print(what)
    sys.exit(1 if tally.lost or tally.wrong else 0)


if __name__ == "__main__":
    main()
