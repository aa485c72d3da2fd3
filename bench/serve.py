"""Measures what the front-end costs and adds, on a running deployment: `make bench-serve`.

Three deployments for each number of front-ends: steps of 10 ms, steps of 40 ms (for 512 streams, which at
10 ms would be more than two cores can carry) and steps of zero cost. The load comes from a process of its
own (`serve_client.py`); `bench/results/serve.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.serve_deployment import CannotRun, Deployment, ending_on_signals

REFERENCE_TOKEN_US = 109.0
REFERENCE_REQUEST_US = 1300.0
GOAL_SHARE = 4
PACKAGES = ("paceline", "uvicorn", "uvloop", "httptools", "starlette", "pyzmq", "msgspec")
KEPT = "## Reading"
"""From here on the results' text is written by hand."""
Cell = dict[str, Any]
Columns = dict[str, Callable[[Cell], str]]


@dataclass
class Report:
    """All figures of one run. `cells`: one a combination, as the client returned it."""

    options: str
    machine: str
    arguments: list[str]
    seconds: float
    cells: list[Cell]


def machine() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(os.sched_getaffinity(0))} {found[1] if found else platform.machine()} virtual cores, shared"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{cores}, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}. {packages}."


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _reference_us(cell: Cell) -> float:
    return REFERENCE_TOKEN_US if cell["kind"] == "streams" else REFERENCE_REQUEST_US


def _added_first(cell: Cell) -> str:
    if "first_ms" not in cell:
        return "–"
    first, step_ms = cell["first_ms"], cell["step_ms"]
    return f"{_number(first['p50'] - 1.5 * step_ms)} / {_number(first['p99'] - 1.99 * step_ms)}"


COLUMNS: Columns = {
    "front-ends": lambda cell: str(cell["frontends"]),
    "answer": lambda cell: "streamed" if cell["kind"] == "streamed requests" else "whole",
    "connections": lambda cell: str(cell["connections"]),
    "step ms": lambda cell: f"{cell['step_ms']:g}",
    "a second": lambda cell: _number(cell["rate"]),
    "a CPU second": lambda cell: _number(1e6 / cell["us"]),
    "us each (least–most)": lambda cell: f"{cell['us']:.1f} ({min(cell['part_us']):.1f}–{max(cell['part_us']):.1f})",
    "cores: front-ends / ranks / client": lambda cell: " / ".join(
        f"{cell['cores'][name]:.2f}" for name in ("front-ends", "ranks", "client")
    ),
    "vLLM's Python front-end": lambda cell: f"{_reference_us(cell) / cell['us']:.1f} x less",
    "first token, ms p50 / p99": _added_first,
    "later token, ms p50 / p99": lambda cell: " / ".join(
        _number(cell["gap_ms"][name] - cell["step_ms"]) for name in ("p50", "p99")
    ),
}
TABLES: dict[str, tuple[set[str], Callable[[Cell], bool]]] = {
    "Streamed tokens, paced steps": (
        {"answer"}, lambda cell: cell["kind"] == "streams" and cell["step_ms"] > 0
    ),
    "Streamed tokens, steps of zero cost": (
        {"answer", "step ms", "vLLM's Python front-end", "first token, ms p50 / p99"},
        lambda cell: cell["kind"] == "streams" and not cell["step_ms"],
    ),
    "Requests of one token, steps of zero cost": (
        {"step ms", "later token, ms p50 / p99"}, lambda cell: cell["kind"] != "streams"
    ),
}  # fmt: skip
"""By title: the columns that say nothing there, and the cells that belong there."""


def tables(report: Report) -> str:
    parts: list[str] = []
    for title, (without, belongs) in TABLES.items():
        columns = {name: column for name, column in COLUMNS.items() if name not in without}
        rows = [[column(cell) for column in columns.values()] for cell in report.cells if belongs(cell)]
        if rows:
            widths = [max(map(len, column)) for column in zip(list(columns), *rows, strict=True)]
            lines = [list(columns), ["-" * (width - 1) + ":" for width in widths], *rows]
            aligned = [map(str.rjust, line, widths) for line in lines]
            parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in aligned)]
    return "\n\n".join(parts)


def verdicts(report: Report) -> str:
    """The goal against what was measured: at most a quarter of what vLLM's Python front-end needs."""
    return "\n".join(
        f"- {cell['kind']}, steps of {cell['step_ms']:g} ms, {cell['connections']} at once, "
        f"{cell['frontends']} front-end(s): {cell['us']:.1f} us each; goal {_reference_us(cell) / GOAL_SHARE:g} us: "
        + ("met" if cell["us"] <= _reference_us(cell) / GOAL_SHARE else "missed")
        for cell in report.cells
        if cell["connections"] in (32, 128) and cell["kind"] != "streamed requests"
    )


def to_markdown(report: Report, before: str) -> str:
    arguments = re.sub(r"step_ms=\S+", "step_ms=...", " ".join(report.arguments))
    parts = [
        "# What serving costs and adds",
        f"    make bench-serve ARGS=\"{report.options} --write\"    # {report.seconds / 60:.1f} minutes",
        f"Machine: {report.machine}",
        f"The deployments were `paceline {arguments}`.",
        "## The goal",
        verdicts(report),
        tables(report),
        KEPT + before.partition(KEPT)[2].rstrip(),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results" / "serve.md"
RANKS = 2
CORES = os.sched_getaffinity(0)
STEP_MS = 10.0
MANY_STREAMS = 256
MANY_STEP_MS = 40.0
CONNECTIONS = (1, 32, 128)
QUICK = {"seconds": 1.0, "streams": [1, 32], "frontends": [1]}


def load(deployment: Deployment, job: dict[str, Any], apart: bool) -> dict[str, Any]:
    """Do one job in a process of its own; returns its figures. `apart`: give the front-ends a core for themselves."""
    cores = sorted(CORES)
    own, others = ({cores[0]}, set(cores[1:])) if apart and len(cores) > 1 else (CORES, CORES)
    deployment.pin({"front-ends": own, "ranks": others, "coordinator": others})
    job = {"port": deployment.port, "processes": deployment.processes, "ranks": RANKS, "cores": sorted(others)} | job
    command = [sys.executable, str(BENCH / "serve_client.py")]
    said = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False).stdout
    figures: dict[str, Any] = json.loads(said or '{"error": "the client process ended"}')
    if "error" in figures:
        raise CannotRun(figures["error"])
    return figures


def plan(args: argparse.Namespace) -> list[tuple[int, float, list[tuple[str, int]]]]:
    few = [("streams", count) for count in args.streams if count <= MANY_STREAMS]
    many = [("streams", count) for count in args.streams if count > MANY_STREAMS]
    free = few + many + [(kind, count) for kind in ("requests", "streamed requests") for count in CONNECTIONS]
    steps = ((STEP_MS, few), (MANY_STEP_MS, many), (0.0, free))
    return [(frontends, step_ms, jobs) for frontends in args.frontends for step_ms, jobs in steps if jobs]


def measure(args: argparse.Namespace) -> Report:
    work = plan(args)
    total = sum(len(jobs) for _, _, jobs in work)
    cells: list[dict[str, Any]] = []
    begin = time.monotonic()
    for frontends, step_ms, jobs in work:
        with closing(Deployment(frontends, step_ms, RANKS)) as deployment:
            for kind, connections in jobs:
                print(f"[{len(cells) + 1}/{total}] {frontends=} {step_ms=:g} {connections=} {kind}", file=sys.stderr)
                what = {"step_ms": step_ms, "kind": kind, "connections": connections}
                times = {"seconds": args.seconds, "probe_seconds": args.seconds / 2 if step_ms else 0.0}
                # Ranks whose steps cost nothing never rest: on one core with the client they would starve it.
                apart = frontends == 1 and (step_ms > 0 or kind != "streams")
                cells.append({"frontends": frontends} | what | load(deployment, what | times, apart))
            if complaints := deployment.complaints():
                raise CannotRun(f"the deployment complained: {complaints[0]}")
    streams, balanced = (",".join(map(str, given)) for given in (args.streams, args.frontends))
    options = f"--seconds {args.seconds:g} --streams {streams} --front-ends {balanced}"
    return Report(options, machine(), deployment.arguments, time.monotonic() - begin, cells)


def numbers(text: str) -> list[int]:
    return [max(1, int(part)) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each figure is measured (default: 4)")
    parser.add_argument("--streams", type=numbers, default=[1, 8, 32, 128, 512], help="concurrent streams: 1,32,128")
    parser.add_argument("--front-ends", dest="frontends", type=numbers, default=[1, 2], help="front-end processes: 1,2")
    parser.add_argument("--quick", action="store_true", help="1 s, 1 and 32 streams, one front-end: does it work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(BENCH.parent)}")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    return args


def main() -> int:
    args = arguments()
    try:
        with ending_on_signals():
            report = measure(args)
    except CannotRun as error:
        print(f"bench-serve: failed: {error}", file=sys.stderr)
        return 1
    print(f"\n{tables(report)}\n\n{verdicts(report)}\n{report.seconds:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    if args.write:
        RESULTS.write_text(to_markdown(report, RESULTS.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
