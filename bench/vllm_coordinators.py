"""`make bench-vllm`: vLLM's own coordinator against ours, as real processes, on the same rig in the same run."""

from __future__ import annotations

import argparse
import compileall
import os
import random
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from bench.vllm_report import Row, to_markdown
from bench.vllm_rig import Rig, complete, report, rigs, start, start_and_memory
from msgspec import Struct
from tests.vllm.pairs import StockCoordinators

BACKLOG = 400_000
QUIET_S = 0.3
REST_S = (0.02, 0.4)
"""Between two isolated changes: shorter and longer than vLLM's interval of 100 ms."""


class Percentiles(Struct, frozen=True):
    """Of a set of times, in milliseconds."""

    p50: float
    p99: float


def percentiles(seconds: Sequence[float]) -> Percentiles:
    ordered = sorted(seconds)
    return Percentiles(ordered[len(ordered) // 2] * 1e3, ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3)


# Wakes --------------------------------------------------------------------------------------------


def wakes(rigs: dict[str, Rig], rounds: int) -> dict[str, Percentiles]:
    times: dict[str, list[float]] = {name: [] for name in rigs}
    names = list(rigs)
    for turn in range(rounds + 10):
        random.Random(turn).shuffle(names)
        for name in names:
            took = _wake(rigs[name], name == "echo")
            if turn >= 10:
                times[name].append(took)
    return {name: percentiles(found) for name, found in times.items()}


def _wake(rig: Rig, echo: bool) -> float:
    rig.drain()
    notice = msgspec.msgpack.encode((b"\x00\x00", rig.wave))
    begin = time.monotonic()
    rig.frontends[0].send(notice)
    for endpoint in rig.inputs:
        assert endpoint.poll(10_000), "no wake"
        endpoint.recv_multipart()
    took = time.monotonic() - begin
    if not echo:
        end_wave(rig)
    return took


def end_wave(rig: Rig) -> None:
    """The ranks answer, and the wave ends; returns when that is published. Independent ranks have none."""
    if not rig.waves:
        return
    rig.outputs[0].send(start(0, rig.wave))
    rig.outputs[0].send(complete(rig.wave))
    rig.wave += 1
    wait_state(rig, rig.wave, False)


def wait_state(rig: Rig, wave: int, running: bool, timeout_s: float = 60.0) -> float:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        for when, _, at, runs in rig.views():
            if (at, runs) == (wave, running):
                return when
        rig.frontends[0].poll(100)
    raise AssertionError("never published")


# Loads --------------------------------------------------------------------------------------------


class Flood(Struct, frozen=True):
    """A backlog of load messages: how fast it is taken in, and what waits meanwhile.

    `rate`: messages a second; `per_cpu`: a second of the coordinator's processor time. Times in milliseconds: the
    longest without a publication; a front-end's notice until the last rank is woken; a rank's start of a wave,
    said behind its own part of the backlog, until it is published.
    """

    rate: float
    per_cpu: float
    gap: float
    notice: float
    start: float


def flood(rig: Rig, messages: int = BACKLOG) -> Flood:
    """The coordinator is stopped, the backlog sent, and the coordinator let go.

    The reports are of the wave that has just ended: those of a running one would make the notice needless.
    """
    end_wave(rig)
    time.sleep(QUIET_S)
    rig.drain()
    for pid in rig.pids:
        os.kill(pid, signal.SIGSTOP)
    each = messages // rig.size
    for step in range(each):
        for rank, output in enumerate(rig.outputs):
            if step % 50 == 0 or step == each - 1:
                rig_frame[rank] = report(rank, 1 + step % 7 if step < each - 1 else 1234, 0, rig.wave - 1, step)
            output.send(rig_frame[rank])
    rig.outputs[-1].send(start(rig.size - 1, rig.wave + 1))
    rig.frontends[0].send(msgspec.msgpack.encode((b"\x00\x00", rig.wave)))
    cpu = rig.cpu_s()
    begin = time.monotonic()
    for pid in rig.pids:
        os.kill(pid, signal.SIGCONT)
    return _watch_flood(rig, begin, cpu, each * rig.size)


rig_frame: dict[int, bytes] = {}


def _watch_flood(rig: Rig, begin: float, cpu: float, messages: int) -> Flood:
    woken = started = done = 0.0
    last, gap = begin, 0.0
    while not (woken and started and done):
        assert time.monotonic() < begin + 120, "the backlog was never taken in"
        if not woken and rig.inputs[-1].poll(0):
            woken = time.monotonic()
        for when, counts, wave, _ in rig.views():
            if counts is not None:
                gap = max(gap, when - last)
                last = when
                if all(count[0] == 1234 for count in counts):
                    done = done or when
            if wave == rig.wave + 1:
                started = started or when
        rig.frontends[0].poll(1)
    used = rig.cpu_s() - cpu
    rig.wave += 1
    end_wave(rig)
    took = done - begin
    return Flood(messages / took, messages / max(used, 0.01), gap * 1e3, (woken - begin) * 1e3, (started - begin) * 1e3)


def isolated(rigs: dict[str, Rig], rounds: int) -> dict[str, Percentiles]:
    """From one rank's report, after a rest of everybody, to the first front-end."""
    times: dict[str, list[float]] = {name: [] for name in rigs}
    draw = random.Random(0)
    for name in rigs:
        rigs[name].outputs[0].send(start(0, rigs[name].wave))
    for turn in range(rounds):
        time.sleep(draw.uniform(*REST_S))
        rank = draw.randrange(rigs["stock"].size)
        for name, rig in rigs.items():
            rig.drain()
            rig.step += 1
            frame = report(rank, 5000 + turn, 0, rig.wave, rig.step)
            begin = time.monotonic()
            rig.outputs[rank].send(frame)
            times[name].append(_seen(rig, rank, 5000 + turn) - begin)
    for rig in rigs.values():
        end_wave(rig)
    return {name: percentiles(found) for name, found in times.items()}


def _seen(rig: Rig, rank: int, waiting: int) -> float:
    """When the first front-end read that the rank has so many waiting."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        rig.frontends[0].poll(100)
        for when, counts, _, _ in rig.views():
            if counts is not None and counts[rank][0] == waiting:
                return when
    raise AssertionError("never published")


class Busy(Struct, frozen=True):
    """Age of what the first front-end sees while the ranks step, and the coordinator's share of a processor."""

    age: Percentiles
    cpu: float
    views: float


def busy(rig: Rig, step_s: float, lockstep: bool, seconds: float) -> Busy:
    """Each rank reports at each of its steps; its waiting count is when, in tenths of a millisecond."""
    rig.outputs[0].send(start(0, rig.wave))
    time.sleep(0.05)
    rig.drain()
    begin = time.monotonic()
    draw = random.Random(1)
    phases = [0.0 if lockstep else draw.random() * step_s for _ in range(rig.size)]
    due = deque(sorted((begin + phase, rank) for rank, phase in enumerate(phases)))
    seen: list[tuple[float, list[float]]] = []
    cpu, end = rig.cpu_s(), begin + seconds
    base = rig.step
    while (now := time.monotonic()) < end:
        while due and due[0][0] <= now:
            at, rank = due.popleft()
            due.append((at + step_s, rank))
            stamp = int((time.monotonic() - begin) * 1e4)
            step = base + 1 + int((at - begin) / step_s)
            rig.outputs[rank].send(report(rank, stamp, 0, rig.wave, step))
        for when, counts, _, _ in rig.views():
            if counts is not None:
                seen.append((when, [begin + count[0] / 1e4 for count in counts]))
        wait_s = due[0][0] - time.monotonic()
        if wait_s > 0.0005:
            rig.frontends[0].poll(max(1, int(wait_s * 1e3)) if wait_s > 0.001 else 0)
    used = (rig.cpu_s() - cpu) / seconds
    rig.step = base + 1 + int(seconds / step_s)
    end_wave(rig)
    return Busy(percentiles(_ages(seen, begin + seconds / 4, end)), used, len(seen) / seconds)


def _ages(seen: list[tuple[float, list[float]]], first: float, last: float) -> list[float]:
    """At every half millisecond, how long ago a rank said what was then known of it: of 16 ranks at most."""
    ages: list[float] = []
    at = first
    for (when, stamps), (until, _) in zip(seen, [*seen[1:], (last, [])], strict=True):
        at = max(at, when)
        some = stamps[:: max(1, len(stamps) // 16)]
        while at < until:
            ages += [at - stamp for stamp in some]
            at += 0.0005
    return ages


SOURCE = Path(__file__).resolve().parent.parent / "src"
RESULTS = Path(__file__).resolve().parent / "results" / "vllm.md"
RANKS = (2, 64, 384)
FRONTENDS = (1, 8)
STEPS_MS = (5, 20)
PUSHED_A_SECOND = 20_000
"""What the rig can send beside all else."""


def measure(stock: StockCoordinators, size: int, frontends: int, quick: bool) -> Row:
    found: dict[str, Any] = {}
    with rigs(stock, size, frontends, waves=True, echo=True) as made:
        found["wakes"] = wakes(made, 60 if quick else 300 if size < 384 else 150)
        floor = made.pop("echo")
        floor.drain()
        both = {"stock": made["stock"], "ours": made["ours"]}
        found["isolated"] = isolated(both, 10 if quick else 60)
        found["busy"] = all_busy(both, size, True, 2.0 if quick else 5.0)
        found["flood"] = {name: flood(rig, BACKLOG // 8 if quick else BACKLOG) for name, rig in both.items()}
        found["memory"] = {name: rig.memory_mb() for name, rig in both.items()}
        floor.close()
    with rigs(stock, size, frontends, waves=False, echo=False) as made:
        found["isolated, independent"] = isolated(made, 10 if quick else 60)
        found["busy, independent"] = all_busy(made, size, False, 2.0 if quick else 5.0)
    return Row(size, frontends, found)


def all_busy(both: dict[str, Rig], size: int, lockstep: bool, seconds: float) -> dict[int, dict[str, Busy]]:
    """By the length of a step, as far as the rig can keep up."""
    steps = [step_ms for step_ms in STEPS_MS if size * 1000 / step_ms <= PUSHED_A_SECOND]
    return {ms: {name: busy(rig, ms / 1000, lockstep, seconds) for name, rig in both.items()} for ms in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look, not a result: fewer rounds, nothing written")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--front-ends", dest="frontends", type=int, nargs="*", default=FRONTENDS)
    options = parser.parse_args()
    # As an installation has it: vLLM's is compiled, too.
    compileall.compile_dir(SOURCE, quiet=1)
    starts = [start_and_memory() for _ in range(1 if options.quick else 3)]
    start = {name: [statistics.median(one[name][part] for one in starts) for part in range(3)] for name in starts[0]}
    stock = StockCoordinators()
    rows: list[Row] = []
    try:
        for size in options.ranks:
            for frontends in options.frontends:
                rows.append(measure(stock, size, frontends, options.quick))
                print(f"{size} ranks, {frontends} front-ends: done", file=sys.stderr, flush=True)
    finally:
        stock.close()
    text = to_markdown(start, rows)
    print(text)
    if not options.quick:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
