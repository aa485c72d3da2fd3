"""The deployment that `serve.py` loads: started as a user would start it, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60.0
END_S = 10.0
KV_CACHE_TOKENS = 1 << 24
"""Room for 512 long streams: memory is not what is measured."""


class CannotRun(Exception):
    """The deployment did not come up."""


class Deployment:
    """`paceline serve --engine timed` over two ranks, ready. `step_ms` is all that its steps cost.

    `arguments`: what else to type after `paceline`, in place of that.
    """

    def __init__(self, frontends: int, step_ms: float, ranks: int = 2, arguments: list[str] | None = None) -> None:
        self.arguments = arguments or serve_arguments(frontends, step_ms, ranks)
        self._frontends, self._ranks = frontends, ranks
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paceline", *self.arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.output = b""
        try:
            self.port = self._wait_ready()
            self.processes = self._find_processes()
        except BaseException:
            self.close()
            raise

    def _wait_ready(self) -> int:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ends = time.monotonic() + START_S
        while not (found := re.search(rb"serves on http://[^ ]*:(\d+)/v1", self.output)):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, ends - time.monotonic()))
            data = os.read(descriptor, 65536) if readable else b""
            self.output += data
            if not data:
                said = " | ".join(self.output.decode(errors="replace").splitlines()[-3:])
                reason = "ended" if readable else f"was not ready after {START_S:g} s"
                raise CannotRun(f"the deployment {reason}: {said}")
        os.set_blocking(descriptor, False)
        return int(found[1])

    def _find_processes(self) -> dict[str, list[int]]:
        names: dict[int, str] = {}
        for children in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):
                    names[pid] = Path(f"/proc/{pid}/comm").read_text()

        def called(name: str) -> list[int]:
            return [pid for pid, found in names.items() if found.startswith(f"pl:{name}")]

        found = {"front-ends": called("front-end"), "ranks": called("rank"), "coordinator": called("coordinator")}
        if [len(found["front-ends"]), len(found["ranks"])] != [self._frontends, self._ranks]:
            raise CannotRun(f"not all processes of the deployment were found: {sorted(names.values())}")
        return found

    def pin(self, cores: dict[str, set[int]]) -> None:
        """Bind all threads of the named groups of processes to cores."""
        for name, pinned in cores.items():
            for pid in self.processes[name]:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), pinned)

    def complaints(self) -> list[str]:
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 65536):
                self.output += data
        lines = self.output.decode(errors="replace").splitlines()
        return [line for line in lines if " WARNING " in line or " ERROR " in line]

    def close(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def serve_arguments(frontends: int, step_ms: float, ranks: int) -> list[str]:
    options = {"step_ms": f"{step_ms:g}", "prefill_ms": "0", "decode_ms": "0"}
    return [
        "serve", "--engine", "timed", "--port", "0", "-dp", str(ranks), "--api-server-count", str(frontends),
        "--max-num-seqs", "1024", "--max-num-batched-tokens", "65536", "--kv-cache-tokens", str(KV_CACHE_TOKENS),
        "--log-level", "warning",
        *(part for name, value in options.items() for part in ("--engine-option", f"{name}={value}")),
    ]  # fmt: skip


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let a signal that would end this process run its clean-up first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    yield
