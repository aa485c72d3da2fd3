"""What `serve.py` measured, as tables. `bench/results/serve.md` says under "What is measured" what the figures mean."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    """`bench/results/serve.md`; `before`: what it was."""
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
