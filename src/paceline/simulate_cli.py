"""`paceline simulate`: the machines in virtual time, from a seed, with delays, losses and crashes; or on a trace."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer

from paceline.errors import ConfigError, PacelineError
from paceline.simulate.run import Options, Outcome, simulate
from paceline.traffic_cli import (
    BindFlag,
    BudgetFlag,
    DecodeFlag,
    DelayFlag,
    IntervalFlag,
    KvFlag,
    PlotFlag,
    PrefillFlag,
    RateFlag,
    RoutingFlag,
    SharedFlags,
    SlotsFlag,
    StepFlag,
    TraceFlag,
    TraceFlags,
    WarmUpFlag,
    check_binding,
    refuse_without_trace,
    run_trace,
)

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "ranks": (1, 4096),
    "front-ends": (1, 64),
    "requests": (0, 10_000_000),
    "losses": (0.0, 0.9),
    "crashes": (0, 10_000),
    "suspensions": (0, 10_000),
    "duration": (0.0, 86_400.0),
    "faults-per-second": (0.0, 1_000.0),
}
"""Flag to its least and greatest value."""

FROM_SEED = "; drawn from the seed if left out."

SeedFlag = Annotated[int, typer.Option("--seed", help="The same seed gives the same run, event for event.")]
SeedsFlag = Annotated[
    str | None, typer.Option("--seeds", metavar="A..B", help="Run these seeds until one fails; without B, for ever.")
]
RanksFlag = Annotated[int | None, typer.Option("--ranks", help=f"Ranks{FROM_SEED}")]
FrontendsFlag = Annotated[int | None, typer.Option("--front-ends", help=f"Front-ends{FROM_SEED}")]
RequestsFlag = Annotated[int | None, typer.Option("--requests", help=f"Requests that arrive{FROM_SEED}")]
LossesFlag = Annotated[float | None, typer.Option("--losses", help=f"Share of broadcasts and notices lost{FROM_SEED}")]
CrashesFlag = Annotated[int | None, typer.Option("--crashes", help=f"Crashes of any process{FROM_SEED}")]
SuspensionsFlag = Annotated[
    int | None, typer.Option("--suspensions", help=f"Suspensions, each with a resume{FROM_SEED}")
]
DurationFlag = Annotated[float | None, typer.Option("--duration", help=f"Seconds in which all this happens{FROM_SEED}")]
FaultsFlag = Annotated[
    float | None,
    typer.Option(
        "--faults-per-second",
        help="Something goes wrong so often, all the time: processes die, ranks are slow or cut off, connections end, "
        "wakes are lost, all is suspended, ranks come and go. For 60 s unless --duration says otherwise.",
    ),
]
LockstepFlag = Annotated[
    bool | None, typer.Option("--lockstep/--independent", help=f"Whether ranks run in waves{FROM_SEED}")
]
EncodeFlag = Annotated[
    bool, typer.Option("--encode/--no-encode", help="Whether messages travel as bytes; without, it is faster.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object a run in place of text.")]


def simulate_command(
    seed: SeedFlag = 0, seeds: SeedsFlag = None, ranks: RanksFlag = None, frontends: FrontendsFlag = None,
    requests: RequestsFlag = None, losses: LossesFlag = None, crashes: CrashesFlag = None,
    suspensions: SuspensionsFlag = None, faults_per_second: FaultsFlag = None, duration: DurationFlag = None,
    lockstep: LockstepFlag = None, encode: EncodeFlag = True, json: JsonFlag = False,
    trace: TraceFlag = None, routing: RoutingFlag = None, bind: BindFlag = None, rate_scale: RateFlag = None,
    slots: SlotsFlag = None, token_budget: BudgetFlag = None, kv_tokens: KvFlag = None, step_ms: StepFlag = None,
    prefill_ms: PrefillFlag = None, decode_ms: DecodeFlag = None, delay_ms: DelayFlag = None,
    interval_ms: IntervalFlag = None, warm_up: WarmUpFlag = None, plot: PlotFlag = None,
) -> None:  # fmt: skip
    """Run the real machines in virtual time and check the invariants at every event; or, with --trace, measure."""
    late_binding = None if bind is None else bind == "broker"
    options = Options(
        seed, ranks, frontends, requests, losses, crashes, suspensions, duration, lockstep, encode, late_binding,
        faults_per_second,
    )  # fmt: skip
    flags = TraceFlags(
        trace, routing, bind if trace is not None else None, rate_scale, slots, token_budget, kv_tokens, step_ms,
        prefill_ms, decode_ms, delay_ms, interval_ms, warm_up, plot,
    )  # fmt: skip
    failed = False
    try:
        if trace is not None:
            _refuse_faults(options, seeds)
            run_trace(flags, SharedFlags(seed, ranks, frontends, requests, lockstep), json)
        else:
            refuse_without_trace(flags)
            check_binding(bind)
            _check(options)
            chosen = _read_seeds(seeds) if seeds is not None else iter([seed])
            failed = run_seeds(options, chosen, json, seeds is not None)
    except PacelineError as error:
        typer.echo(f"paceline: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def run_seeds(options: Options, seeds: Iterator[int], as_json: bool, many: bool) -> bool:
    """Run each seed and print what came of it, a line each for `many`; returns whether one failed, the last one run."""
    count = events = 0
    try:
        for seed in seeds:
            outcome = simulate(msgspec.structs.replace(options, seed=seed))
            count, events = count + 1, events + outcome.events
            if as_json:
                typer.echo(msgspec.json.encode(outcome).decode())
            elif not many or not outcome.ok:
                typer.echo(summary(outcome))
            elif count % 100 == 0:
                typer.echo(f"{count} seeds pass, the last {seed}; {events:,} events")
            if not outcome.ok:
                typer.echo(f"replay: {replay(options, seed)}", err=as_json)
                return True
    finally:
        if many and not as_json:
            typer.echo(f"{count} seeds run, {events:,} events")
    return False


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(help="Run the machines in virtual time, from a seed, with delays, losses and crashes.")(simulate_command)


def summary(outcome: Outcome) -> str:
    """What came of a run, for a person."""
    options = outcome.options
    kind = "lockstep" if options.lockstep else "independent"
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.refused.items()))
    faults = ", ".join(f"{count} {kind}" for kind, count in outcome.faults.items()) or "none"
    lines = [
        f"seed {options.seed}: {options.ranks} {kind} ranks, {options.frontends} front-ends,"
        f" {options.requests} requests in {options.duration:g} s, {options.losses:.0%} of broadcasts lost",
        f"  binding       {'late_binding' if options.late_binding else 'at arrival'}",
        f"  events        {outcome.events:,}; {outcome.virtual_s:.1f} s of virtual time in {outcome.real_s:.1f} s",
        f"  requests      {outcome.requests}: {outcome.finished} finished, {outcome.aborted} aborted by clients,"
        f" {sum(outcome.refused.values())} refused{f' ({refused})' if refused else ''};"
        f" {outcome.moved} went on at another rank",
        f"  longest wait  {outcome.longest_wait_s:.3f} s for a first token",
        f"  waves         {outcome.waves}; {outcome.wakes} wakes sent, {outcome.wakes_repeated} of them repeats",
        f"  faults        {faults}",
        f"  digest        {outcome.digest}",
        f"  verdict       {outcome.verdict}",
    ]
    if not outcome.ok:
        lines.append(f"broken at event {outcome.event}, {outcome.virtual_s:.6f} s; the last events there:")
        lines += outcome.history
    return "\n".join(lines)


def replay(options: Options, seed: int) -> str:
    """The command line that runs this seed again: what was given, the rest is drawn anew from it."""
    words = ["paceline", "simulate", "--seed", str(seed)]
    for name in (
        "ranks",
        "frontends",
        "requests",
        "losses",
        "crashes",
        "suspensions",
        "faults_per_second",
        "duration",
    ):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.lockstep is not None:
        words.append("--lockstep" if options.lockstep else "--independent")
    if options.late_binding is not None:
        words += ["--bind", "broker" if options.late_binding else "arrival"]
    if not options.encode:
        words.append("--no-encode")
    return shlex.join(words)


def _check(options: Options) -> None:
    for flag, (least, greatest) in RANGES.items():
        value = getattr(options, flag.replace("-", "_"))
        if value is not None and not least <= value <= greatest:
            raise ConfigError(f"--{flag}: must be between {least} and {greatest}, not {value}")


def _refuse_faults(options: Options, seeds: str | None) -> None:
    for name in ("losses", "crashes", "suspensions", "faults_per_second", "duration"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name}: not with --trace, which measures a run without faults")
    if seeds is not None:
        raise ConfigError("--seeds: not with --trace; --seed says which front-end a request comes to")


def _read_seeds(text: str) -> Iterator[int]:
    first, dots, last = text.partition("..")
    if not dots or not first.isdecimal() or (last and not last.isdecimal()):
        raise ConfigError(f"--seeds: {text!r} is not like 0..999")
    if last and int(last) < int(first):
        raise ConfigError(f"--seeds: {text!r} ends before it begins")
    return _count(int(first), int(last) if last else None)


def _count(first: int, last: int | None) -> Iterator[int]:
    seed = first
    while last is None or seed <= last:
        yield seed
        seed += 1
