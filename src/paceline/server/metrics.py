"""`GET /metrics`: what Prometheus is told, at any front-end for the whole deployment.

Two kinds of figures. What is the case now (requests that run and wait, KV memory, the wave, who is missing) every
front-end knows of all ranks, and says as it believes it. What has happened (tokens, latencies, refusals) each front-end
knows of its own requests alone: those are added up over files in the deployment's folder, which prometheus-client keeps
a process and reads together. The files outlive their process, so counters grow on where a front-end is started again,
and nothing is counted twice.

Names and labels are vLLM's for what vLLM has, so that its dashboards and autoscalers work unchanged, and `paceline_…`
for the rest.

A streamed token must cost next to nothing: tokens and the gaps between them are counted a step of a rank at a time, in
plain numbers, and put into the files once a second. A gap is that between two steps with tokens for this front-end:
where a request sits one out, it is counted with the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from bisect import bisect_left
from collections import Counter as Count
from collections.abc import Callable, Iterator
from typing import Any, get_args

from paceline.core.frontend.events import RefusalReason
from paceline.core.frontend.timeline import Choice, Step
from paceline.net.links import refused_connections
from paceline.process.ends import restarts
from paceline.server.node_figures import Once, Queued
from paceline.server.scrape import Scrape

logger = logging.getLogger("paceline.front-end")

# Read by prometheus-client when it is imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
FLUSH_S = 1.0

FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                    80.0)  # fmt: skip
REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
             960.0, 1920.0, 7680.0)  # fmt: skip
"""Bounds of vLLM's buckets."""
PAUSE_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
CAUSES: dict[str, str] = {
    "it could not be reached": "unreachable", "its connection ended": "disconnected", "it has ended": "ended",
    "it hangs in a step": "hung",
}  # fmt: skip
"""Why a request has moved, as a label."""


def harmless(count: Callable[..., None]) -> Callable[..., None]:
    """A request never fails for its being counted: where a cleaner has removed the folder it is made again."""

    @functools.wraps(count)
    def counted(self: Metrics, *arguments: Any) -> None:
        try:
            count(self, *arguments)
        except OSError as error:
            logger.warning("metrics: a figure is lost: %s", error)
            with contextlib.suppress(OSError):
                os.makedirs(self.folder, exist_ok=True)

    return counted


class Metrics:
    """What one front-end counts, and what it says when it is asked. `folder`: the deployment's, for all its front-ends.

    One in a process: prometheus-client has one folder. `machine`: the front-end's; `started`: by the monotonic clock.
    """

    def __init__(self, folder: str, machine: Any, model: str) -> None:
        os.environ[FOLDER_VARIABLE] = self.folder = folder
        os.makedirs(folder, exist_ok=True)
        import prometheus_client

        self._library: Any = prometheus_client
        self._scrape = Scrape(folder)
        self._machine = machine
        self._model = model
        self._last: dict[int, float] = {}
        """When each rank's last tokens came."""
        self._tokens: Count[int] = Count()
        self._gaps: dict[int, list[float]] = {}
        """By rank, how many gaps fell into each bucket, and behind them their sum."""
        self._flush_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.lag_s = 0.0
        self._viewed = time.monotonic()
        self._name_of: Callable[[int], str] = str
        self._queued = Queued(folder, set())
        self._pauses = Once(folder, "pause")
        self._paused_at: float | None = None
        self._make()

    def _make(self) -> None:
        library, labels = self._library, ("model_name", "engine")

        def counter(name: str, text: str, *names: str) -> Any:
            return library.Counter(name, text, names, registry=None)

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Any:
            return library.Histogram(name, text, labels, registry=None, buckets=bounds)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.", *labels)
        self._made_tokens = counter("vllm:generation_tokens", "Tokens made.", *labels)
        self._cached = counter("vllm:prefix_cache_hits", "Tokens of prompts whose KV was there.", *labels)
        self._queries = counter("vllm:prefix_cache_queries", "Tokens of prompts that were looked for.", *labels)
        ended = (*labels, "finished_reason")
        self._success = counter("vllm:request_success", "Requests answered, by why they ended.", *ended)
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", BETWEEN_TOKENS_S)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_S)
        self._queue = histogram("vllm:request_queue_time_seconds", "From arrival to a rank.", REQUEST_S)
        self._refused = counter("paceline_requests_refused", "Requests refused, by why.", "reason")
        moved = "Requests that went on at another rank, by what the one before did."
        self._moved = counter("paceline_requests_moved", moved, "model_name", "cause")
        text = "How long the deployment was paused, each time."
        self._pause_s = library.Histogram("paceline_pause_seconds", text, (), registry=None, buckets=PAUSE_S)
        self._count_from_nought()

    @harmless
    def _count_from_nought(self) -> None:
        """A rule sees a counter grow only where it was there before: the first refusal is to be one."""
        for reason in get_args(RefusalReason):
            self._refused.labels(reason).inc(0)
        for cause in CAUSES.values():
            self._moved.labels(self._model, cause).inc(0)

    def told_of_tenants(self, name_of: Callable[[int], str], always: set[str]) -> None:
        """What they are called, and who is shown also while nobody of theirs waits."""
        self._name_of, self._queued = name_of, Queued(self.folder, always)

    # What happens -------------------------------------------------------------------------------

    @harmless
    def placed(self, rank: int, waited_s: float) -> None:
        self._queue.labels(self._model, rank).observe(waited_s)

    @harmless
    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    @harmless
    def aborted(self, rank: int) -> None:
        self._success.labels(self._model, max(0, rank), "abort").inc()

    def viewed(self, now: float) -> None:
        """The coordinator has said how all ranks are."""
        self._viewed = now
        number = self._machine.suspension.number
        if number % 2:
            self._paused_at = self._paused_at or now
        elif self._paused_at is not None:
            self._resumed(number, now - self._paused_at)
            self._paused_at = None

    @harmless
    def _resumed(self, number: int, seconds: float) -> None:
        # All front-ends see it; whoever has come amid the pause does not know how long it was.
        if self._pauses.first(number):
            self._pause_s.observe(seconds)

    @harmless
    def moved(self, why: str) -> None:
        self._moved.labels(self._model, CAUSES[why]).inc()

    @harmless
    def stepped(self, step: Step, now: float) -> None:
        """One step's outputs of one rank."""
        rank = step.rank
        for choice in step.began:
            self._begin(choice, now)
        for choice in step.ended:
            self._whole.labels(self._model, choice.rank).observe(now - choice.submitted)
            self._success.labels(self._model, choice.rank, choice.reason).inc()
        if rank < 0:
            return
        last, self._last[rank] = self._last.get(rank, now), now
        self._tokens[rank] += step.tokens
        if step.going_on:
            gaps = self._gaps.get(rank)
            if gaps is None:
                gaps = self._gaps[rank] = [0.0] * (len(BETWEEN_TOKENS_S) + 2)
            gaps[bisect_left(BETWEEN_TOKENS_S, now - last)] += step.going_on
            gaps[-1] += step.going_on * (now - last)
        if now >= self._flush_at:
            self._arrange_flush(now)

    def _begin(self, choice: Choice, now: float) -> None:
        labels = (self._model, choice.rank)
        self._first.labels(*labels).observe(now - choice.submitted)
        self._prompt_tokens.labels(*labels).inc(choice.prompt)
        self._queries.labels(*labels).inc(choice.prompt)
        self._cached.labels(*labels).inc(choice.cached)

    def _arrange_flush(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.flush()
        self._flush_at = now + FLUSH_S
        # What comes before that is put down then, also where nothing comes behind it.
        self._timer = asyncio.get_running_loop().call_later(2 * FLUSH_S, self.flush)

    @harmless
    def flush(self) -> None:
        """Put down what was counted in plain numbers."""
        for rank, made in self._tokens.items():
            self._made_tokens.labels(self._model, rank).inc(made)
        self._tokens.clear()
        for rank, gaps in self._gaps.items():
            child = self._between.labels(self._model, rank)
            # A histogram takes one value at a time; these are hundreds a step.
            for bucket, count in zip(child._buckets, gaps, strict=False):
                if count:
                    bucket.inc(count)
            child._sum.inc(gaps[-1])
        self._gaps.clear()

    # What is said -------------------------------------------------------------------------------

    def text(self) -> tuple[bytes, str]:
        """All figures in Prometheus' format, and its content type."""
        self.flush()
        registry = self._library.CollectorRegistry()
        registry.register(_Now(self))
        now: bytes = self._library.generate_latest(registry)
        return self._scrape.text() + now, self._library.CONTENT_TYPE_LATEST

    def gauges(self) -> Iterator[Any]:
        """What is the case now."""
        from prometheus_client.core import CounterMetricFamily as Counted, GaugeMetricFamily as Gauge

        machine, labels = self._machine, ["model_name", "engine"]
        running = Gauge("vllm:num_requests_running", "Requests that run.", labels=labels)
        waiting = Gauge("vllm:num_requests_waiting", "Requests that wait at their rank.", labels=labels)
        usage = Gauge("vllm:kv_cache_usage_perc", "Used share of the KV memory, 0 to 1.", labels=labels)
        own = Gauge("paceline_requests_in_flight", "This front-end's own.", labels=labels)
        text = "Requests that front-ends may send there without asking."
        credits, given = Gauge("paceline_credits", text, labels=labels), machine.given()
        text = "Prompt tokens that a lockstep step computes at most."
        quota = Gauge("paceline_prefill_quota_tokens", text, labels=labels)
        for load in machine.loads():
            of = [self._model, str(load["rank"])]
            running.add_metric(of, load["running"])
            waiting.add_metric(of, load["waiting"])
            usage.add_metric(of, load["kv_used"] / load["kv_total"] if load["kv_total"] else 0.0)
            own.add_metric(of, load["in_flight"])
            credits.add_metric(of, given.get(load["rank"], 0))
            if load["prefill_quota"] is not None:
                quota.add_metric(of, load["prefill_quota"])
        yield from (running, waiting, usage, own, credits, quota, self._by_tenant(), self._weights())
        said, pause = machine.statistics(), machine.suspension
        scaling = machine.scaling
        figures = {
            "queue_length": ("Requests that wait before all ranks.", said["queued"]),
            "ranks_ready": ("Ranks that serve.", len(said["ready"])),
            "ranks_missing": ("Ranks that should serve and do not.", len(said["missing"])),
            "ranks_stalled": ("Ranks that hold the others up, or do not return from a step.", len(machine.stalls)),
            "wave": ("The wave of lockstep ranks.", said["wave"]),
            "wave_running": ("Whether they run.", said["running"]),
            "epoch": ("The group of lockstep ranks: another with each that is lost or comes.", machine.epoch),
            "paused": ("Whether the deployment is asked to pause.", pause.number % 2),
            "scaling": ("Whether it is being scaled.", scaling is not None and scaling.under_way),
            "view_age_seconds": (
                "Since the coordinator last said how the ranks are; it does so at least every 4 s.",
                time.monotonic() - self._viewed,
            ),
            "void_messages": ("Messages of lives that have ended.", said["void_messages"]),
            "event_loop_lag_seconds": ("How late this front-end's last timer was.", self.lag_s),
        }
        for name, (text, value) in figures.items():
            yield Gauge(f"paceline_{name}", text, value=float(value))
        text = "Connections to this node's processes that did not have the secret."
        yield Counted("paceline_refused_connections", text, value=float(refused_connections(self.folder)))
        text = "Processes of this node that were started again, by how they had ended."
        again = Counted("paceline_restarts", text, labels=["process", "cause"])
        for of_kind, count in restarts(self.folder).items():
            again.add_metric(of_kind, count)
        yield again

    def _waiting_here(self) -> dict[str, int]:
        found: Count[str] = Count()
        for tenant, count in self._machine.held_of().items():
            found[self._name_of(tenant)] += count
        return dict(found)

    def _by_tenant(self) -> Any:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        text = "Requests that wait before all ranks at this node's front-ends, by whose they are."
        queue = Gauge("paceline_tenant_queue_length", text, labels=["tenant"])
        for tenant, count in self._queued.all(self._waiting_here()).items():
            queue.add_metric([tenant], count)
        return queue

    def _weights(self) -> Any:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        text, weights = "1 for the version of the weights that all ranks have.", self._machine.weights
        info = Gauge("paceline_weights_info", text, labels=["model_name", "version"])
        info.add_metric([self._model, "" if weights is None else weights.version], 1)
        return info

    def beat(self, due: float = 0.0) -> None:
        """Measure from now on how late timers are."""
        now = time.monotonic()
        self.lag_s = max(0.0, now - due) if due else 0.0
        self._queued.put(self._waiting_here())
        asyncio.get_running_loop().call_later(FLUSH_S, self.beat, now + FLUSH_S)


class _Now:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        return self._metrics.gauges()
