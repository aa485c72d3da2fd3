"""`paceline simulate --trace`: how fast a deployment would serve a trace, by which way to choose ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from msgspec import Struct

from paceline.core.routing import POLICIES
from paceline.core.routing.policy import Policy
from paceline.engines.registry import PolicyError, find_policy
from paceline.engines.timed import CostModel
from paceline.errors import ConfigError
from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.ours import Links
from paceline.simulate.traffic.outcome import Outcome
from paceline.simulate.traffic.plot import check_plotting, plot
from paceline.simulate.traffic.run import Deployment, Run, routing_names
from paceline.simulate.traffic.trace import faster, read_trace

Value = TypeVar("Value")

PANEL = "With --trace"
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "ranks": (1, 4096),
    "front-ends": (1, 64),
    "requests": (1, 10_000_000),
    "rate-scale": (1e-6, 1e6),
    "slots": (1, 65_536),
    "token-budget": (1, 1_048_576),
    "kv-tokens": (1, 1 << 40),
    "step-ms": (0.001, 1e6),
    "prefill-ms": (0.0, 1e6),
    "decode-ms": (0.0, 1e6),
    "delay-ms": (0.0, 10_000.0),
    "interval-ms": (1.0, 60_000.0),
    "warm-up": (0.0, 0.9),
}
"""Flag to its least and greatest value."""

TraceFlag = Annotated[
    str | None,
    typer.Option(
        "--trace", rich_help_panel=PANEL,
        help="Measure instead of testing: serve this file of real requests (.csv or .jsonl) without a fault.",
    ),
]  # fmt: skip
RoutingFlag = Annotated[
    str | None,
    typer.Option(
        "--routing", rich_help_panel=PANEL,
        help=f"Which rank gets a request: {', '.join(routing_names())}, or module:Class; least-load if left out.",
    ),
]  # fmt: skip
BindFlag = Annotated[
    str | None,
    typer.Option(
        "--bind",
        help="broker: requests wait until a rank can start them (least-load; its default); arrival: bound at once. "
        "Drawn from the seed if left out without --trace.",
    ),
]  # fmt: skip
RateFlag = Annotated[
    float | None, typer.Option("--rate-scale", rich_help_panel=PANEL, help="So many times as many requests a second.")
]
SlotsFlag = Annotated[
    int | None, typer.Option("--slots", rich_help_panel=PANEL, help="Requests that run at once on a rank: 64.")
]
BudgetFlag = Annotated[
    int | None, typer.Option("--token-budget", rich_help_panel=PANEL, help="Tokens of a step: 2048.")
]
KvFlag = Annotated[
    int | None, typer.Option("--kv-tokens", rich_help_panel=PANEL, help="Tokens of a rank's KV memory: 131072.")
]
StepFlag = Annotated[
    float | None, typer.Option("--step-ms", rich_help_panel=PANEL, help="What a step costs in any case: 6.")
]
PrefillFlag = Annotated[
    float | None, typer.Option("--prefill-ms", rich_help_panel=PANEL, help="And for each prompt token: 0.09.")
]
DecodeFlag = Annotated[
    float | None, typer.Option("--decode-ms", rich_help_panel=PANEL, help="And for each request that decodes: 0.02.")
]
DelayFlag = Annotated[
    float | None, typer.Option("--delay-ms", rich_help_panel=PANEL, help="How long a message is on its way: 0.2.")
]
IntervalFlag = Annotated[
    float | None, typer.Option("--interval-ms", rich_help_panel=PANEL, help="Least time between two load views: 100.")
]
WarmUpFlag = Annotated[
    float | None,
    typer.Option("--warm-up", rich_help_panel=PANEL, help="Share of the time that counts for no latency: 0."),
]
PlotFlag = Annotated[
    str | None, typer.Option("--plot", rich_help_panel=PANEL, help="Draw the run into this file (needs matplotlib).")
]


class TraceFlags(Struct, frozen=True):
    """What was typed; None where it was left out."""

    trace: str | None = None
    routing: str | None = None
    bind: str | None = None
    rate_scale: float | None = None
    slots: int | None = None
    token_budget: int | None = None
    kv_tokens: int | None = None
    step_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    delay_ms: float | None = None
    interval_ms: float | None = None
    warm_up: float | None = None
    plot: str | None = None


class SharedFlags(Struct, frozen=True):
    """Those that mean something without a trace too."""

    seed: int = 0
    ranks: int | None = None
    frontends: int | None = None
    requests: int | None = None
    lockstep: bool | None = None


def refuse_without_trace(flags: TraceFlags) -> None:
    """Raises ConfigError naming a flag that needs a trace, where one was given."""
    for name in flags.__struct_fields__:
        if getattr(flags, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: only with --trace")


def run_trace(flags: TraceFlags, shared: SharedFlags, as_json: bool) -> None:
    """Serve the trace and print the figures. Raises ConfigError naming the flag, or the file and line."""
    _check(flags, shared)
    deployment = _deployment(flags, shared)
    if flags.plot is not None:
        check_plotting()
    arrivals = read_trace(Path(flags.trace or ""))[: shared.requests]
    run = Run(deployment, faster(arrivals, _given(flags.rate_scale, 1.0)))
    with _progress() as progress:
        outcome = run.run(progress)
    typer.echo(msgspec.json.encode(outcome).decode() if as_json else summary(outcome))
    if flags.plot is not None:
        plot(run, outcome, Path(flags.plot))


def summary(outcome: Outcome) -> str:
    """The figures, for a person."""
    kind = "lockstep" if outcome.lockstep else "independent"
    refused = f", {outcome.refused} too large for the memory left out" if outcome.refused else ""
    lines = [
        f"{outcome.routing}: {outcome.ranks} {kind} ranks, {outcome.frontends} front-ends",
        f"  requests          {outcome.requests:,}{refused}; {outcome.duration_s:,.1f} s of virtual time in"
        f" {outcome.real_s:.1f} s",
        f"  throughput        {outcome.throughput_tokens_per_s:,.0f} output tokens/s",
        f"  first token       p50 {outcome.ttft_p50_ms:,.1f} ms, p90 {outcome.ttft_p90_ms:,.1f} ms,"
        f" p99 {outcome.ttft_p99_ms:,.1f} ms",
        f"  each token after  p50 {outcome.tpot_p50_ms:,.1f} ms, p90 {outcome.tpot_p90_ms:,.1f} ms,"
        f" p99 {outcome.tpot_p99_ms:,.1f} ms",
        f"  imbalance         {outcome.imbalance_mean:.2f} mean, {outcome.imbalance_worst:.2f} worst",
        f"  KV memory         {outcome.kv_peak:.0%} at most, {outcome.kv_peak_mean:.0%} the mean rank's peak;"
        f" {outcome.preemptions} requests pushed out",
        f"  prefix cache      {outcome.prefix_hit_rate:.1%} of prompt tokens found",
    ]
    if outcome.lockstep:
        lines.append(f"  barrier           {outcome.barrier_share:.1%} of step time lost")
    return "\n".join(lines)


def _deployment(flags: TraceFlags, shared: SharedFlags) -> Deployment:
    routing = _given(flags.routing, "least-load")
    policy: type[Policy] | None = None
    if routing not in routing_names():
        try:
            policy = find_policy(routing)
        except PolicyError as error:
            known = ", ".join(name for name in routing_names() if name not in POLICIES)
            raise ConfigError(f"--routing: {error}; or {known}") from None
    costs, shape, links = CostModel(), EngineShape(), Links()
    costs = CostModel(
        _given(flags.step_ms, costs.step_ms), _given(flags.prefill_ms, costs.prefill_ms),
        _given(flags.decode_ms, costs.decode_ms),
    )  # fmt: skip
    shape = EngineShape(
        costs, _given(flags.slots, shape.slots), _given(flags.token_budget, shape.budget),
        _given(flags.kv_tokens, shape.kv_tokens),
    )  # fmt: skip
    delay_s, interval_s = _given(flags.delay_ms, links.delay_s * 1e3) / 1e3, links.interval_s
    links = Links(delay_s, _given(flags.interval_ms, interval_s * 1e3) / 1e3)
    return Deployment(
        _given(shared.ranks, 8), _given(shared.frontends, 1), bool(shared.lockstep), routing, policy, shape, links,
        shared.seed, _given(flags.warm_up, 0.0), bind=_binding(flags.bind, routing),
    )  # fmt: skip


def check_binding(bind: str | None) -> None:
    """Raises ConfigError where it is neither of the two."""
    if bind not in (None, "broker", "arrival"):
        raise ConfigError(f"--bind: must be broker or arrival, not {bind!r}")


def _binding(bind: str | None, routing: str) -> str:
    check_binding(bind)
    if bind is not None and routing != "least-load":
        raise ConfigError(f"--bind: {routing} chooses the rank itself, when a request arrives")
    return bind or "broker"


def _given(value: Value | None, otherwise: Value) -> Value:
    return otherwise if value is None else value


def _check(flags: TraceFlags, shared: SharedFlags) -> None:
    for flag, (least, greatest) in RANGES.items():
        name = flag.replace("-", "_")
        value = getattr(flags, name, None) if hasattr(flags, name) else getattr(shared, name)
        if value is not None and not least <= value <= greatest:
            raise ConfigError(f"--{flag}: must be between {least:g} and {greatest:g}, not {value:g}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("simulating"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, count: bars.update(task, completed=done, total=count)
