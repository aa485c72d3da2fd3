"""What `quota.py` measured, as a table."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass


@dataclass
class Turn:
    """One variant's turn in one round: output tokens a second, times in seconds."""

    round: int
    variant: str
    tokens_per_s: float
    gap_p50_s: float
    gap_p99_s: float
    first_p50_s: float


HEADINGS = ["variant", "output tokens/s", "to the first variant", "gap p50", "gap p99", "to the first variant",
            "time to first token p50"]  # fmt: skip


def rows(turns: list[Turn]) -> list[list[str]]:
    """A line a variant: medians over the rounds, and ratios within a round, with their range."""
    by_variant: dict[str, list[Turn]] = {}
    for turn in turns:
        by_variant.setdefault(turn.variant, []).append(turn)
    first = next(iter(by_variant.values()))
    made = []
    for name, own in by_variant.items():
        pairs = list(zip(own, first, strict=True))
        made.append([
            name,
            f"{statistics.median(turn.tokens_per_s for turn in own):,.0f}",
            ratio([mine.tokens_per_s / its.tokens_per_s for mine, its in pairs]),
            f"{statistics.median(turn.gap_p50_s for turn in own) * 1000:.0f} ms",
            f"{statistics.median(turn.gap_p99_s for turn in own) * 1000:.0f} ms",
            ratio([mine.gap_p99_s / its.gap_p99_s for mine, its in pairs]),
            f"{statistics.median(turn.first_p50_s for turn in own):.2f} s",
        ])  # fmt: skip
    return made


def ratio(values: list[float]) -> str:
    """The median, and the range of more than one."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def to_console(turns: list[Turn]) -> str:
    return "\n".join(
        f"round {turn.round}, {turn.variant}: {turn.tokens_per_s:,.0f} tokens/s, gap p50"
        f" {turn.gap_p50_s * 1000:.0f} ms, p99 {turn.gap_p99_s * 1000:.0f} ms, first token p50 {turn.first_p50_s:.2f} s"
        for turn in turns
        if turn.round == turns[-1].round
    )


def table(turns: list[Turn]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(turns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(turns: list[Turn], ranks: int, command: str, about: str) -> str:
    cores = f"{os.cpu_count()} cores, shared with other work: {os.getloadavg()[0]:.1f} ran or waited to run at the end."
    return f"{heading(ranks)}\n\n    {command}\n\n{cores}\n\n{about}\n\n{table(turns)}\n"


def heading(ranks: int) -> str:
    return f"## {ranks} ranks"


def replaced(text: str, ranks: int, new: str) -> str:
    """The whole of bench/results/quota.md with this section in place of the one that was there."""
    title, *parts = text.split("\n## ") if text else ["# The common prefill quota\n"]
    sections = {f"## {part}".partition("\n")[0]: f"## {part}" for part in parts} | {heading(ranks): new}
    in_order = sorted(sections, key=lambda name: int(name.split()[1]))
    return "\n".join([title, *(f"{sections[name].rstrip()}\n" for name in in_order)])
