"""The tables of `bench/results/vllm.md`: every figure next to vLLM's, from one run, as a ratio, against its goal."""

from __future__ import annotations

import os
import platform
from typing import Any

from msgspec import Struct

HEAD = """\
# vLLM's own coordinator and ours

`make bench-vllm` wrote this: vLLM {version}'s coordinator process and ours (the watchdog counted in), fed by the same
sockets with the frames that vLLM's ranks and front-ends send, turn by turn in one run on {machine}.
Other work ran there, so read the ratios. `floor` is a process that turns a front-end's frame into a wake and does
nothing else. Ours publishes every 10 ms at most, vLLM's every 100. vLLM's warnings are switched off, which makes it
faster. Goals are the issue's; ✗ marks one that is missed.

"""


MISSED = {
    "Start": "three interpreters start one after the other, with what they import: the watchdog, the module that "
    "watches what it started, and the coordinator, which is bound before it imports the rest.",
    "A wake": "one frame goes to each rank, by both and by the floor: with few ranks most of it is threads that wake "
    "each other, and what is left is what two runs differ by. The far end is time slices: the rig, whose process "
    "stands in for all ranks and front-ends, runs on the same cores.",
    "An isolated change, independent": "vLLM's own publishes at once, too, where no wave keeps its ranks in step and "
    "its 100 ms are over. A twentieth of that is less than a frame needs through two sockets. Its p99 is the interval.",
    "An isolated change, lockstep": "the far end is time slices.",
    "Busy ranks": "ten views are sent where vLLM's sends one, each to every front-end: with few ranks that is most of "
    "what there is to do. A message taken in costs less (above). The ages have a floor that vLLM's have, too: a report "
    "is as old as the step that it ends, and waits up to the interval.",
    "400 thousand": "what a rank says is heard in the order in which it says it, so its start waits for all that it "
    "has said before: no process takes in 400 thousand messages in 20 ms. A front-end's notice comes on a socket of "
    "its own. It waits for one turn of reading, and for the cores that the sender of the backlog is busy on.",
}
"""A table, by how its title begins, and why a goal in it is missed where one is."""


class Row(Struct):
    """All that was measured with so many ranks and front-ends."""

    ranks: int
    frontends: int
    found: dict[str, Any]


def _held(value: float, goal: float, less: bool = True) -> str:
    return f"{value:.3g}" + ("" if (value <= goal if less else value >= goal) else " ✗")


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text = "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n\n"
    why = next((reason for begin, reason in MISSED.items() if title.startswith(begin)), "")
    return text + (f"Missed (✗): {why}\n\n" if why and "✗" in text else "")


def _pair(found: Any, digits: int = 2) -> str:
    return f"{found.p50:.{digits}f} / {found.p99:.{digits}f}"


def to_markdown(start: dict[str, list[float]], rows: list[Row]) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    version = os.environ.get("VLLM") or "0.32.0"
    text = HEAD.format(version=version, machine=machine)
    lines = [
        [what, f"{theirs:.{digits}f}", f"{ours:.{digits}f}", "1/" + _held(theirs / ours, goal, False)]
        for what, theirs, ours, digits, goal in (
            ("start to addresses, s (1/30)", start["stock"][0], start["ours"][0], 2, 30),
            ("start until two ranks are greeted, s (1/30)", start["stock"][1], start["ours"][1], 2, 30),
            ("memory then, MB (1/12)", start["stock"][2], start["ours"][2], 0, 12),
        )
    ]
    text += _table("Start and memory", ["", "vLLM's", "ours", "ratio"], lines)
    text += _wakes(rows)
    text += _messages(rows)
    text += _isolated(rows, "isolated", "An isolated change, lockstep")
    text += _isolated(rows, "isolated, independent", "An isolated change, independent")
    text += _busy(rows, "busy", "Busy ranks, lockstep")
    text += _busy(rows, "busy, independent", "Busy ranks, independent")
    return text + _backlog(rows)


def _size(row: Row) -> list[str]:
    return [str(row.ranks), str(row.frontends)]


def _wakes(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        stock, ours, floor = (row.found["wakes"][name] for name in ("stock", "ours", "echo"))
        lines.append([
            *_size(row), _pair(floor), _pair(stock), _pair(ours),
            f"{_held(ours.p50 / stock.p50, 1)} / {_held(ours.p99 / stock.p99, 1)}",
            f"{_held(ours.p50 / floor.p50, 1.15)} / {_held(ours.p99 / floor.p99, 1.15)}",
        ])  # fmt: skip
    head = ["ranks", "front-ends", "floor, ms", "vLLM's", "ours", "× vLLM's (1)", "× floor (1.15)"]
    return _table("A wake, from a front-end's notice to the last rank, p50 / p99", head, lines)


def _messages(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        stock, ours = row.found["flood"]["stock"], row.found["flood"]["ours"]
        lines.append([
            *_size(row), f"{stock.rate / 1e3:.0f}", f"{ours.rate / 1e3:.0f}", f"{stock.per_cpu / 1e3:.0f}",
            f"{ours.per_cpu / 1e3:.0f}", _held(ours.per_cpu / stock.per_cpu, 3, False),
        ])  # fmt: skip
    head = ["ranks", "front-ends", "vLLM's, thousand a second", "ours", "vLLM's, thousand a CPU second", "ours",
            "ratio (3)"]  # fmt: skip
    return _table("Load messages taken in, lockstep", head, lines)


def _isolated(rows: list[Row], key: str, title: str) -> str:
    lines = []
    for row in rows:
        stock, ours = row.found[key]["stock"], row.found[key]["ours"]
        ratios = f"1/{_held(stock.p50 / ours.p50, 20, False)}, 1/{_held(stock.p99 / ours.p99, 5, False)}"
        lines.append([*_size(row), _pair(stock), _pair(ours), ratios])
    head = ["ranks", "front-ends", "vLLM's, ms", "ours", "p50 (1/20), p99 (1/5)"]
    return _table(f"{title}: until the first front-end sees it, p50 / p99", head, lines)


def _busy(rows: list[Row], key: str, title: str) -> str:
    lines = []
    for row in rows:
        for step_ms, found in row.found[key].items():
            stock, ours = found["stock"], found["ours"]
            lines.append([
                *_size(row), str(step_ms), _pair(stock.age, 1), _pair(ours.age, 1),
                "1/" + _held(stock.age.p99 / ours.age.p99, 5, False), f"{stock.cpu:.1%}", f"{ours.cpu:.1%}",
                _held(ours.cpu / max(stock.cpu, 0.001), 1),
            ])  # fmt: skip
    head = ["ranks", "front-ends", "step, ms", "vLLM's, ms", "ours", "p99 (1/5)", "CPU, vLLM's", "ours", "ratio (1)"]
    return _table(f"{title}: age of what a front-end sees, p50 / p99", head, lines)


def _backlog(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        stock, ours = row.found["flood"]["stock"], row.found["flood"]["ours"]
        lines.append([
            *_size(row), f"{stock.gap:.0f}", _held(ours.gap, 15), f"{stock.notice:.1f}", _held(ours.notice, 20),
            f"{stock.start:.0f}", _held(ours.start, 20),
        ])  # fmt: skip
    head = ["ranks", "front-ends", "longest without loads, ms: vLLM's", "ours (15)", "front-end's notice: vLLM's",
            "ours (20)", "a rank's start behind its part: vLLM's", "ours (20)"]  # fmt: skip
    return _table("400 thousand load messages at once", head, lines)
