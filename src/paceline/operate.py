"""What an operator asks of a running deployment: `paceline loads`, `scale`, `pause`, `resume`; and `model`."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from paceline.control import Control, ControlError
from paceline.engines.base import EngineError
from paceline.engines.models import NAMES, named_model
from paceline.errors import PacelineError

UrlFlag = Annotated[str, typer.Option("--url", help="A front-end of the deployment.")]
HERE = "http://127.0.0.1:8000"


def _app() -> typer.Typer:
    names = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=names)


def _fail(error: PacelineError) -> Any:
    print(f"paceline: error: {error}", file=sys.stderr)
    sys.exit(1)


# loads --------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "rank": lambda load: str(load["rank"]),
    "waiting": lambda load: f"{load['waiting']:,}",
    "running": lambda load: f"{load['running']}/{load['slots']}" if "slots" in load else f"{load['running']}",
    "prefill": lambda load: f"{load['prefill_tokens']:,}" if "prefill_tokens" in load else "",
    "in\N{NO-BREAK SPACE}flight": lambda load: f"{load['in_flight']:,}" if "in_flight" in load else "",
    "quota": lambda load: "" if load.get("prefill_quota") is None else f"{load['prefill_quota']:,}",
    "KV": lambda load: f"{load['kv_used'] / load['kv_total']:.0%}" if load.get("kv_total") else "",
    "prefill/s": lambda load: f"{load['prefill_rate']:,.0f}" if load.get("prefill_rate") else "",
    "decode/s": lambda load: f"{load['decode_rate']:,.0f}" if load.get("decode_rate") else "",
    "finished": lambda load: f"{load['finished']:,}" if "finished" in load else "",
}
"""Heading to what stands there, made from an entry of `GET /loads`. The whole fits 80 columns.

Running requests stand with the slots there are; `prefill` is prompt tokens to compute, `in flight` this front-end's
own requests, `quota` the prompt tokens that a lockstep step may compute (at the last report), `KV` the used share, and
rates are tokens a second. A vLLM rank says its requests and its KV alone.
"""

NEEDED = ("rank", "waiting", "running")
SUMS = ("waiting", "running", "slots", "prefill_tokens", "in_flight", "kv_used", "kv_total", "prefill_rate",
        "decode_rate", "finished")  # fmt: skip
OF_PREFIXES = ("prompt_tokens", "cached_tokens", "held_tokens")

loads_app = _app()


@loads_app.command()
def loads(
    url: Annotated[str, typer.Option("--url", help="A front-end of the deployment, or PACELINE_VLLM_STATUS.")] = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="What the server says, one line each time.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.05, help="Least seconds between two looks.")] = 1.0,
) -> None:
    """Show what every rank of a running deployment has to do, as one of its front-ends believes it."""

    try:
        found = loads_of(Control(url), interval if watch else None)
        if as_json:
            for said in found:
                print(json.dumps(said), flush=True)
        elif watch:
            _show(found)
        else:
            _console().print(table(next(found)))
    except PacelineError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _console() -> Console:
    """A pipe has no width: there a row is a line."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 500
    return Console(highlight=False, width=wide)


def loads_of(control: Control, interval_s: float | None) -> Iterator[dict[str, Any]]:
    """What the server says, with an entry a rank: once, or again and again. Raises ControlError."""
    for said in [control.loads()] if interval_s is None else control.watch_loads(interval_s):
        ranks = said.get("ranks")
        if not isinstance(ranks, list) or not all(_is_load(entry) for entry in ranks):
            raise ControlError(f"{control.url} is no Paceline server")
        yield said


def table(said: dict[str, Any]) -> Table:
    """The loads as a table, with a last row for all of more than one, and what waits before all ranks."""
    ranks = said["ranks"]
    made = Table(
        box=None, pad_edge=False, padding=(0, 0, 0, 1), caption="\n".join(remarks(said)) or None, caption_justify="left"
    )
    for heading in COLUMNS:
        # What does not fit is put under each other, never cut.
        made.add_column(heading, justify="right", overflow="fold")
    for load in ranks:
        made.add_row(*(cell(load) for cell in COLUMNS.values()))
    if len(ranks) > 1:
        known = [name for name in SUMS if all(name in load for load in ranks)]
        total: dict[str, Any] = {name: sum(load[name] for load in ranks) for name in known} | {"rank": "all"}
        made.add_row(*(cell(total) for cell in COLUMNS.values()), style="bold")
    return made


def remarks(said: dict[str, Any]) -> list[str]:
    """What stands below the table: what waits before all ranks, and what is not as it should be."""
    found, queued = [], said.get("queued")
    if isinstance(queued, int) and queued:
        found.append(f"{queued:,} wait for any rank")
    found += list(_prefixes(said["ranks"]))
    found += [
        f"rank {load['rank']} hangs in a step, for {load['hangs_s']} s" for load in said["ranks"] if "hangs_s" in load
    ]
    missing = said.get("missing")
    if missing:
        found.append(f"missing: rank {', '.join(map(str, missing))}")
    pause = said.get("suspension")
    if isinstance(pause, dict) and isinstance(pause.get("number"), int) and pause["number"] % 2:
        waited = pause.get("waiting_for")
        found.append(f"pausing: rank {', '.join(map(str, waited))} still computes" if waited else "paused")
    status = said.get("status")
    if isinstance(status, str) and status not in ("ok", "no rank is ready") and "hangs" not in status:
        found.append(status)
    return found


def _prefixes(loads: list[dict[str, Any]]) -> Iterator[str]:
    """How much of prompts was there, and which ranks are homes of how much, where anything was or is."""
    if any(load.get("cached_tokens") for load in loads):
        shares = (
            f"rank {load['rank']} {load.get('cached_tokens', 0) / load['prompt_tokens']:.0%}"
            for load in loads if load.get("prompt_tokens")
        )  # fmt: skip
        yield f"of prompts' tokens were there: {', '.join(shares)}"
    homes = [f"rank {load['rank']} {load['held_tokens']:,}" for load in loads if load.get("held_tokens")]
    if homes:
        yield f"tokens of prompts' beginnings that ranks hold: {', '.join(homes)}"


def _is_load(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and all(name in entry for name in NEEDED)
        and all(isinstance(entry.get(name, 0), int | float) for name in (*SUMS, *OF_PREFIXES))
    )


def _show(found: Iterator[dict[str, Any]]) -> None:
    with Live(table(next(found)), console=_console(), auto_refresh=False) as live:
        for said in found:
            live.update(table(said), refresh=True)


# scale --------------------------------------------------------------------------------------------

LOOK_S = 0.2
"""How often it is asked what is waited for."""

scale_app = _app()


@scale_app.command()
def scale(
    size: Annotated[int, typer.Argument(metavar="N", help="Ranks that the deployment is to have.")],
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that ranks which leave get to end their requests; what "
                                                    "they have then goes on at others.")
    ] = 120.0,
    startup_timeout: Annotated[
        float, typer.Option("--startup-timeout", help="Seconds that new ranks get to load, or all is as it was.")
    ] = 300.0,
    url: UrlFlag = HERE,
) -> None:  # fmt: skip
    """Let a running deployment have N ranks, while it serves; returns once it has."""
    begin = time.monotonic()
    call = Call(Control(url), size, drain_timeout, startup_timeout)
    shown = ""
    while not call.wait(LOOK_S):
        line = progress(Control(url))
        if line and line != shown:
            print(line, file=sys.stderr, flush=True)
            shown = line
    if call.error is not None:
        _fail(call.error)
    missing: Any = call.done.get("missing") or []
    without = f"; {_ranks(missing)} of them does not serve" if missing else ""
    print(f"{call.done['size']} ranks, from {call.done['before']}, after {time.monotonic() - begin:.1f} s{without}")


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"


class Call:
    """The call, in a thread that does not hold up an interrupt. `done`, or `error`, once `wait` has returned True."""

    def __init__(self, control: Control, *wanted: Any) -> None:
        self.done: dict[str, object] = {}
        self.error: PacelineError | None = None
        self._thread = threading.Thread(target=self._run, args=(control, *wanted), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so long at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, control: Control, *wanted: Any) -> None:
        try:
            self.done = control.scale(*wanted)
        except PacelineError as error:
            self.error = error


def progress(control: Control) -> str:
    """What is waited for, in a line; empty where nothing is, or nobody says."""
    try:
        state = control.scaling()
        if not state.get("is_scaling_elastic_ep"):
            return ""
        ranks: Any = state["waiting_for"]
        if state["status"] == "loading":
            return f"waiting for rank {', '.join(map(str, ranks))} to load"
        left = requests_left(control)
    except ControlError:
        return ""
    return f"waiting for {', '.join(f'rank {rank} ({left.get(rank, 0)} requests)' for rank in ranks)} to end"


def requests_left(control: Control) -> dict[int, int]:
    """By rank, the requests that it has."""
    loads: Any = control.loads()["ranks"]
    return {load["rank"]: load["waiting"] + load["running"] for load in loads}


# revive -------------------------------------------------------------------------------------------

revive_app = _app()


@revive_app.command()
def revive(
    rank: Annotated[int | None, typer.Argument(help="The rank; all that are missing without it.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait until they serve.")] = 60.0,
    url: UrlFlag = HERE,
) -> None:
    """Start ranks again that ended too often; returns once they serve."""
    begin = time.monotonic()
    try:
        revived: Any = Control(url).revive(rank, timeout)["revived"]
    except PacelineError as error:
        _fail(error)
    said = f"{_ranks(revived)} serves after {time.monotonic() - begin:.1f} s" if revived else "no rank is missing"
    print(said)


# secret -------------------------------------------------------------------------------------------

secret_app = _app()


@secret_app.callback()
def _secrets() -> None:
    """The secret that the nodes of a deployment share."""


@secret_app.command()
def new(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("paceline.secret")) -> None:
    """Make a secret, for this user alone; copy the file to every node and name it there with --secret-file."""
    from paceline.net.secret import make  # imports ZeroMQ, which the other commands do without

    try:
        make(path)
    except PacelineError as error:
        _fail(error)
    print(path)


# pause, resume ------------------------------------------------------------------------------------

PauseTimeoutFlag = Annotated[float, typer.Option("--timeout", help="Seconds to wait until all ranks have.")]
pause_app, resume_app = _app(), _app()


@pause_app.command()
def pause(
    mode: Annotated[str, typer.Option("--mode", help="keep, wait for, or abort the requests that run.")] = "keep",
    timeout: PauseTimeoutFlag = 60.0,
    url: UrlFlag = HERE,
) -> None:
    """Pause a running deployment; returns once no rank computes."""
    _control(lambda: Control(url).pause(mode, timeout))


@resume_app.command()
def resume(timeout: PauseTimeoutFlag = 60.0, url: UrlFlag = HERE) -> None:
    """Let a paused deployment go on."""
    _control(lambda: Control(url).resume(timeout))


def _control(call: Callable[[], dict[str, object]]) -> None:
    begin = time.monotonic()
    try:
        done = call()
    except PacelineError as error:
        _fail(error)
    print(f"{done['status']} after {time.monotonic() - begin:.3f} s (suspension {done['suspension']})")


# model --------------------------------------------------------------------------------------------

model_app = _app()


@model_app.callback()
def _models() -> None:
    """Models that Paceline knows by name."""


@model_app.command()
def get(name: Annotated[str, typer.Argument(help=f"{' or '.join(NAMES)}.")] = NAMES[0]) -> None:
    """Fetch a model into the cache folder, and print its path. `paceline serve` does it by itself."""
    if name not in NAMES:
        _fail(PacelineError(f"{name!r} is no model that has a name; there are {', '.join(NAMES)}"))
    shown: list[str] = []

    def progress(what: str, share: float) -> None:
        text = f"{what}: {share:.0%}"
        if text != (shown[-1] if shown else ""):
            shown[:] = [text]
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    try:
        path = named_model(name, progress)
    except EngineError as error:
        _fail(PacelineError(str(error)))
    print("\n" * bool(shown), end="", file=sys.stderr)
    print(path)
