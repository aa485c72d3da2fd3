"""`paceline simulate`: the machines in virtual time, from a seed, with delays, losses and crashes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Annotated

import msgspec
import typer

from paceline.errors import ConfigError, PacelineError
from paceline.simulate.run import Options, Outcome, simulate

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "ranks": (1, 4096),
    "front-ends": (1, 64),
    "requests": (0, 10_000_000),
    "losses": (0.0, 0.9),
    "crashes": (0, 10_000),
    "suspensions": (0, 10_000),
    "duration": (0.0, 86_400.0),
}
"""Flag to its least and greatest value."""

FROM_SEED = "; drawn from the seed if left out."

SeedFlag = Annotated[int, typer.Option("--seed", help="The same seed gives the same run, event for event.")]
SeedsFlag = Annotated[
    str | None, typer.Option("--seeds", metavar="A..B", help="Run these seeds until one fails; without B, for ever.")
]
RanksFlag = Annotated[int | None, typer.Option("--ranks", help=f"Ranks{FROM_SEED}")]
FrontEndsFlag = Annotated[int | None, typer.Option("--front-ends", help=f"Front-ends{FROM_SEED}")]
RequestsFlag = Annotated[int | None, typer.Option("--requests", help=f"Requests that arrive{FROM_SEED}")]
LossesFlag = Annotated[float | None, typer.Option("--losses", help=f"Share of broadcasts and notices lost{FROM_SEED}")]
CrashesFlag = Annotated[int | None, typer.Option("--crashes", help=f"Crashes of any process{FROM_SEED}")]
SuspensionsFlag = Annotated[
    int | None, typer.Option("--suspensions", help=f"Suspensions, each with a resume{FROM_SEED}")
]
DurationFlag = Annotated[float | None, typer.Option("--duration", help=f"Seconds in which all this happens{FROM_SEED}")]
LockstepFlag = Annotated[
    bool | None, typer.Option("--lockstep/--independent", help=f"Whether ranks run in waves{FROM_SEED}")
]
EncodeFlag = Annotated[
    bool, typer.Option("--encode/--no-encode", help="Whether messages travel as bytes; without, it is faster.")
]
TraceFlag = Annotated[
    str | None, typer.Option("--trace", help="A file of real arrivals (.csv or .jsonl) in place of drawn ones.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object a run in place of text.")]


def simulate_command(
    seed: SeedFlag = 0,
    seeds: SeedsFlag = None,
    ranks: RanksFlag = None,
    front_ends: FrontEndsFlag = None,
    requests: RequestsFlag = None,
    losses: LossesFlag = None,
    crashes: CrashesFlag = None,
    suspensions: SuspensionsFlag = None,
    duration: DurationFlag = None,
    lockstep: LockstepFlag = None,
    encode: EncodeFlag = True,
    trace: TraceFlag = None,
    json: JsonFlag = False,
) -> None:
    """Run the real machines in virtual time and check the invariants at every event."""
    options = Options(
        seed, ranks, front_ends, requests, losses, crashes, suspensions, duration, lockstep, encode, trace
    )
    try:
        _check(options)
        failed = run_seeds(options, _read_seeds(seeds) if seeds is not None else iter([seed]), json, seeds is not None)
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
    arrive = f"of {options.trace}" if options.trace else f"in {options.duration:g} s"
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.refused.items()))
    faults = ", ".join(f"{count} {kind}" for kind, count in outcome.faults.items()) or "none"
    lines = [
        f"seed {options.seed}: {options.ranks} {kind} ranks, {options.front_ends} front-ends,"
        f" {options.requests} requests {arrive}, {options.losses:.0%} of broadcasts lost",
        f"  events        {outcome.events:,}; {outcome.virtual_s:.1f} s of virtual time in {outcome.real_s:.1f} s",
        f"  requests      {outcome.requests}: {outcome.finished} finished, {outcome.aborted} aborted by clients,"
        f" {sum(outcome.refused.values())} refused{f' ({refused})' if refused else ''}",
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
    for name in ("ranks", "front_ends", "requests", "losses", "crashes", "suspensions", "duration", "trace"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.lockstep is not None:
        words.append("--lockstep" if options.lockstep else "--independent")
    if not options.encode:
        words.append("--no-encode")
    return shlex.join(words)


def _check(options: Options) -> None:
    for flag, (least, greatest) in RANGES.items():
        value = getattr(options, flag.replace("-", "_"))
        if value is not None and not least <= value <= greatest:
            raise ConfigError(f"--{flag}: must be between {least} and {greatest}, not {value}")


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
