"""Measures what the front-end costs and adds, on a running deployment: `make bench-serve`.

Three deployments for each number of front-ends: steps of 10 ms, steps of 40 ms (for 512 streams, which at
10 ms would be more than two cores can carry) and steps of zero cost. The load comes from a process of its
own (`serve_client.py`); `serve_report.py` says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_cold import cold_and_hot_us
from serve_deployment import CannotRun, Deployment, ending_on_signals
from serve_report import Report, machine, to_console, to_markdown

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results" / "serve.md"
RANKS = 2
CORES = os.sched_getaffinity(0)
STEP_MS = 10.0
MANY_STREAMS = 256
MANY_STEP_MS = 40.0
CONNECTIONS = (1, 32, 128)
QUICK = {"seconds": 1.0, "streams": [1, 32], "front_ends": [1]}


class Client:
    """The process that loads."""

    def __init__(self) -> None:
        command = [sys.executable, str(BENCH / "serve_client.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def pin(self, cores: set[int]) -> None:
        """Bind it to cores."""
        os.sched_setaffinity(self._process.pid, cores)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do one job; returns its figures. Raises CannotRun."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise CannotRun("the client process ended")
        figures: dict[str, Any] = json.loads(line)
        if "error" in figures:
            raise CannotRun(figures["error"])
        return figures

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def running(frontends: int, step_ms: float) -> Iterator[tuple[Deployment, Client]]:
    """A deployment, and a client for it."""
    deployment = Deployment(frontends, step_ms, RANKS)
    try:
        client = Client()
        try:
            yield deployment, client
        finally:
            client.close()
        if complaints := deployment.complaints():
            raise CannotRun(f"the deployment complained: {complaints[0]}")
    finally:
        deployment.close()


def pin(deployment: Deployment, client: Client, apart: bool) -> None:
    """Give the front-ends a core for themselves, or let all share all cores."""
    cores = sorted(CORES)
    own, others = ({cores[0]}, set(cores[1:])) if apart and len(cores) > 1 else (CORES, CORES)
    deployment.pin({"front-ends": own, "ranks": others, "coordinator": others})
    client.pin(others)


def plan(args: argparse.Namespace) -> list[tuple[int, float, list[tuple[str, int]]]]:
    """(front-ends, step, [(kind, connections)]), one for each deployment."""
    few = [("streams", count) for count in args.streams if count <= MANY_STREAMS]
    many = [("streams", count) for count in args.streams if count > MANY_STREAMS]
    free = few + many + [(kind, count) for kind in ("requests", "streamed requests") for count in CONNECTIONS]
    steps = ((STEP_MS, few), (MANY_STEP_MS, many), (0.0, free))
    return [(frontends, step_ms, jobs) for frontends in args.frontends for step_ms, jobs in steps if jobs]


def measure(args: argparse.Namespace) -> Report:
    """Run all; shows progress."""
    work = plan(args)
    total = sum(len(jobs) for _, _, jobs in work)
    cells: list[dict[str, Any]] = []
    begin = time.monotonic()
    for frontends, step_ms, jobs in work:
        with running(frontends, step_ms) as (deployment, client):
            for kind, connections in jobs:
                paced = f"steps of {step_ms:g} ms" if step_ms else "steps of zero cost"
                show(f"[{len(cells) + 1}/{total}] {frontends} front-end(s), {paced}: {connections} {kind}")
                job = {
                    "kind": kind, "connections": connections, "port": deployment.port, "ranks": RANKS,
                    "step_ms": step_ms, "processes": deployment.processes, "seconds": args.seconds,
                    "probe_seconds": args.seconds / 2 if step_ms else 0.0,
                }  # fmt: skip
                # Ranks whose steps cost nothing never rest: on one core with the client they would starve it.
                pin(deployment, client, frontends == 1 and (step_ms > 0 or kind != "streams"))
                figures = client.run(job)
                cell = {"front_ends": frontends, "ranks": RANKS, "step_ms": step_ms, "kind": kind}
                cells.append(cell | {"connections": connections} | figures)
    show("")
    options = f"--seconds {args.seconds:g} --streams {_joined(args.streams)} --front-ends {_joined(args.frontends)}"
    cold_us, hot_us = cold_and_hot_us()
    return Report(options, machine(), deployment.arguments, time.monotonic() - begin, cells, cold_us, hot_us)


def show(text: str) -> None:
    """Progress: one line that is written over on a terminal, one line each elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _joined(values: list[int]) -> str:
    return ",".join(map(str, values))


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise ValueError
    return values


_numbers.__name__ = "list of numbers"


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(prog="serve.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each figure is measured (default: 4)")
    parser.add_argument("--streams", type=_numbers, default=[1, 8, 32, 128, 512], help="concurrent streams: 1,32,128")
    parser.add_argument("--front-ends", type=_numbers, default=[1, 2], help="front-end processes: 1,2")
    parser.add_argument("--quick", action="store_true", help="1 s, 1 and 32 streams, one front-end: does it work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(BENCH.parent)}")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    if args.seconds <= 0:
        parser.error("--seconds must be more than 0")
    return args


def main() -> int:
    """Measure and show."""
    args = arguments()
    try:
        with ending_on_signals():
            report = measure(args)
    except CannotRun as error:
        show("")
        print(f"bench-serve: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show("")
        return 130
    print(to_console(report))
    if args.json:
        args.json.write_text(json.dumps(report.plain(), indent=1) + "\n")
    if args.write:
        RESULTS.write_text(to_markdown(report))
        print(f"written: {RESULTS.relative_to(BENCH.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
