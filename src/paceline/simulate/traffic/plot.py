"""A picture of one run: how long requests waited for their first token, and how level the ranks were."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paceline.errors import ConfigError
from paceline.simulate.traffic.outcome import Outcome
from paceline.simulate.traffic.run import Run


def check_plotting() -> None:
    """Raises ConfigError where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot: needs matplotlib: pip install 'paceline[bench]'") from None


def plot(run: Run, outcome: Outcome, path: Path) -> None:
    """Draw a run that is over into a file (.png, .svg, ...). Raises ConfigError where it cannot be written."""
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    waits, work = figure.subplots(1, 2)
    firsts = np.sort([one.first - one.at for one in run.sequences])
    waits.plot(firsts, np.arange(1, len(firsts) + 1) / len(firsts))
    waits.set(xscale="log", xlabel="time to first token, s", ylabel="share of requests", ylim=(0, 1))
    waits.grid(alpha=0.3)
    samples = np.array(run.recorder.samples).reshape(-1, 3)
    work.plot(samples[:, 0], samples[:, 1] / 1e3, label="the fullest rank", linewidth=0.8)
    work.plot(samples[:, 0], samples[:, 2] / 1e3, label="mean", linewidth=0.8)
    work.set(xlabel="time, s", ylabel="queued work of a rank, 1,000 tokens", ylim=(0, None))
    work.grid(alpha=0.3)
    work.legend()
    kind = "lockstep" if outcome.lockstep else "independent"
    figure.suptitle(f"{outcome.routing}, {outcome.ranks} {kind} ranks, {outcome.frontends} front-ends")
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path}: {getattr(error, 'strerror', None) or error}") from None
