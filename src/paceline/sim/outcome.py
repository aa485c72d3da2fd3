"""What came of a replayed trace, in figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from paceline.sim.answers import Answer

if TYPE_CHECKING:
    from paceline.sim.replay import Replay


class Outcome(Struct, frozen=True, kw_only=True, rename={"frontends": "front_ends"}):
    """The figures of one run. Times in milliseconds unless named `_s`.

    `ttft`: from the client's request to its first token. `tpot`: per output token after the first.
    `throughput_tokens_per_s`: output tokens over the time from the first arrival to the last token;
    `sustained_tokens_per_s`: the same within the time in which requests arrive, without the warm-up: what is
    right where more arrives than is served. `imbalance`: the most work of a rank over the mean, by what is queued
    (prompt tokens, and 256 for each request), sampled. `kv_peak`: share of the KV memory, the worst rank's, and
    the mean of all ranks' peaks. `prefix_hit_rate`: share of the prompt tokens found in a cache. `barrier_share`: share
    of the ranks' step time that was spent waiting for the slowest. `recomputed_tokens`: of prompts, that were in no
    cache. Of sessions alone: `turns_per_s`, and `turns`, by which turns, how many and their `ttft`.
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
    recomputed_tokens: int = 0
    turns_per_s: float = 0.0
    turns: dict[str, dict[str, float]] = {}


TURNS = {"first": (1, 1), "2 to 9": (2, 9), "10 on": (10, 1 << 30)}


def summed_up(run: Replay, real_s: float) -> Outcome:
    """Sum up a run that is over. Requests from before the window (the warm-up) count for the tokens alone."""
    setup, recorder, engines = run.setup, run.recorder, run.engines
    begin, end = recorder.window
    answers = [answer for answers in run.answers() for answer in answers.values()]
    places: dict[int, Answer] = {}
    for mine in run.answers():
        places |= {number: one for number, one in mine.items() if begin <= one.asked}
    counted = list(places.values())
    waits = _waits(counted)
    paces = np.array([(one.ended - one.first) / (one.tokens - 1) for one in counted if one.tokens > 1]) * 1e3
    tokens = sum(one.tokens for one in answers)
    span = max(one.ended for one in answers) - min(one.asked for one in answers)
    peaks = [engine.kv_peak / engine.shape.kv_tokens for engine in engines]
    prompts = sum(engine.prompt_tokens for engine in engines)
    hits = sum(engine.hit_tokens for engine in engines)
    imbalances = [most / mean for _, most, mean in recorder.samples] or [1.0]
    return Outcome(
        routing=setup.routing, ranks=setup.ranks, frontends=setup.frontends, lockstep=setup.lockstep,
        requests=len(answers), refused=run.refused, duration_s=span, real_s=real_s, output_tokens=tokens,
        throughput_tokens_per_s=tokens / span if span > 0 else 0.0,
        sustained_tokens_per_s=recorder.window_tokens / (end - begin) if end > begin else 0.0,
        **_percentiles("ttft", waits), **_percentiles("tpot", paces),
        imbalance_mean=sum(imbalances) / len(imbalances), imbalance_worst=max(imbalances),
        kv_peak=max(peaks), kv_peak_mean=sum(peaks) / len(peaks),
        prefix_hit_rate=hits / prompts if prompts else 0.0, recomputed_tokens=prompts - hits,
        turns_per_s=len(answers) / span if run.sessions else 0.0,
        turns={
            name: _of_turns([one for n, one in places.items() if first <= run.arrivals[n - 1].turn <= last])
            for name, (first, last) in TURNS.items() if run.sessions
        },
        preemptions=sum(engine.preempted for engine in engines),
        barrier_share=recorder.lost_s / recorder.step_s if recorder.step_s else 0.0, steps=recorder.steps,
    )  # fmt: skip


def _waits(answers: Iterable[Answer]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([one.first - one.asked for one in answers]) * 1e3


def _of_turns(answers: list[Answer]) -> dict[str, float]:
    return {"count": float(len(answers)), **_percentiles("ttft", _waits(answers))}


def _percentiles(name: str, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, float]:
    return {
        f"{name}_p{percent}_ms": float(np.percentile(values, percent)) if len(values) else 0.0
        for percent in (50, 90, 99)
    }
