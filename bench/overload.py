"""What becomes of a deployment at four times the work that its ranks can do: `make bench-overload`.

Real processes: `timed` ranks behind two front-ends, and streaming clients over loopback. First the best throughput, by
as many clients as there are slots and places in the queue, each asking again as soon as it has its answer. Then
requests at half of that rate, for the normal latency; then at four times it, whatever has come of those before; then at
half of it again. At last a burst whose clients come back when they are told to.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct
from tests.serving import Deployment, deployment, memory_mb, process_name

PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
TOO_MANY = 429


class Got(Struct):
    """What has come of one request. `at`: when it was to be sent; `retry_after_s`: what a refusal said, if any."""

    at: float
    status: int = 0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    retry_after_s: int = 0

    @property
    def served(self) -> bool:
        return self.status == 200 and self.tokens == ANSWER_TOKENS

    @property
    def wait_s(self) -> float:
        return self.first - self.at


class Load:
    """Clients of one port. `got`: the requests' outcomes, in order of their ends; `tokens_at`: when each token came.
    `tenant`: whose they are.
    """

    def __init__(self, port: int, tenant: str = "") -> None:
        self._port = port
        self._tenant = f"\r\nX-Tenant: {tenant}" if tenant else ""
        self.got: list[Got] = []
        self.tokens_at: array[float] = array("d")

    async def ask(self, at: float, prompt_tokens: int = PROMPT_TOKENS, answer_tokens: int = ANSWER_TOKENS) -> Got:
        """Ask at that moment, on a connection of its own, and read the answer to its end."""
        got, ask = Got(at), {"prompt": "x" * prompt_tokens, "max_tokens": answer_tokens}
        body = json.dumps(ask | {"stream": True, "ignore_eos": True}).encode()
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
            writer.write((head + self._tenant).encode() + b"\r\n\r\n" + body)
            await self._read(reader, got)
            writer.close()
        except OSError:
            # No answer: a status of 0 says so.
            pass
        self.got.append(got)
        return got

    async def _read(self, reader: asyncio.StreamReader, got: Got) -> None:
        while line := await reader.readline():
            if not got.status and line.startswith(b"HTTP/1.1 "):
                got.status = int(line.split()[1])
            elif line.lower().startswith(b"retry-after:"):
                got.retry_after_s = int(line.partition(b":")[2])
            elif line.startswith(b"data: {") and b'"text"' in line:
                got.last = time.monotonic()
                got.first = got.first or got.last
                got.tokens += 1
                self.tokens_at.append(got.last)

    async def at_moments(self, moments: Iterable[float]) -> list[Got]:
        """Open loop: a request at each of these moments, whatever has come of the others."""
        return list(await asyncio.gather(*(self.ask(at) for at in moments)))

    async def one_after_the_other(self, clients: int, until: float) -> None:
        """Closed loop: so many clients, of which each asks again as soon as it has its answer."""

        async def client() -> None:
            while time.monotonic() < until:
                await self.ask(time.monotonic())

        await asyncio.gather(*(client() for _ in range(clients)))

    async def until_served(self, at: float) -> int:
        """Ask, and come back when told, until there is an answer; returns how often that was asked for."""
        tries = 1
        while not (got := await self.ask(at)).served and got.status == TOO_MANY:
            tries += 1
            at = time.monotonic() + got.retry_after_s
        return tries

    def tokens_a_second(self, begin: float, end: float) -> float:
        return sum(begin <= at < end for at in self.tokens_at) / (end - begin)


def poisson(begin: float, end: float, a_second: float, seed: int) -> list[float]:
    chance, moments, at = random.Random(seed), [], begin
    while (at := at + chance.expovariate(a_second)) < end:
        moments.append(at)
    return moments


RESULTS = Path(__file__).resolve().parent / "results"
RANKS, FRONTENDS, SLOTS = 4, 2, 8
QUEUE = 16
STEP_MS = 30
NORMAL, OVER = 0.5, 4.0
WARM_S = 3.0
BACK_S = 2.0
HALF_S = 0.5
BURST_S = 3.0
NEVER = float("inf")


class Shape(Struct, frozen=True):
    """How long each part lasts, in seconds, and how many clients the burst has."""

    best_s: float = 20.0
    normal_s: float = 15.0
    over_s: float = 120.0
    burst: int = 320


class Figures(Struct):
    """What was measured. Rates in tokens a second, waits (time to the first token) in seconds, memory in MiB."""

    best: float
    under_overload: float
    offered: int
    refused: int
    otherwise: int
    retry_after_s: tuple[int, int]
    normal_p50_s: float
    normal_p99_s: float
    back_p50_s: float
    back_p99_s: float
    back_after_s: float
    memory_mib: dict[str, tuple[float, float]]
    burst_tries: float
    burst_s: float
    burst_best_s: float

    @property
    def kept(self) -> float:
        return self.under_overload / self.best


class Memory(threading.Thread):
    """Reads the resident memory of a deployment's processes, by name, twice a second."""

    def __init__(self, running: Deployment) -> None:
        super().__init__(daemon=True)
        self._pids = {pid: process_name(pid) for pid in running.children() if process_name(pid).startswith("pl:")}
        self._over = threading.Event()
        self.read: list[tuple[float, dict[str, float]]] = []

    def run(self) -> None:
        while not self._over.wait(0.5):
            now: dict[str, float] = {}
            for pid, name in self._pids.items():
                kind = name.removeprefix("pl:").rpartition(" ")[0] or "coordinator"
                now[kind] = now.get(kind, 0.0) + memory_mb(pid)
            self.read.append((time.monotonic(), now))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def around(self, begin: float, end: float) -> dict[str, tuple[float, float]]:
        """By kind of process: the most in the first and in the last fifth of that span."""
        fifth = (end - begin) / 5
        first = [read for at, read in self.read if begin <= at < begin + fifth]
        last = [read for at, read in self.read if end - fifth <= at < end]
        return {kind: (max(one[kind] for one in first), max(one[kind] for one in last)) for kind in first[0]}


def flags(bind: str) -> list[str]:
    return ["--engine", "timed", "-dp", str(RANKS), "-asc", str(FRONTENDS), "--max-num-seqs", str(SLOTS),
            "--engine-option", f"step_ms={STEP_MS}", "--max-waiting", str(QUEUE), "--bind", bind]  # fmt: skip


async def measure(running: Deployment, shape: Shape) -> Figures:
    load = Load(int(running.url.rsplit(":", 1)[1]))
    best = await best_of(load, shape.best_s)
    rate = best / statistics.mean(got.tokens for got in load.got if got.served)
    memory = Memory(running)
    memory.start()
    begin = time.monotonic() + 1.0
    over = begin + shape.normal_s
    after = over + shape.over_s
    end = after + shape.normal_s
    asked = await asyncio.gather(
        load.at_moments(poisson(begin, over, NORMAL * rate, 1)),
        load.at_moments(poisson(over, after, OVER * rate, 2)),
        load.at_moments(poisson(after, end, NORMAL * rate, 3)),
    )
    memory.stop()
    best = max(best, await best_of(load, shape.best_s))
    begin_burst = time.monotonic()
    moments = [begin_burst + BURST_S * place / shape.burst for place in range(shape.burst)]
    tries = await asyncio.gather(*(load.until_served(at) for at in moments))
    burst_s = time.monotonic() - begin_burst
    normal, offered, later = asked
    waits = sorted(got.wait_s for got in normal if got.served)
    normal_p99_s = at_share(waits, 0.99)
    back = sorted(got.wait_s for got in later if got.served and got.at >= after + BACK_S)
    told = [got.retry_after_s for got in offered if got.status == TOO_MANY]
    return Figures(
        best, load.tokens_a_second(over + WARM_S, after), len(offered), len(told), others(asked),
        (min(told, default=0), max(told, default=0)), at_share(waits, 0.5), normal_p99_s,
        at_share(back, 0.5), at_share(back, 0.99), normal_after(later, after, 2 * normal_p99_s),
        memory.around(over, after), statistics.mean(tries), burst_s, shape.burst / rate,
    )  # fmt: skip


def normal_after(later: list[Got], after: float, normal_s: float) -> float:
    """After how many seconds the waits are normal again: no half second's median is above it. Who is refused waits."""
    halves: dict[int, list[float]] = {}
    for got in later:
        halves.setdefault(int((got.at - after) / HALF_S), []).append(got.wait_s if got.served else NEVER)
    return max(
        ((half + 1) * HALF_S for half, waits in halves.items() if statistics.median(waits) > normal_s), default=0
    )


async def best_of(load: Load, seconds: float) -> float:
    """Tokens a second where there is always enough to do and nobody is refused."""
    begin = time.monotonic()
    await load.one_after_the_other(RANKS * SLOTS + QUEUE // 2, begin + WARM_S + seconds)
    return load.tokens_a_second(begin + WARM_S, begin + WARM_S + seconds)


def others(asked: list[list[Got]]) -> int:
    """How many got neither the whole answer nor a 429 that says when to come back."""
    every = [got for part in asked for got in part]
    return sum(not got.served and not (got.status == TOO_MANY and got.retry_after_s >= 1) for got in every)


def at_share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def run(bind: str, shape: Shape) -> Figures:
    with deployment(*flags(bind)) as running:
        figures = asyncio.run(measure(running, shape))
        if "Traceback" in running.output:
            raise SystemExit(running.output)
    return figures


def table(found: dict[str, Figures]) -> str:
    rows = {
        "best throughput, tokens/s": lambda one: f"{one.best:.0f}",
        "under overload, tokens/s": lambda one: f"{one.under_overload:.0f}",
        "under overload, of the best": lambda one: f"{one.kept:.1%}",
        "requests offered at 4 x": lambda one: f"{one.offered:,}",
        "of these 429": lambda one: f"{one.refused:,}",
        "neither served nor 429 with Retry-After": lambda one: f"{one.otherwise}",
        "Retry-After, s, least and most": lambda one: "{} to {}".format(*one.retry_after_s),
        "time to first token before, p50, p99": lambda one: f"{one.normal_p50_s:.3f} s, {one.normal_p99_s:.3f} s",
        "from 2 s after the overload, p50, p99": lambda one: f"{one.back_p50_s:.3f} s, {one.back_p99_s:.3f} s",
        "normal again after": lambda one: f"{one.back_after_s:.1f} s",
        **{
            f"memory of the {kind}, first and last fifth": lambda one, kind=kind: "{:.1f}, {:.1f} MiB".format(
                *one.memory_mib[kind]
            )
            for kind in ("front-end", "coordinator", "rank")
        },
        "burst: times that a client asked, mean": lambda one: f"{one.burst_tries:.1f}",
        "burst: all served after": lambda one: f"{one.burst_s:.1f} s (work of {one.burst_best_s:.1f} s)",
    }
    lines = ["| figure | " + " | ".join(f"--bind {bind}" for bind in found) + " |", "| --- " * (len(found) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(show(one) for one in found.values()) + " |" for name, show in rows.items()]
    return "\n".join(lines)


def document(found: dict[str, Figures], shape: Shape) -> str:
    return f"""# Overload

    make bench-overload ARGS='{" ".join(sys.argv[1:])}'

{os.cpu_count()} cores, shared with other work: {os.getloadavg()[0]:.1f} ran or waited to run at the end.

{table(found)}

{RANKS} ranks of the `timed` engine with {SLOTS} slots and a step of {STEP_MS} ms, {FRONTENDS} front-ends,
`--max-waiting {QUEUE}`. Requests come at random moments (Poisson), each on a connection of its own: half of the best
rate for {shape.normal_s:g} s, four times it for {shape.over_s:g} s, and half of it again. The best throughput is the
better of two measurements of {shape.best_s:g} s, before and after. The latency is normal again from that half second on
after which no half second's median is above twice the p99 of before. The burst: {shape.burst} clients within
{BURST_S:g} s, of which each that is refused comes back when its Retry-After says so, until it is served.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=Shape().over_s, help="of overload")
    parser.add_argument("--bind", choices=["broker", "arrival"], action="append", help="may be repeated; default both")
    parser.add_argument("--write", action="store_true", help="write bench/results/overload.md")
    given = parser.parse_args()
    shape = Shape(over_s=given.seconds)
    found: dict[str, Figures] = {}
    for bind in given.bind or ["broker", "arrival"]:
        found[bind] = run(bind, shape)
        print(table({bind: found[bind]}), flush=True)
    if given.write:
        (RESULTS / "overload.md").write_text(document(found, shape))


if __name__ == "__main__":
    main()
