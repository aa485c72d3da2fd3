"""`paceline simulate`: the machines in virtual time, from a seed, with delays, losses and crashes; or on a trace."""

from __future__ import annotations

import inspect
import itertools
import shlex
from collections.abc import Callable, Iterable, Sized
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct

from paceline.console import Progress, status_line
from paceline.core.routing import POLICIES
from paceline.engines.registry import PolicyError, find_policy
from paceline.engines.timed import CostModel
from paceline.errors import ConfigError, PacelineError
from paceline.report import check_writable, write
from paceline.settings import QUEUED_ROUTING
from paceline.sim import outcome as traced
from paceline.sim.engine import EngineShape
from paceline.sim.replay import Replay, Setup
from paceline.sim.run import Options, Outcome, simulate
from paceline.sim.trace import SESSION_BLOCK_TOKENS, Arrival, Sessions, faster, read_sessions, read_trace
from paceline.simulate_report import Lanes, Ran, report


class Flag(Struct, frozen=True):
    """A flag: its type, what it says of itself, its least and greatest value. `name`: where it is not the usual one.

    `drawn`: whether the seed says what it is where it is left out.
    """

    kind: type
    help: str
    least: float | None = None
    greatest: float | None = None
    default: object = None
    drawn: bool = False
    name: str | None = None
    metavar: str | None = None


FAULTS = {
    "seed": Flag(int, "The same seed gives the same run, event for event.", 0, 2**63 - 1, 0),
    "seeds": Flag(str, "Run these seeds until one fails; without B, for ever.", metavar="A..B"),
    "ranks": Flag(int, "Ranks", 1, 4096, drawn=True),
    "frontends": Flag(int, "Front-ends", 1, 64, drawn=True, name="--front-ends"),
    "requests": Flag(int, "Requests that arrive", 0, 10_000_000, drawn=True),
    "losses": Flag(float, "Share of broadcasts and notices lost", 0.0, 0.9, drawn=True),
    "crashes": Flag(int, "Crashes of any process", 0, 10_000, drawn=True),
    "suspensions": Flag(int, "Suspensions, each with a resume", 0, 10_000, drawn=True),
    "faults_per_second": Flag(
        float,
        "Something goes wrong so often, all the time: processes die, ranks are slow or cut off, connections end, wakes "
        "are lost, all is suspended, ranks come and go. For 60 s unless --duration says otherwise.",
        0.0, 1_000.0,
    ),
    "duration": Flag(float, "Seconds in which all this happens", 0.0, 86_400.0, drawn=True),
    "lockstep": Flag(bool, "Whether ranks run in waves", drawn=True, name="--lockstep/--independent"),
    "encode": Flag(
        bool, "Whether messages travel as bytes; without, it is faster.", default=True, name="--encode/--no-encode"
    ),
    "json": Flag(bool, "One JSON object a run in place of text.", default=False, name="--json"),
    "bind": Flag(
        str,
        "late: requests wait until a rank can start them (sticky, least-load; their default); arrival: bound at once. "
        "Drawn from the seed if left out without --trace.",
    ),
}  # fmt: skip
TRACE = {
    "trace": Flag(
        str, "Measure instead of testing: serve this file of real requests (.csv or .jsonl) without a fault."
    ),
    "routing": Flag(
        str,
        f"Which rank gets a request: {', '.join(POLICIES)}, or module:Class; sticky if left out. Several with commas: "
        "one run of each.",
    ),
    "report": Flag(str, "Write a page of the runs: lanes, histograms, figures side by side.", metavar="FILE.html"),
    "sessions": Flag(int, "Of a trace of sessions: so many at once, each followed by the next.", 1, 100_000),
    "session_rate": Flag(float, "Or so many begin a second, at random moments.", 1e-6, 1e6),
    "max_think": Flag(float, "No turn comes later than so many seconds after the answer before.", 0.0, 1e9),
    "rate_scale": Flag(float, "So many times as many requests a second.", 1e-6, 1e6),
    "slots": Flag(int, "Requests that run at once on a rank: 64.", 1, 65_536),
    "token_budget": Flag(int, "Tokens of a step: 2048.", 1, 1_048_576),
    "kv_tokens": Flag(int, "Tokens of a rank's KV memory: 131072; with sessions 1048576.", 1, 1 << 40),
    "step_ms": Flag(float, "What a step costs in any case: 6.", 0.001, 1e6),
    "prefill_ms": Flag(float, "And for each prompt token: 0.09.", 0.0, 1e6),
    "decode_ms": Flag(float, "And for each request that decodes: 0.02.", 0.0, 1e6),
    "delay_ms": Flag(float, "How long a message is on its way: 0.2.", 0.0, 10_000.0),
    "interval_ms": Flag(float, "Least time between two load views: 100.", 1.0, 60_000.0),
    "warm_up": Flag(float, "Share of the time that counts for no latency: 0.", 0.0, 0.9),
}
SESSION_KV_TOKENS = 1_048_576
NOT_WITH_TRACE = ("losses", "crashes", "suspensions", "faults_per_second", "duration")
Given = dict[str, Any]
"""What was typed, by flag; None where it was left out."""


def command(flags: dict[str, Flag], panel: Iterable[str], run: Callable[[Given], None], help_text: str) -> typer.Typer:
    """A command with these flags, of which those of `panel` are shown apart; ConfigErrors end it with status 2."""

    def called(**given: Any) -> None:
        try:
            for name, flag in flags.items():
                _check_range(name, flag, given[name])
            run(given)
        except PacelineError as error:
            typer.echo(f"paceline: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    kept = inspect.Parameter.KEYWORD_ONLY
    called.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(name, kept, default=flag.default, annotation=_option(name, flag, name in panel))
        for name, flag in flags.items()
    ])  # fmt: skip
    names = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=names)
    app.command(help=help_text)(called)
    return app


def _option(name: str, flag: Flag, traced_only: bool) -> Any:
    text = f"{flag.help}; drawn from the seed if left out." if flag.drawn else flag.help
    option = typer.Option(
        flag.name or f"--{dashed(name)}", help=text, metavar=flag.metavar,
        rich_help_panel="With --trace" if traced_only else None,
    )  # fmt: skip
    return Annotated[flag.kind | None if flag.default is None else flag.kind, option]


def _check_range(name: str, flag: Flag, value: Any) -> None:
    if value is not None and flag.least is not None and not flag.least <= value <= flag.greatest:
        raise ConfigError(f"--{dashed(name)}: must be between {flag.least:g} and {flag.greatest:g}, not {value:g}")


def _check_binding(given: Given) -> None:
    """`broker` is what `late` was called first."""
    if given["bind"] not in (None, "broker", "late", "arrival"):
        raise ConfigError(f"--bind: must be late or arrival, not {given['bind']!r}")
    if given["bind"] == "broker":
        given["bind"] = "late"


def dashed(name: str) -> str:
    return name.replace("frontends", "front-ends").replace("_", "-")


def simulate_command(given: Given) -> None:
    """Run the real machines in virtual time and check the invariants at every event; or, with --trace, measure."""
    _check_binding(given)
    if given["trace"] is not None:
        run_trace(given)
        return
    for name in TRACE:
        if given[name] is not None:
            raise ConfigError(f"--{dashed(name)}: only with --trace")
    fields = [name for name in Options.__struct_fields__ if name in given]
    late_binding = None if given["bind"] is None else given["bind"] == "late"
    options = Options(**{name: given[name] for name in fields}, late_binding=late_binding)
    seeds = [options.seed] if given["seeds"] is None else _read_seeds(given["seeds"])
    if run_seeds(options, seeds, given["json"], given["seeds"] is not None):
        raise typer.Exit(1)


simulate_app = command(
    FAULTS | TRACE, TRACE, simulate_command,
    "Run the machines in virtual time, from a seed, with delays, losses and crashes.",
)  # fmt: skip


# Seeds ------------------------------------------------------------------------------------------


def run_seeds(options: Options, seeds: Iterable[int], as_json: bool, many: bool) -> bool:
    """Run each seed and print what came of it, a line each for `many`; returns whether one failed, the last one run."""
    count = events = 0
    whole = len(seeds) if isinstance(seeds, Sized) else None
    try:
        with status_line() as say:
            for seed in seeds:
                outcome = simulate(
                    msgspec.structs.replace(options, seed=seed), progress=_telling(say, seed, count, whole)
                )
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


def _telling(say: Progress, seed: int, before: int, whole: int | None) -> Callable[[float], None]:
    """Tells how far a seed is, of which so many were run `before`, of `whole` in all: None for no end."""
    return lambda share: say(f"seed {seed}", None if whole is None else (before + share) / whole)


def summary(outcome: Outcome) -> str:
    options = outcome.options
    kind = "lockstep" if options.lockstep else "independent"
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.refused.items()))
    faults = ", ".join(f"{count} {kind}" for kind, count in outcome.faults.items()) or "none"
    lines = [
        f"seed {options.seed}: {options.ranks} {kind} ranks, {options.frontends} front-ends,"
        f" {options.requests} requests in {options.duration:g} s, {options.losses:.0%} of broadcasts lost",
        f"  binding       {'late' if options.late_binding else 'at arrival'}",
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
    for name in ("ranks", "frontends", "requests", *NOT_WITH_TRACE):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{dashed(name)}", str(value)]
    if options.lockstep is not None:
        words.append("--lockstep" if options.lockstep else "--independent")
    if options.late_binding is not None:
        words += ["--bind", "late" if options.late_binding else "arrival"]
    if not options.encode:
        words.append("--no-encode")
    return shlex.join(words)


def _read_seeds(text: str) -> Iterable[int]:
    first, dots, last = text.partition("..")
    if not dots or not first.isdecimal() or (last and not last.isdecimal()):
        raise ConfigError(f"--seeds: {text!r} is not like 0..999")
    if last and int(last) < int(first):
        raise ConfigError(f"--seeds: {text!r} ends before it begins")
    return range(int(first), int(last) + 1) if last else itertools.count(int(first))


# Traces -----------------------------------------------------------------------------------------


def run_trace(given: Given, kind: Callable[..., Replay] = Replay, names: Iterable[str] = ()) -> Replay:
    """Serve the trace and print the figures. Raises ConfigError naming the flag, or the file and line.

    `kind`: what serves it. `names`: ways to choose ranks that it knows beside ours.
    """
    for name in NOT_WITH_TRACE:
        if given.get(name) is not None:
            raise ConfigError(f"--{dashed(name)}: not with --trace, which measures a run without faults")
    if given.get("seeds") is not None:
        raise ConfigError("--seeds: not with --trace; --seed says which front-end a request comes to")
    _check_binding(given)
    check_writable(given.get("report"))
    setups = [_setup(given | {"routing": name}, tuple(names)) for name in _rules(given["routing"])]
    runs: list[Ran] = []
    with status_line() as say:
        for place, setup in enumerate(setups):
            run, lanes = kind(setup, _arrivals(given, setup)), Lanes()
            run.look = lanes.look
            outcome = run.run(partial(_say_served, say, setup.routing, place, len(setups)))
            typer.echo(msgspec.json.encode(outcome).decode() if given["json"] else figures(outcome))
            runs.append(Ran(run, outcome, lanes))
    if given.get("report") is not None:
        write(given["report"], report(runs, Path(given["trace"]).name))
    return run


def _rules(routing: str | None) -> list[str]:
    """Those that are compared. Raises ConfigError."""
    found = [name.strip() for name in (routing or "sticky").split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(f"--routing: {routing!r} names nothing, or something twice")
    return found


def _say_served(say: Progress, routing: str, place: int, whole: int, done: int, count: int) -> None:
    which = f"{routing}: " if whole > 1 else ""
    say(f"{which}{done:,} of {count:,} requests served", (place + done / count) / whole)


def _arrivals(given: Given, setup: Setup) -> list[Arrival] | Sessions:
    path, at_once, rate = Path(given["trace"]), given["sessions"], given["session_rate"]
    if at_once is None and rate is None:
        return faster(read_trace(path)[: given["requests"]], given["rate_scale"] or 1.0)
    if at_once is not None and rate is not None:
        raise ConfigError("--session-rate: not with --sessions")
    if given["rate_scale"] is not None:
        raise ConfigError("--rate-scale: not with sessions, whose turns wait for answers")
    sessions = read_sessions(path)
    thinks = {} if given["max_think"] is None else {"longest_think_s": given["max_think"]}
    return Sessions(sessions, setup.engine.kv_tokens, at_once or 0, rate, setup.seed, given["requests"], **thinks)


def figures(outcome: traced.Outcome) -> str:
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
        f"  prefix cache      {outcome.prefix_hit_rate:.1%} of prompt tokens found,"
        f" {outcome.recomputed_tokens:,} computed",
    ]
    for name, ttft in outcome.turns.items():
        p50, p90, p99 = (ttft[f"ttft_p{percent}_ms"] for percent in (50, 90, 99))
        said = f"p50 {p50:,.1f} ms, p90 {p90:,.1f} ms, p99 {p99:,.1f} ms; {ttft['count']:,.0f} of them"
        lines.append(f"  turns {name:<12}{said}")
    if outcome.turns:
        lines.append(f"  turns in all      {outcome.turns_per_s:,.3f} a second")
    if outcome.lockstep:
        lines.append(f"  barrier           {outcome.barrier_share:.1%} of step time lost")
    return "\n".join(lines)


def _setup(given: Given, names: tuple[str, ...]) -> Setup:
    routing, policy = given["routing"] or "sticky", None
    if routing not in POLICIES and routing not in names:
        try:
            policy = find_policy(routing)
        except PolicyError as error:
            raise ConfigError(f"--routing: {error}{''.join(f' or {name}' for name in names)}") from None
    if given["bind"] is not None and routing not in QUEUED_ROUTING:
        raise ConfigError(f"--bind: {routing} chooses the rank itself, when a request arrives")
    costs = CostModel(**_known(given, "step_ms", "prefill_ms", "decode_ms"))
    shape = _known(given, "slots", "kv_tokens")
    if given["sessions"] is not None or given["session_rate"] is not None:
        shape = {"kv_tokens": SESSION_KV_TOKENS, "block_tokens": SESSION_BLOCK_TOKENS} | shape
    shape |= {} if given["token_budget"] is None else {"budget": given["token_budget"]}
    seconds = {f"{name[:-2]}s": value / 1e3 for name, value in _known(given, "delay_ms", "interval_ms").items()}
    kept = _known(given, "ranks", "frontends", "lockstep", "seed", "warm_up", "bind")
    return Setup(routing=routing, policy=policy, engine=EngineShape(costs, **shape), **kept, **seconds)


def _known(given: Given, *names: str) -> Given:
    return {name: given[name] for name in names if given[name] is not None}
