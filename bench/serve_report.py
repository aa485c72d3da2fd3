"""What `serve.py` measured, as tables."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REFERENCE_TOKEN_US = 109.0
REFERENCE_REQUEST_US = 1300.0
GOAL_SHARE = 4
PACKAGES = ("paceline", "uvicorn", "uvloop", "httptools", "starlette", "pyzmq", "msgspec")
Cell = dict[str, Any]
Columns = dict[str, Callable[[Cell], str]]

MEASURED = """\
## What is measured

A real deployment (`paceline serve --engine timed`, two ranks, loopback) is loaded by a separate process with raw
sockets and one epoll. The timed engine's text is known, so the client holds every token of every stream against what
must come: at each read the last number must equal the count; one stream in sixteen is decoded in full.

- **us each**: user and system CPU of the front-end processes, all threads (the kernel's CPU clock of the process), over
  what the client received meanwhile. For paced tokens the window begins when every stream has its first token and ends
  before any ends, so that it holds no request's beginning or end. In brackets the least and the most of five equal
  parts: the machine's noise. **A CPU second**: the inverse, over all front-ends.
- **Paced steps** (10 ms; 40 ms for 512 streams, which at 10 ms would be 51,200 tokens a second): one event a token in
  one write, at a rate that the machine can carry. These are the figures to judge by.
- **Steps of zero cost**: the ranks make tokens as fast as they can, so the front-ends are saturated and many tokens of
  a stream leave in one write ("tokens a read"). Whole streams, with their beginning and end. It shows throughput at
  saturation and what a flood does; gaps between reads there are long since the tokens between them are many.
- **Added to a later token**: the gap between two tokens of a stream, as the client sees it, less the step's set time.
  The rank's own work between steps is in it.
- **Added to the first token**: while the streams run, lone requests go to a rank that steps, at moments that have
  nothing to do with its steps. With a perfect stack such a request waits for the step under way and then takes one:
  one to two steps, evenly spread. From the measured quantile q we subtract that model's, step x (1 + q): 1.5 steps
  from p50, 1.99 from p99. What is left holds the way in (HTTP, checks, routing, to the rank), what the rank's loop adds
  to a step, and the way out.
- **Requests**: `max_tokens=1`, 50 prompt tokens, keep-alive, closed loop, steps of zero cost: all the time is the
  stack's, and with more than one connection nearly all of it is waiting for a core.
- **Cores**: CPU seconds a second of the front-ends, the ranks and the client: what was the limit.
"""


@dataclass
class Report:
    """All figures of one run. `cells`: one a combination, as the client returned it."""

    options: str
    machine: str
    arguments: list[str]
    seconds: float
    cells: list[Cell]
    cold_us: float = 0.0
    hot_us: float = 0.0

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def machine() -> str:
    """The machine in words: nothing that names it."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    kernel = ".".join(platform.release().split(".")[:2])
    kind = found[1].strip() if found else platform.machine()
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{cores} {kind} virtual cores, shared with other work, {platform.system()} {kernel}, "
        f"{platform.python_implementation()} {platform.python_version()}. {packages}."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _ratio(reference_us: float) -> Callable[[Cell], str]:
    return lambda cell: f"{reference_us / cell['us']:.1f} x less"


def _cost(cell: Cell) -> str:
    parts = cell["part_us"]
    return f"{cell['us']:.1f} ({min(parts):.1f}–{max(parts):.1f})"


def _cores(cell: Cell) -> str:
    return " / ".join(f"{cell['cores'][name]:.2f}" for name in ("front-ends", "ranks", "client"))


def _added_later(cell: Cell) -> str:
    return " / ".join(_number(cell["gap_ms"][name] - cell["step_ms"]) for name in ("p50", "p99"))


def _added_first(cell: Cell) -> str:
    if "first_ms" not in cell:
        return "–"
    first, step_ms = cell["first_ms"], cell["step_ms"]
    return f"{_number(first['p50'] - 1.5 * step_ms)} / {_number(first['p99'] - 1.99 * step_ms)}"


COMMON: Columns = {
    "front-ends": lambda cell: str(cell["frontends"]),
    "a second": lambda cell: _number(cell["rate"]),
    "a CPU second": lambda cell: _number(1e6 / cell["us"]),
    "us each (least–most)": _cost,
    "cores: front-ends / ranks / client": _cores,
}


def _streams(extra: Columns) -> Columns:
    first = {"front-ends": COMMON["front-ends"], "streams": lambda cell: str(cell["connections"])}
    return first | extra | {name: column for name, column in COMMON.items() if name not in first}


PACED = _streams({"step ms": lambda cell: f"{cell['step_ms']:g}"}) | {
    "vLLM's Python front-end (109 us)": _ratio(REFERENCE_TOKEN_US),
    "added to first token, ms p50 / p99": _added_first,
    "added to later token, ms p50 / p99": _added_later,
}
FREE = _streams({"tokens a read": lambda cell: _number(cell["merged"])}) | {
    "gap, ms p50 / p99": _added_later,
}
REQUESTS: Columns = {
    "front-ends": COMMON["front-ends"],
    "answer": lambda cell: "streamed" if cell["kind"] == "streamed requests" else "whole",
    "connections": lambda cell: str(cell["connections"]),
    **COMMON,
    "vLLM's Python front-end (1.3 ms)": _ratio(REFERENCE_REQUEST_US),
    "time to it, ms p50 / p99": _added_first,
}
TABLES: dict[str, tuple[Columns, Callable[[Cell], bool]]] = {
    "Streamed tokens, paced steps": (PACED, lambda cell: cell["kind"] == "streams" and cell["step_ms"] > 0),
    "Streamed tokens, steps of zero cost": (FREE, lambda cell: cell["kind"] == "streams" and not cell["step_ms"]),
    "Requests of one token, steps of zero cost": (REQUESTS, lambda cell: cell["kind"] != "streams"),
}


def _rows(report: Report, title: str) -> list[list[str]]:
    columns, belongs = TABLES[title]
    cells = [cell for cell in report.cells if belongs(cell)]
    return [list(columns)] + [[column(cell) for column in columns.values()] for cell in cells] if cells else []


def to_console(report: Report) -> str:
    """Aligned tables."""
    lines: list[str] = []
    for title in TABLES:
        rows = _rows(report, title)
        if rows:
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["", title]
            lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "", *verdicts(report), f"{report.seconds:.0f} s in all"])


def verdicts(report: Report) -> list[str]:
    """The goal against what was measured, in sentences: at most a quarter of what vLLM's Python front-end needs."""
    found = []
    for what, reference, belongs in (
        (
            "a streamed token, front-end saturated",
            REFERENCE_TOKEN_US,
            lambda cell: cell["kind"] == "streams" and cell["step_ms"] == 0,
        ),
        (
            "a streamed token, steps of 10 ms",
            REFERENCE_TOKEN_US,
            lambda cell: cell["kind"] == "streams" and cell["step_ms"] > 0,
        ),
        ("a request", REFERENCE_REQUEST_US, lambda cell: cell["kind"] == "requests"),
    ):
        for cell in report.cells:
            if belongs(cell) and cell["connections"] in (32, 128):
                goal = reference / GOAL_SHARE
                found.append(
                    f"{what}, {cell['connections']} at once, {cell['frontends']} front-end(s): {cell['us']:.1f} us, "
                    f"{reference / cell['us']:.1f} x less than {reference:g} us; "
                    f"goal {goal:g} us: {'met' if cell['us'] <= goal else 'missed'}"
                )
    return found


def fit(report: Report) -> tuple[float, float] | None:
    """What a step's message costs and what each token in it adds, in us: least squares over the paced rows."""
    cells = [cell for cell in report.cells if cell["step_ms"] and cell["frontends"] == 1]
    points = [(min(cell["connections"], cell["ranks"]) / cell["connections"], cell["us"]) for cell in cells]
    if len({x for x, _ in points}) < 2:
        return None
    # Relative errors count: the lone stream, where one token bears a whole wake-up, would outweigh all else.
    weights = [1 / us**2 for _, us in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_us = sum(w * us for w, (_, us) in zip(weights, points, strict=True)) / total
    over = sum(w * (x - mean_x) * (us - mean_us) for w, (x, us) in zip(weights, points, strict=True))
    message = over / sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    return message, mean_us - message * mean_x


def reading(report: Report) -> str:
    """A few sentences on the figures."""
    lines = [
        f"- This machine charges for waking up: a loop of plain Python that takes {report.hot_us:.0f} us of CPU back "
        f"to back took {report.cold_us:.0f} us each time when it ran every 10 ms, measured in the same run. At 32 "
        "streams and steps of 10 ms a front-end wakes up 200 times a second, for 16 tokens each."
    ]
    if found := fit(report):
        lines.append(
            f"- Paced, with one front-end, a rank's step costs about {found[0]:.0f} us (waking up for its one message, "
            f"with cold caches), and each token in it about {found[1]:.0f} us more. Few streams a rank are therefore "
            "dear a token and cheap in all: see the column of cores."
        )  # fmt: skip
    lines += [
        "- The added times hold the client's own reading of the tokens that come first, a core that it shares with the "
        "ranks, and the rank's loop; with many streams they are mostly the length of a step's burst.",
        "- What an HTTP stack costs alone, without our own work, is in [http_stacks.md](http_stacks.md); there the "
        "tokens of a step came in one message for all streams, here each rank sends its own.",
    ]
    return "\n".join(lines)


def to_markdown(report: Report) -> str:
    """`bench/results/serve.md`."""
    parts = [
        "# What serving costs and adds",
        f"    make bench-serve ARGS=\"{report.options} --write\"    # {report.seconds / 60:.1f} minutes",
        f"Machine: {report.machine}",
        "With one front-end, that process has a core to itself, and the ranks, the coordinator and the client share "
        "the other. Nothing is pinned with two front-ends, nor where streams run on steps of zero cost. "
        "The deployments were `paceline " + re.sub(r"step_ms=\S+", "step_ms=...", " ".join(report.arguments)) + "`.",
        "Reference: vLLM 0.32 on this kind of machine, one core, one event a token, 32 to 128 streams: its Python "
        "front-end 109 us of CPU a streamed token and 1.3 ms a request, its Rust front-end 10 to 33 us and 0.13 ms. "
        "Goal: at most a quarter of the Python figures, 27 us and 325 us, at 32 and 128 at once.",
        "## The goal",
        "\n".join(f"- {line}" for line in verdicts(report)),
    ]  # fmt: skip
    for title in TABLES:
        rows = _rows(report, title)
        if rows:
            head = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join(["---:"] * len(rows[0])) + " |"]
            parts += [f"## {title}", "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows[1:]])]
    parts += ["## Reading", reading(report), MEASURED.rstrip()]
    return "\n\n".join(parts) + "\n"
