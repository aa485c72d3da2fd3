"""What streams lose when ranks die, with vLLM in Paceline's ranks and under `vllm serve`: `make bench-vllm-losses`.

Sixteen streams of all kinds (`tests/vllm/mixed.py`) run; when half of them have some tokens, a rank or one of its
workers is killed (-9), stopped, or made to hang in its step. Each stream must end as it does undisturbed: no error, no
token twice, none missing. Streams for which vLLM itself gives two texts in two undisturbed runs are named and not
counted. `--model moe`: ranks that share experts, of which a death ends the group. `vllm serve` is started anew for each
of its deaths, since none is survived.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct
from tests.serving import Deployment, deployment, descendants
from tests.vllm import environment
from tests.vllm.mixed import ASKED, Said, run
from tests.vllm.serving import VERSION, Server, vllm

RESULTS = Path(__file__).resolve().parent / "results" / "vllm_losses.md"
FLAGS = ["--enforce-eager", "--max-model-len", "256", "--dtype", "bfloat16"]
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
KINDS = ["killed", "stopped", "hung"]
BACK_S = 600.0
SETTLES_S = 3.0


class Death(Struct):
    """One death: of what kind, how many streams it met, how many ended with an error, with another text; seconds until
    all ranks were back, infinite for never.
    """

    kind: str
    met: int
    errors: int
    others: int
    back_s: float


class Undisturbed:
    """What streams say by themselves: those that vLLM answers alike in two runs."""

    def __init__(self, url: str) -> None:
        first, second = run(url), run(url)
        self._said: list[Said | None] = [
            one if one == two else None for one, two in zip(first, second, strict=True)
        ]  # fmt: skip
        self.unsteady = self._said.count(None)

    def compare(self, said: list[Said]) -> tuple[int, int]:
        errors = sum(one.error is not None for one in said)
        pairs = zip(said, self._said, strict=True)
        return errors, sum(one.error is None and known is not None and one != known for one, known in pairs)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "vllm" in name or name.startswith("psm_")}


def wait_until(condition: Callable[[], bool], limit_s: float = BACK_S) -> float:
    """The seconds that it took; infinite where it never was."""
    begin = time.monotonic()
    while time.monotonic() < begin + limit_s:
        with contextlib.suppress(Exception):
            if condition():
                return time.monotonic() - begin
        time.sleep(0.1)
    return float("inf")


def all_ready(running: Deployment) -> bool:
    health = running.health()
    return health["ready"] == [0, 1] and not health["stalls"]


class Strike:
    """What is done to a rank, or to one of its workers."""

    def __init__(self, kind: str, running: Deployment, rank: int, folder: Path, worker: bool) -> None:
        self._kind, self._running, self._rank, self._worker = kind, running, rank, worker
        self._victim = 0
        self.at = 0.0
        self._hang = folder / f"hang-{rank}"

    def begin(self) -> None:
        pid = self._running.pid_of(f"rank {self._rank}")
        workers = [one for one in descendants(pid) if "VllmWorker" in Path(f"/proc/{one}/cmdline").read_text()]
        self._victim = workers[0] if self._worker and workers else pid
        self.at = time.monotonic()
        if self._kind == "hung":
            self._hang.touch()
        else:
            os.kill(self._victim, signal.SIGKILL if self._kind == "killed" else signal.SIGSTOP)

    def end(self) -> None:
        """Let what is stopped go on, if it is still there."""
        self._hang.unlink(missing_ok=True)
        if self._kind == "stopped":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._victim, signal.SIGCONT)


def of_paceline(model: str, deaths: int, minutes: float) -> Iterator[Death | str]:
    """Each death as it is known; a text for the table at last."""
    until, draw = time.monotonic() + 60 * minutes, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        before = shared_memory()
        arguments = [
            str(environment.models_of(VERSION) / model), "--engine", "tests.vllm.hanging:HangingVllm", "-dp", "2",
            "--api-server-count", "1", "--max-rank-restarts", "1000", "--step-timeout", "5", "--stall-timeout", "2",
            *FLAGS,
        ]  # fmt: skip
        python = str(environment.environment_of(VERSION) / "bin" / "python")
        with deployment(*arguments, python=python, variables=VARIABLES | {"HANG_FOLDER": folder}) as running:
            undisturbed = Undisturbed(running.url)
            for number in range(deaths):
                if time.monotonic() > until:
                    break
                wait_until(lambda: all_ready(running))
                kind = KINDS[number % len(KINDS)]
                struck = Strike(kind, running, draw.randrange(2), Path(folder), draw.random() < 0.3)
                before_it = running.health()["moved"]
                said = run(running.url, midway=struck.begin)
                struck.end()
                met = running.health()["moved"] - before_it
                if kind == "stopped":
                    # One whose step has lasted too long meanwhile ends as soon as it goes on.
                    time.sleep(SETTLES_S)
                wait_until(lambda: all_ready(running))
                yield Death(kind, met, *undisturbed.compare(said), time.monotonic() - struck.at)
        left = len(shared_memory() - before)
        yield f"{undisturbed.unsteady} streams that vLLM answers in two ways; {left} files left in /dev/shm"


def of_vllm_serve(model: str) -> Iterator[Death]:
    for kind in KINDS[:2]:
        with tempfile.TemporaryDirectory() as folder, vllm(model, Path(folder), paceline=False) as server:
            url = f"http://127.0.0.1:{server.port}"
            asked = [one | {"model": "tiny"} for one in ASKED]
            undisturbed = run(url, asked)
            (core, *_) = engine_cores(server)
            number = signal.SIGKILL if kind == "killed" else signal.SIGSTOP
            said = run(url, asked, lambda core=core, number=number: os.kill(core, number))
            with contextlib.suppress(ProcessLookupError):
                os.kill(core, signal.SIGCONT)
            errors = sum(one.error is not None or one.finish is None for one in said)
            others = sum(one != whole for one, whole in zip(said, undisturbed, strict=True)) - errors
            back_s = wait_until(lambda server=server: bool(server.get("/health")), 20.0)
            yield Death(kind, len(asked), errors, max(0, others), back_s)


def engine_cores(server: Server) -> list[int]:
    return [one for one in server.pids("") if "EngineCore" in Path(f"/proc/{one}/cmdline").read_text()]


def table(system: str, model: str, found: list[Death]) -> list[str]:
    lines = []
    for kind in KINDS:
        mine = [one for one in found if one.kind == kind]
        if mine:
            back = statistics.median(one.back_s for one in mine)
            words = "never" if back == float("inf") else f"{back:.0f} s"
            counts = Counter(errors=sum(one.errors for one in mine), others=sum(one.others for one in mine))
            streams = sum(one.met for one in mine)
            figures = [len(mine), len(mine) * len(ASKED), streams, counts["errors"], counts["others"], words]
            lines.append("| " + " | ".join([system, model, kind, *map(str, figures)]) + " |")
    return lines


HEAD = """# What streams lose when ranks die

    make bench-vllm-losses

vLLM {version} on 2 cores, two ranks; 16 streams at each death: greedy, seeded, with penalties, with log-probabilities.
*Another text*: not the undisturbed one: a token twice, missing or chosen otherwise. *Back*: the median time until all
ranks are ready again and all streams have ended. *Moved*: times that a stream went on at another rank.

| system | model | what happens to a rank | times | streams | moved | with an error | with another text | back |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What streams lose when ranks die.")
    parser.add_argument("--model", choices=["dense", "moe"], default="dense")
    parser.add_argument("--deaths", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=1000.0)
    parser.add_argument("--without-vllm-serve", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: list[Death] = []
    notes: list[str] = []
    for one in of_paceline(options.model, options.deaths, options.minutes) if options.deaths else ():
        print(one, flush=True)
        if isinstance(one, str):
            notes.append(f"`{options.model}`: {one}.")
        else:
            found.append(one)
    lines = table("Paceline", options.model, found)
    if not options.without_vllm_serve:
        theirs = list(of_vllm_serve(options.model))
        print(theirs)
        lines += table("vllm serve", options.model, theirs)
    options.output.write_text(HEAD.format(version=VERSION) + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n")


if __name__ == "__main__":
    main()
