"""What `routing.py` measured: one line a row while it runs, the results file, and its plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from paceline.sim.outcome import Outcome


class Cell(Struct, frozen=True):
    """One row: what is served, on what."""

    trace: str
    lockstep: bool
    ranks: int
    frontends: int
    load: str


class Measured(Struct, frozen=True):
    """One figure of a row: by whom, with which token budget."""

    cell: Cell
    policy: str
    budget: int
    outcome: Outcome


RESULTS = Path(__file__).resolve().parent / "results"
OURS, TUNED, VLLM, BOUND = "paceline", "vllm-0.32, tuned", "vllm-0.32", "oracle"

WITHIN_ORACLE = 1.10
INDEPENDENT_P99 = 0.6
INDEPENDENT_TOKENS = 1.08
LOCKSTEP_TOKENS = 3.0
LOCKSTEP_P99 = 0.6
NOISE = 0.02
"""Two figures that differ by less are not told apart: another seed moves them by as much."""


class Row:
    """One row's figures, by policy."""

    def __init__(self, measured: Iterable[Measured]) -> None:
        kept = list(measured)
        self.cell: Cell = kept[0].cell
        self.by = {one.policy: one for one in kept}

    @property
    def saturated(self) -> bool:
        return self.cell.load == "saturated"

    def p99(self, policy: str) -> float:
        """The 99th percentile of the time to a first token, in milliseconds."""
        return self.by[policy].outcome.ttft_p99_ms

    def tokens(self, policy: str) -> float:
        return self.by[policy].outcome.throughput_tokens_per_s

    def ratio(self, policy: str) -> float:
        """What the row is about, against the oracle: tokens a second where it is saturated, else p99."""
        return self.tokens(policy) / self.tokens(BOUND) if self.saturated else self.p99(policy) / self.p99(BOUND)

    def peers(self) -> list[str]:
        return [policy for policy in self.by if policy not in (OURS, BOUND)]

    def goals(self) -> list[tuple[str, bool, str]]:
        found = []
        if not self.saturated:
            ratio = self.p99(OURS) / self.p99(BOUND)
            found.append(("p99 within 10% of the oracle", ratio <= WITHIN_ORACLE, f"{ratio:.2f}"))
            best = min(self.peers(), key=self.p99)
            found.append(("behind no peer", self.p99(OURS) <= self.p99(best) * (1 + NOISE), f"{best}"))
        if self.cell.load == "steady":
            rival, most = (TUNED, LOCKSTEP_P99) if self.cell.lockstep else (VLLM, INDEPENDENT_P99)
            ratio = self.p99(OURS) / self.p99(rival)
            found.append((f"p99 at most {most} x {rival}", ratio <= most, f"{ratio:.2f}"))
        if self.saturated:
            least = LOCKSTEP_TOKENS if self.cell.lockstep else INDEPENDENT_TOKENS
            ratio = self.tokens(OURS) / self.tokens(VLLM)
            found.append((f"at least {least} x {VLLM}'s throughput", ratio >= least, f"{ratio:.2f}"))
            if self.cell.lockstep:
                ratio = self.tokens(OURS) / self.tokens(TUNED)
                found.append(("not below the tuned", ratio >= 1 - NOISE, f"{ratio:.2f}"))
        return found

    def why(self) -> list[str]:
        """For each goal that is missed: by how much, and whether the bound itself misses it."""
        reasons = []
        for goal, met, figure in self.goals():
            if met:
                continue
            reason = f"{goal}: {figure}"
            if goal.startswith("at least"):
                bound = self.tokens(BOUND) / self.tokens(VLLM)
                wanted = LOCKSTEP_TOKENS if self.cell.lockstep else INDEPENDENT_TOKENS
                reason += f" (the oracle: {bound:.2f})" if bound < wanted * 1.02 else ""
            elif goal.startswith("p99 within"):
                p50 = self.by[OURS].outcome.ttft_p50_ms / self.by[BOUND].outcome.ttft_p50_ms
                reason += f" (p50: {p50:.2f} x the oracle's)"
            elif goal.startswith("p99 at most"):
                rival = TUNED if self.cell.lockstep else VLLM
                bound = self.p99(BOUND) / self.p99(rival)
                reason += f" (the oracle: {bound:.2f})" if bound > LOCKSTEP_P99 * 0.95 else ""
            reasons.append(reason)
        return reasons


def grouped(measured: Iterable[Measured]) -> list[Row]:
    """By row, in the order in which they were measured."""
    rows: dict[Cell, list[Measured]] = {}
    for one in measured:
        rows.setdefault(one.cell, []).append(one)
    return [Row(group) for group in rows.values()]


def named(row: Row) -> str:
    cell = row.cell
    kind = "lockstep" if cell.lockstep else "independent"
    return f"{cell.trace}, {kind}, {cell.load}, {cell.ranks} ranks, {cell.frontends} front-ends"


def to_console(measured: list[Measured], progress: str) -> str:
    row = Row(measured)
    figures = "  ".join(f"{policy} {row.ratio(policy):.2f}" for policy in row.by if policy != BOUND)
    what = f"{row.tokens(BOUND):,.0f} tokens/s" if row.saturated else f"p99 {row.p99(BOUND):,.0f} ms"
    missed = "; missed: " + "; ".join(row.why()) if row.why() else ""
    return f"[{progress}] {named(row)}: oracle {what}; x oracle: {figures}{missed}"


def table(rows: list[Row]) -> str:
    """A Markdown table of rows that share the load and the kind of ranks."""
    policies = [policy for policy in rows[0].by if policy != BOUND]
    about = "tokens/s" if rows[0].saturated else "p99, ms"
    head = ["trace", "ranks", "front-ends", f"oracle, {about}", *policies, "missed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        bound = row.tokens(BOUND) if row.saturated else row.p99(BOUND)
        figures = []
        for policy in policies:
            text = f"{row.ratio(policy):.2f}"
            text += f" ({row.by[policy].budget})" if policy == TUNED else ""
            figures.append(f"**{text}**" if policy == OURS else text)
        cell = row.cell
        lines.append(
            [cell.trace, str(cell.ranks), str(cell.frontends), f"{bound:,.0f}", *figures, "; ".join(row.why()) or "-"]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(rows: list[Row]) -> str:
    met: dict[str, list[bool]] = {}
    for row in rows:
        kind = "lockstep" if row.cell.lockstep else "independent"
        for goal, so, _ in row.goals():
            met.setdefault(f"{kind}, {row.cell.load} | {goal}", []).append(so)
    lines = ["| rows | goal | met by |", "| --- | --- | --- |"]
    lines += [f"| {goal} | {sum(so)} of {len(so)} |" for goal, so in met.items()]
    return "\n".join(lines)


def write(measured: list[Measured], folder: Path) -> None:
    from bench.routing_words import BEHIND, HEAD

    rows = grouped(measured)
    spent = sum({id(one.outcome): one.outcome.real_s for one in measured}.values())
    parts = [HEAD.format(minutes=spent / 60), verdicts(rows)]
    for lockstep in (False, True):
        for load in ("steady", "saturated", "bursts"):
            some = [row for row in rows if row.cell.lockstep == lockstep and row.cell.load == load]
            if not some:
                continue
            kind = "Lockstep" if lockstep else "Independent"
            about = "output tokens a second" if load == "saturated" else "p99 of the time to a first token"
            parts.append(f"## {kind}, {load}: {about}, against the oracle's\n\n{table(some)}")
        if plot([row for row in rows if row.cell.lockstep == lockstep], folder, lockstep):
            parts.append(f"![ours and the others, against the oracle]({picture(lockstep)})")
    (folder / "routing.md").write_text("\n\n".join([*parts, BEHIND]))


def picture(lockstep: bool) -> str:
    return f"routing_{'lockstep' if lockstep else 'independent'}.png"


def plot(rows: list[Row], folder: Path, lockstep: bool) -> bool:
    """All policies against the oracle, over the ranks, a panel a trace and load. Returns whether there was anything."""
    if not rows:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    traces = sorted({row.cell.trace for row in rows})
    loads = ["steady", "saturated", "bursts"]
    figure = Figure(figsize=(12, 3.2 * len(traces)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(traces), len(loads), squeeze=False)
    for line, trace in zip(panels, traces, strict=True):
        for panel, load in zip(line, loads, strict=True):
            some = [row for row in rows if row.cell.trace == trace and row.cell.load == load]
            labels = [f"{row.cell.ranks} x {row.cell.frontends}" for row in some]
            for policy in some[0].by if some else ():
                if policy != BOUND:
                    strong = {"linewidth": 2.5, "color": "black"} if policy == OURS else {"linewidth": 1}
                    panel.plot(labels, [row.ratio(policy) for row in some], marker=".", label=policy, **strong)
            panel.axhline(1.0, color="grey", linewidth=0.5)
            if load != "saturated":
                panel.set_yscale("log")
            panel.set_title(f"{trace}, {load}: {'tokens/s' if load == 'saturated' else 'p99'} / oracle's", fontsize=9)
            panel.tick_params(labelsize=7)
            panel.set_xlabel("ranks x front-ends", fontsize=8)
    panels[0][0].legend(fontsize=7)
    figure.savefig(folder / picture(lockstep), dpi=75)
    return True
