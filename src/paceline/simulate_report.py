"""`paceline simulate --trace … --report FILE`: what a run looked like, as the page at /dashboard shows a deployment.

Of each way to choose ranks there are the lanes (what each rank did and how full it was, the queue and the waves over
them), and of all together a table of their figures and histograms of their clients' times.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable

from paceline.core.frontend.history import DIGITS, DOING
from paceline.report import page
from paceline.sim.answers import Answer
from paceline.sim.engine import MemoryEngine
from paceline.sim.outcome import Outcome
from paceline.sim.replay import Replay

MOST = 900
"""Samples of a lane; where there are more, every second one is left out."""
BINS = 48
COLORS = ("var(--x)", "var(--p)", "var(--d)", "var(--h)", "var(--l)", "var(--m)", "var(--y)")
FIGURES: dict[str, tuple[Callable[[Outcome], float], str, int]] = {
    "first token, p50 ms": (lambda one: one.ttft_p50_ms, ",.1f", -1),
    "first token, p90 ms": (lambda one: one.ttft_p90_ms, ",.1f", -1),
    "first token, p99 ms": (lambda one: one.ttft_p99_ms, ",.1f", -1),
    "each token after, p50 ms": (lambda one: one.tpot_p50_ms, ",.1f", -1),
    "each token after, p99 ms": (lambda one: one.tpot_p99_ms, ",.1f", -1),
    "output tokens a second": (lambda one: one.throughput_tokens_per_s, ",.0f", 1),
    "all served after, s": (lambda one: one.duration_s, ",.1f", -1),
    "imbalance, mean": (lambda one: one.imbalance_mean, ".2f", -1),
    "KV memory, most": (lambda one: one.kv_peak, ".0%", 0),
    "prompt tokens cached": (lambda one: one.prefix_hit_rate, ".1%", 1),
    "pushed out": (lambda one: one.preemptions, ",", -1),
    "step time lost at the barrier": (lambda one: one.barrier_share, ".1%", -1),
}
"""What it is called, where it is, its format; whether more (1) or less (-1) is better, or neither."""
TIMES: dict[str, Callable[[Answer], float]] = {
    "first token": lambda one: one.first - one.asked,
    "each token after": lambda one: (one.ended - one.first) / max(1, one.tokens - 1),
    "whole answer": lambda one: one.ended - one.asked,
}
STYLE = """
.lane { display: grid; grid-template-columns: 60px 1fr; gap: 8px; height: 15px; line-height: 15px; }
.lane canvas { width: 100%; height: 13px; display: block; } .lane span { text-align: right; color: var(--soft); }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 16px; }
svg text { fill: var(--soft); font-size: 11px; } svg .axis { stroke: var(--line); }
"""
DRAW = """
const css = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
function draw() {
  for (const lane of document.querySelectorAll("canvas")) {
    const run = RUNS[lane.dataset.run], count = run.queued.length, pen = lane.getContext("2d");
    lane.width = count; lane.height = 18;
    const most = Math.max(1, ...run.queued);
    for (let at = 0; at < count; at++) {
      let height = 0, color = "soft";
      const rank = lane.dataset.rank, waited = run.queued[at], runs = run.running[at];
      if (rank === "queue") height = waited ? Math.max(1, waited / most * 18) : 0;
      else if (rank === "wave") { height = runs ? 14 : 2; color = !runs ? "bar" : run.wave[at] % 2 ? "y" : "soft"; }
      else { color = run.did[at][rank]; height = Math.max(2, parseInt(run.full[at][rank], 36) / 35 * 18); }
      pen.fillStyle = css(color);
      pen.fillRect(at, 18 - height, 1, height);
    }
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


class Lanes:
    """What each rank did, over one run."""

    def __init__(self) -> None:
        self.queued: list[int] = []
        self.wave: list[int] = []
        self.running: list[bool] = []
        self.did: list[str] = []
        self.full: list[str] = []
        self._each = self._due = 1

    def look(self, run: Replay) -> None:
        """At this moment."""
        self._due -= 1
        if self._due:
            return
        machines = [frontend.machine for frontend in run.frontends.values()]
        wave = max(machines, key=lambda machine: machine.wave)
        running = run.shape.lockstep and any(machine.running for machine in machines)
        self.queued.append(sum(len(machine.waiting_for_grant()) for machine in machines))
        self.wave.append(wave.wave)
        self.running.append(running)
        self.did.append("".join(_doing(engine, running) for engine in run.engines))
        self.full.append("".join(_full(engine) for engine in run.engines))
        if len(self.queued) >= 2 * MOST:
            for kept in (self.queued, self.wave, self.running, self.did, self.full):
                del kept[1::2]
            self._each *= 2
        self._due = self._each


def _doing(engine: MemoryEngine, running: bool) -> str:
    if engine.running or engine.waiting:
        return "p" if engine.to_prefill else "d"
    return "y" if running else "i"


def _full(engine: MemoryEngine) -> str:
    share = (len(engine.running) + len(engine.waiting)) / engine.shape.slots
    return DIGITS[min(len(DIGITS) - 1, round(share * (len(DIGITS) - 1)))]


class Ran:
    """One run that is over."""

    def __init__(self, run: Replay, outcome: Outcome, lanes: Lanes) -> None:
        self.outcome, self.lanes, self.lockstep = outcome, lanes, run.shape.lockstep
        answers = [answer for answers in run.answers() for answer in answers.values()]
        self.times = {name: [time(answer) for answer in answers if answer.over] for name, time in TIMES.items()}


def report(runs: list[Ran], trace: str) -> str:
    """The whole file, of runs of the same trace."""
    first = runs[0].outcome
    kind = "lockstep" if first.lockstep else "independent"
    about = (
        f"{first.requests:,} requests of {trace} in virtual time, {first.frontends} front-ends, {first.ranks} {kind}"
    )
    about += " ranks"
    names = ", ".join(run.outcome.routing for run in runs)
    data = [
        {"queued": one.lanes.queued, "wave": one.lanes.wave, "running": [int(runs) for runs in one.lanes.running],
         "did": one.lanes.did, "full": one.lanes.full}
        for one in runs
    ]  # fmt: skip
    charts = "".join(_histogram(name, runs) for name in TIMES)
    body = [
        f"<section><h2>Figures</h2>{_table(runs)}</section>",
        f'<section><h2>How long clients waited</h2>{_key(runs)}<div class="charts">{charts}</div></section>',
        *(_lanes(at, run) for at, run in enumerate(runs)),
        f"<script>const RUNS = {json.dumps(data, separators=(',', ':'))};{DRAW}</script>",
    ]
    return page(f"paceline simulate: {names}", about, "\n".join(body), STYLE)


def _table(runs: list[Ran]) -> str:
    heads = "".join(f"<th>{html.escape(run.outcome.routing)}</th>" for run in runs)
    rows = []
    for name, (figure, form, better) in FIGURES.items():
        values = [figure(run.outcome) for run in runs]
        best = max(values) if better > 0 else min(values)
        marked = [' class="best"' if better and value == best and len(set(values)) > 1 else "" for value in values]
        cells = "".join(f"<td{mark}>{value:{form}}</td>" for mark, value in zip(marked, values, strict=True))
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    return f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"


def _key(runs: list[Ran]) -> str:
    parts = [
        f'<i style="background: {COLORS[at % len(COLORS)]}"></i>{html.escape(run.outcome.routing)}'
        for at, run in enumerate(runs)
    ]
    return f'<div class="key">{"".join(parts)}</div>'


def _histogram(name: str, runs: list[Ran]) -> str:
    """Shares of the requests over a logarithm of the time, a line a run."""
    width, height, left, low = 420, 150, 6, 130
    values = [max(1e-6, value) for run in runs for value in run.times[name]]
    least, most = math.log10(min(values)), math.log10(max(values))
    span = max(0.1, most - least)
    counts: list[list[float]] = []
    for run in runs:
        bins = [0] * BINS
        for value in run.times[name]:
            bins[min(BINS - 1, int((math.log10(max(1e-6, value)) - least) / span * BINS))] += 1
        counts.append([count / max(1, len(run.times[name])) for count in bins])
    top = max(map(max, counts)) or 1.0
    wide = (width - 2 * left) / BINS
    lines = []
    for at, shares in enumerate(counts):
        points = "".join(
            f"L{left + place * wide:.1f},{low - share / top * (low - 20):.1f}h{wide:.1f}"
            for place, share in enumerate(shares)
        )
        color = COLORS[at % len(COLORS)]
        lines.append(f'<path d="M{left},{low}{points}V{low}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    marks = []
    for power in range(math.ceil(least), math.floor(most) + 1):
        across = left + (power - least) / span * (width - 2 * left)
        marks.append(
            f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="20" y2="{low}"/>'
            f'<text x="{across + 2:.1f}" y="{height - 6}">{_seconds(10.0**power)}</text>'
        )
    axis = f'<line class="axis" x1="{left}" x2="{width - left}" y1="{low}" y2="{low}"/>'
    title = f'<text x="{left}" y="12">{name}</text>'
    return f'<svg viewBox="0 0 {width} {height}" role="img">{title}{axis}{"".join(marks + lines)}</svg>'


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _lanes(at: int, run: Ran) -> str:
    count = len(run.lanes.did[0]) if run.lanes.did else 0
    names = ["queue", *(["wave"] if run.lockstep else []), *map(str, range(count))]
    rows = "".join(
        f'<div class="lane"><span>{name}</span><canvas data-run="{at}" data-rank="{name}"></canvas></div>'
        for name in names
    )
    key = "".join(f'<i style="background: var(--{letter})"></i>{DOING[letter]}' for letter in "pdyi")
    most = max(run.lanes.queued, default=0)
    about = f"0 to {run.outcome.duration_s:,.1f} s; at most {most:,} waited before all ranks"
    title = f"{html.escape(run.outcome.routing)}: what each rank did, as high as it was full"
    return f'<section><h2>{title}</h2><div class="key soft">{about}{key}</div>{rows}</section>'
