"""`paceline scale`: more ranks or fewer, with a line for each step on the way."""

from __future__ import annotations

import sys
import threading
import time
from typing import Annotated, Any

import typer

from paceline.control import Control, ControlError
from paceline.errors import PacelineError

LOOK_S = 0.2
"""How often it is asked what is waited for."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scale(
    size: Annotated[int, typer.Argument(metavar="N", help="Ranks that the deployment is to have.")],
    drain_timeout: Annotated[
        float, typer.Option("--drain-timeout", help="Seconds that ranks which leave get to end their requests; what "
                                                    "they have then goes on at others.")
    ] = 120.0,
    startup_timeout: Annotated[
        float, typer.Option("--startup-timeout", help="Seconds that new ranks get to load, or all is as it was.")
    ] = 300.0,
    url: Annotated[str, typer.Option("--url", help="A front-end of the deployment.")] = "http://127.0.0.1:8000",
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
        print(f"paceline: error: {call.error}", file=sys.stderr)
        sys.exit(1)
    print(f"{call.done['size']} ranks, from {call.done['before']}, after {time.monotonic() - begin:.1f} s")


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
