"""The deployment that `serve.py` loads: started as a user would start it, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.serving import Command, process_name

from paceline.engines.timed import CostModel
from paceline.sim.engine import EngineShape


def shape_of(step_ms: float) -> EngineShape:
    """An engine with room for 512 long streams: memory is not what is measured."""
    return EngineShape(CostModel(step_ms, 0.0, 0.0), slots=1024, budget=65536, kv_tokens=1 << 24)


class CannotRun(Exception):
    """The deployment did not come up."""


class Deployment(Command):
    """`paceline serve --engine timed` over two ranks, ready. `step_ms` is all that its steps cost.

    `arguments`: what else to type after `paceline`, in place of that.
    """

    def __init__(self, frontends: int, step_ms: float, ranks: int = 2, arguments: list[str] | None = None) -> None:
        self.arguments = arguments or serve_arguments(frontends, ranks, shape_of(step_ms))
        super().__init__(*self.arguments)
        try:
            self.connect()
        except AssertionError as error:
            self.close()
            raise CannotRun(f"the deployment did not come up: {' | '.join(str(error).splitlines()[-3:])}") from None
        self.port = int(self.url.rpartition(":")[2])
        names = {pid: process_name(pid) for pid in self.children()}
        self.processes = {
            f"{name}s" if name != "coordinator" else name: [p for p, n in names.items() if n.startswith(f"pl:{name}")]
            for name in ("front-end", "rank", "coordinator")
        }
        if [len(self.processes["front-ends"]), len(self.processes["ranks"])] != [frontends, ranks]:
            self.close()
            raise CannotRun(f"not all processes of the deployment were found: {sorted(names.values())}")

    def pin(self, cores: dict[str, set[int]]) -> None:
        """Bind all threads of the named groups of processes to cores."""
        for name, pinned in cores.items():
            for pid in self.processes[name]:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), pinned)

    def complaints(self) -> list[str]:
        return [line.strip() for line in list(self.lines) if " WARNING " in line or " ERROR " in line]


def serve_arguments(frontends: int, ranks: int, shape: EngineShape, engine: str = "timed") -> list[str]:
    costs = {"step_ms": shape.costs.step_ms, "prefill_ms": shape.costs.prefill_ms, "decode_ms": shape.costs.decode_ms}
    return [
        "serve", "--engine", engine, "--port", "0", "-dp", str(ranks), "--api-server-count", str(frontends),
        "--max-num-seqs", str(shape.slots), "--max-num-batched-tokens", str(shape.budget),
        "--kv-cache-tokens", str(shape.kv_tokens), "--log-level", "warning",
        *(part for name, value in costs.items() for part in ("--engine-option", f"{name}={value:g}")),
    ]  # fmt: skip


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let a signal that would end this process run its clean-up first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    yield
