"""What `cost_model.py` measured, as tables and a plot."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from paceline.protocol.messages import Load

GOAL = 0.25


@dataclass
class Sample:
    """One request: what was predicted when it was sent, in seconds, and what came.

    `undated`: predicted without the age of the report. `hindsight`: predicted with the costs a step that the rank
    reported when the answer had come, in place of those it had reported before. `sent`: the clock.
    `known`: the load believed.
    """

    part: str
    load: str
    rank: int
    prompt_tokens: int
    predicted: float
    undated: float
    age_s: float | None
    sent: float
    known: Load
    actual: float | None = None
    hindsight: float = 0.0

    @property
    def measured(self) -> float:
        """The time to first token."""
        assert self.actual is not None
        return self.actual

    @property
    def error(self) -> float:
        """|predicted - actual| / actual."""
        return abs(self.predicted - self.measured) / self.measured

    @property
    def undated_error(self) -> float:
        """The same, without the report's age."""
        return abs(self.undated - self.measured) / self.measured

    @property
    def hindsight_error(self) -> float:
        """The same, with the costs that the rank had afterwards."""
        return abs(self.hindsight - self.measured) / self.measured

    @property
    def pace(self) -> float:
        """By what the time of a prompt token changed while the request was there: as many times as long."""
        return self.hindsight / self.predicted


def p90(values: list[float]) -> float:
    """The 90th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.9 * len(values)))]


def rows(samples: list[Sample]) -> list[list[str]]:
    """One row a part and load, one for each part as a whole where it has several."""
    found: list[list[str]] = []
    for part, of_part in groupby(samples, lambda sample: sample.part):
        kept = list(of_part)
        loads = [(load, list(group)) for load, group in groupby(kept, lambda sample: sample.load)]
        for load, group in [*loads, *([("all", kept)] if len(loads) > 1 else [])]:
            errors = [sample.error for sample in group]
            bias = statistics.median(sample.predicted / sample.measured for sample in group)
            found.append(
                [
                    part, load, str(len(group)),
                    f"{statistics.median(sample.measured for sample in group):.3f} s",
                    f"{max(sample.measured for sample in group):.2f} s",
                    f"{statistics.median(errors):.1%}", f"{p90(errors):.1%}", f"{bias:.2f}",
                    f"{statistics.median(sample.undated_error for sample in group):.1%}",
                    f"{statistics.median(sample.hindsight_error for sample in group):.1%}",
                    f"{min(sample.pace for sample in group):.2f} to {max(sample.pace for sample in group):.2f}",
                ]
            )  # fmt: skip
    return found


HEAD = [
    "deployment", "load", "requests", "TTFT, median", "TTFT, most", "error, median", "error, p90",
    "predicted / actual, median", "error without the report's age, median",
    "error with the speed measured afterwards, median", "change of speed meanwhile",
]  # fmt: skip


def to_console(samples: list[Sample]) -> str:
    """Aligned columns."""
    table = [HEAD, *rows(samples)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def to_markdown(samples: list[Sample], command: str) -> str:
    """The results file."""
    table = "\n".join("| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows(samples)])
    llama = [sample.error for sample in samples if sample.part == "llama"]
    verdict = ""
    if llama:
        median = statistics.median(llama)
        verdict = f"`llama`, all loads: median error {median:.1%}; the goal is {GOAL:.0%}: "
        verdict += "met.\n" if median <= GOAL else "missed.\n"
    return f"""# Cost model: predicted against measured time to first token

    {command}

{os.cpu_count()} cores ({platform.machine()}), shared with other work: {os.getloadavg()[0]:.1f} ran or waited to run at
the end (one-minute load).

{verdict}
{table}

![predicted against measured time to first token](cost_model.png)

Prompts of 8 to 600 random tokens, answers of at most 8 to 48, at random moments (Poisson). `light`, `medium` and
`heavy` are 0.5, 0.9 and 1.5 of what the ranks can carry by their own measurement after warming up. Each rank has one
thread. The prediction is `predicted_wait(load, prompt_tokens, age_s)` of `paceline.protocol.cost`, taken from what
the front-end believes at the moment of sending, of the rank that least-load routing then chose. The error is
|predicted - actual| / actual. With 2 slots most requests wait until others have ended.

Where other work takes the cores away, a rank's speed changes while a request waits, and no prediction can know that.
"Error with the speed measured afterwards" leaves this out: it is the same prediction, from the same moment, with the
costs a step that the rank reported when the answer had come. "Change of speed meanwhile" is the second prediction over
the first, least and most.

The speed measured afterwards includes the steps that the request itself waited for: it shows how much of the error is
the machine's change of speed, and is no prediction that anybody could have made.
"""


def plot(samples: list[Sample], path: Path) -> None:
    """Predicted over measured, both logarithmic, one panel a deployment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = list(dict.fromkeys(sample.part for sample in samples))
    figure, panels = pyplot.subplots(1, len(parts), figsize=(4.2 * len(parts), 4.2), squeeze=False)
    for panel, part in zip(panels[0], parts, strict=True):
        kept = [sample for sample in samples if sample.part == part]
        for load in dict.fromkeys(sample.load for sample in kept):
            here = [sample for sample in kept if sample.load == load]
            panel.scatter([s.measured for s in here], [s.predicted for s in here], s=14, alpha=0.7, label=load)
        ends = [min(min(s.measured, s.predicted) for s in kept), max(max(s.measured, s.predicted) for s in kept)]
        panel.plot(ends, ends, color="black", linewidth=1)
        below, above = [(1 - GOAL) * end for end in ends], [(1 + GOAL) * end for end in ends]
        panel.fill_between(ends, below, above, color="black", alpha=0.08, label=f"within {GOAL:.0%}")
        panel.set(xscale="log", yscale="log", title=part, xlabel="measured, s", ylabel="predicted, s")
        panel.legend(fontsize="small")
    figure.suptitle("time to first token")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
