"""What came of a run, in figures."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
from msgspec import Struct

from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.recorder import Recorder
from paceline.simulate.traffic.sequence import Sequence


class Outcome(Struct, frozen=True, kw_only=True):
    """The figures of one run. Times in milliseconds unless named `_s`.

    `ttft`: from the client's request to its first token. `tpot`: per output token after the first.
    `throughput_tokens_per_s`: output tokens over the time from the first arrival to the last token;
    `sustained_tokens_per_s`: the same within the time in which requests arrive, without the warm-up: what is
    right where more arrives than is served. `imbalance`: the most work of a rank over the mean, by what is queued
    (prompt tokens, and 256 for each request), sampled. `kv_peak`: share of the KV memory, the worst rank's, and
    the mean of all ranks' peaks. `prefix_hit_rate`: share of the prompt tokens found in a cache. `barrier_share`: share
    of the ranks' step time that was spent waiting for the slowest.
    """

    routing: str
    ranks: int
    frontends: int
    lockstep: bool
    requests: int
    refused: int
    duration_s: float
    real_s: float
    output_tokens: int
    throughput_tokens_per_s: float
    sustained_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p99_ms: float
    imbalance_mean: float
    imbalance_worst: float
    kv_peak: float
    kv_peak_mean: float
    prefix_hit_rate: float
    preemptions: int
    barrier_share: float
    steps: int


class Who(Struct, frozen=True):
    """Whose figures they are."""

    routing: str
    ranks: int
    frontends: int
    lockstep: bool


def outcome(
    who: Who, sequences: Many[Sequence], refused: int, ranks: Many[SimulatedRank], recorder: Recorder, real_s: float
) -> Outcome:
    """Sum up a run that is over. Requests from before the window (the warm-up) count for the tokens alone."""
    begin, end = recorder.window
    counted = [sequence for sequence in sequences if sequence.at >= begin]
    waits = np.array([one.first - one.at for one in counted]) * 1e3
    paces = np.array([(one.last - one.first) / (one.answer - 1) for one in counted if one.answer > 1]) * 1e3
    first = min((one.at for one in sequences), default=0.0)
    tokens = sum(one.answer for one in sequences)
    span = recorder.end - first
    engines = [rank.engine for rank in ranks]
    peaks = [engine.kv_peak / engine.shape.kv_tokens for engine in engines]
    prompts = sum(engine.prompt_tokens for engine in engines)
    imbalances = [most / mean for _, most, mean in recorder.samples] or [1.0]
    return Outcome(
        routing=who.routing, ranks=who.ranks, frontends=who.frontends, lockstep=who.lockstep,
        requests=len(sequences), refused=refused, duration_s=span, real_s=real_s, output_tokens=tokens,
        throughput_tokens_per_s=tokens / span if span > 0 else 0.0,
        sustained_tokens_per_s=recorder.window_tokens / (end - begin) if end > begin else 0.0,
        **_percentiles("ttft", waits), **_percentiles("tpot", paces),
        imbalance_mean=sum(imbalances) / len(imbalances), imbalance_worst=max(imbalances),
        kv_peak=max(peaks), kv_peak_mean=sum(peaks) / len(peaks),
        prefix_hit_rate=sum(engine.hit_tokens for engine in engines) / prompts if prompts else 0.0,
        preemptions=sum(engine.preempted for engine in engines),
        barrier_share=recorder.lost_s / recorder.step_s if recorder.step_s else 0.0, steps=recorder.steps,
    )  # fmt: skip


def _percentiles(name: str, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, float]:
    return {
        f"{name}_p{percent}_ms": float(np.percentile(values, percent)) if len(values) else 0.0
        for percent in (50, 90, 99)
    }
