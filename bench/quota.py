"""The common prefill quota against none, on real processes: `make bench-quota`.

Each variant is a deployment of its own: ranks that run `timed-lockstep`, a coordinator, and one front-end in this
process. All stand at the same time and take turns; while one is loaded, the others' ranks are paused. A turn begins
with an empty deployment and keeps more requests at each rank than it has slots. All variants get the same requests in
a round, drawn from a trace where there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.core.frontend.events import CoordinatorSaid, Placed, Refuse
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import LoadView
from paceline.core.requests import Output, SamplingParams
from paceline.core.routing import LeastLoad
from paceline.net.coordinator import DPCoordinator
from paceline.net.frontend import FrontendShell
from paceline.net.links import new_identity
from paceline.net.rank import RankSettings, run_rank
from paceline.process.spawn import spawn
from paceline.settings import DeploymentConfig, EngineConfig, ParallelConfig
from paceline.sim.trace import read_trace

START_S = 120.0


class DatedFrontend(Frontend):
    """A front-end's machine that knows when each rank's report was first seen."""

    def handle(self, event: Any, now: float) -> Any:
        match event:
            case CoordinatorSaid(LoadView(ranks=ranks)):
                for entry in ranks or ():
                    if self.reports.get(entry.rank, (None, 0.0))[0] != (entry.step, entry.load):
                        self.reports[entry.rank] = ((entry.step, entry.load), now)
        return super().handle(event, now)

    @property
    def reports(self) -> dict[int, tuple[tuple[int, Load], float]]:
        return self.__dict__.setdefault("_reports", {})

    def age_s(self, rank: int, now: float) -> float | None:
        """How long the rank has worked since its latest report; none, where that said that it is idle."""
        if rank not in self.reports:
            return None
        (_, load), since = self.reports[rank]
        return now - since if load.waiting or load.running else 0.0


class Fleet:
    """A coordinator and `size` ranks of one engine, one thread each. A context manager: all are gone at its end.

    `prefill_quota`: in lockstep. `changes`: other fields of the engine's settings.
    """

    def __init__(
        self, folder: Path, size: int, engine: str, slots: int, lockstep: bool = False, prefill_quota: str = "auto",
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.size, self.lockstep = size, lockstep
        parallel = ParallelConfig(data_parallel_size=size, prefill_quota=prefill_quota)
        config = DeploymentConfig(parallel, EngineConfig(engine=engine, threads=1, max_num_seqs=slots, **changes))
        self.coordinator = DPCoordinator(parallel, enable_wave_coordination=lockstep)
        self._statuses: list[Any] = []
        addresses = self.coordinator.get_engine_socket_addresses()
        self._ranks = []
        for rank in range(size):
            reader, writer = get_context("spawn").Pipe(duplex=False)
            places = (f"ipc://{folder}/rank-{rank}", *addresses, f"ipc://{folder}/group-{rank}")
            about = {"settings": RankSettings(config, rank, *places), "status": writer}
            self._ranks.append(spawn(f"rank {rank}", run_rank, about, "warning"))
            writer.close()
            self._statuses.append(reader)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        self.coordinator.shutdown()


@asynccontextmanager
async def connected(fleet: Fleet) -> AsyncIterator[tuple[FrontendShell, DatedFrontend]]:
    machine = DatedFrontend(new_identity(), LeastLoad(0, 1), lockstep=fleet.lockstep)
    client = FrontendShell(machine, fleet.coordinator.get_stats_publish_address())
    try:
        async with asyncio.timeout(START_S):
            while len(machine.ready_ranks()) < fleet.size:
                await client.wait_changed()
        yield client, machine
    finally:
        client.close()


@dataclass
class Turn:
    """One variant's turn in one round: output tokens a second, times in seconds."""

    round: int
    variant: str
    tokens_per_s: float
    gap_p50_s: float
    gap_p99_s: float
    first_p50_s: float


HEADINGS = ["variant", "output tokens/s", "to the first variant", "gap p50", "gap p99", "to the first variant",
            "time to first token p50"]  # fmt: skip


def rows(turns: list[Turn]) -> list[list[str]]:
    """A line a variant: medians over the rounds, and ratios within a round, with their range."""
    by_variant: dict[str, list[Turn]] = {}
    for turn in turns:
        by_variant.setdefault(turn.variant, []).append(turn)
    first = next(iter(by_variant.values()))
    made = []
    for name, own in by_variant.items():
        pairs = list(zip(own, first, strict=True))
        made.append([
            name,
            f"{statistics.median(turn.tokens_per_s for turn in own):,.0f}",
            ratio([mine.tokens_per_s / its.tokens_per_s for mine, its in pairs]),
            f"{statistics.median(turn.gap_p50_s for turn in own) * 1000:.0f} ms",
            f"{statistics.median(turn.gap_p99_s for turn in own) * 1000:.0f} ms",
            ratio([mine.gap_p99_s / its.gap_p99_s for mine, its in pairs]),
            f"{statistics.median(turn.first_p50_s for turn in own):.2f} s",
        ])  # fmt: skip
    return made


def ratio(values: list[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def to_console(turns: list[Turn]) -> str:
    return "\n".join(
        f"round {turn.round}, {turn.variant}: {turn.tokens_per_s:,.0f} tokens/s, gap p50"
        f" {turn.gap_p50_s * 1000:.0f} ms, p99 {turn.gap_p99_s * 1000:.0f} ms, first token p50 {turn.first_p50_s:.2f} s"
        for turn in turns
        if turn.round == turns[-1].round
    )


def table(turns: list[Turn]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows(turns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(turns: list[Turn], ranks: int, command: str, about: str) -> str:
    cores = f"{os.cpu_count()} cores, shared with other work: {os.getloadavg()[0]:.1f} ran or waited to run at the end."
    return f"{heading(ranks)}\n\n    {command}\n\n{cores}\n\n{about}\n\n{table(turns)}\n"


def heading(ranks: int) -> str:
    return f"## {ranks} ranks"


def replaced(text: str, ranks: int, new: str) -> str:
    """The whole of bench/results/quota.md with this section in place of the one that was there."""
    title, *parts = text.split("\n## ") if text else ["# The common prefill quota\n"]
    sections = {f"## {part}".partition("\n")[0]: f"## {part}" for part in parts} | {heading(ranks): new}
    in_order = sorted(sections, key=lambda name: int(name.split()[1]))
    return "\n".join([title, *(f"{sections[name].rstrip()}\n" for name in in_order)])


Size = tuple[int, int]
"""Prompt and answer, in tokens."""


class Answer:
    """Takes one request's answer."""

    def __init__(self, load: FullLoad) -> None:
        self._load = load
        self.request = 0
        self.asked = time.monotonic()
        self.last: float | None = None

    def handle(self, news: Placed | Output | Refuse) -> None:
        """A step's tokens; with the last one, the next request takes this one's place."""
        if isinstance(news, Refuse):
            raise RuntimeError(f"a benchmark in which requests fail measures nothing: {news.text}")
        if isinstance(news, Placed):
            return
        now = time.monotonic()
        if news.token_ids:
            self._load.token(self, now)
            self.last = now
        if news.finish_reason is not None:
            self._load.ended(self)


class FullLoad:
    """Keeps `count` requests at a deployment. Tokens are counted from `begin` seconds on."""

    def __init__(self, client: FrontendShell, sizes: Sequence[Size], count: int, begin_s: float) -> None:
        self._client = client
        self._sizes: Iterator[Size] = cycle(sizes)
        self._open: set[Answer] = set()
        self._begin = time.monotonic() + begin_s
        self._over = False
        self.tokens = 0
        self.gaps: list[float] = []
        self.firsts: list[float] = []
        for _ in range(count):
            self._send()

    async def run(self, seconds: float) -> float:
        """Until so long after `begin`; returns how long was counted. Then everything is taken back."""
        await asyncio.sleep(max(0.0, self._begin + seconds - time.monotonic()))
        counted = time.monotonic() - self._begin
        self._over = True
        self._client.abandon([answer.request for answer in self._open])
        while self._client.machine.running:
            await asyncio.sleep(0.05)
        return counted

    def token(self, answer: Answer, now: float) -> None:
        if now < self._begin or self._over:
            return
        self.tokens += 1
        if answer.last is None:
            self.firsts.append(now - answer.asked)
        else:
            self.gaps.append(now - answer.last)

    def ended(self, answer: Answer) -> None:
        self._open.discard(answer)
        if not self._over:
            self._send()

    def _send(self) -> None:
        prompt, tokens = next(self._sizes)
        answer = Answer(self)
        self._open.add(answer)
        answer.request = self._client.submit(answer.handle, [1] * prompt, SamplingParams(max_tokens=tokens))


RESULTS = Path(__file__).resolve().parent / "results"
TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "azure_llm_2023_conv.csv"
SLOWER = 4
"""Times that of an 8B-class model: what Python takes beside a step is then little of it, as it should be."""
COSTS = {"step_ms": f"{6 * SLOWER}", "prefill_ms": f"{0.09 * SLOWER:g}", "decode_ms": f"{0.02 * SLOWER:g}"}
VARIANTS = (("off", 2048), ("off", 256), ("auto", 2048))
"""The quota and the token budget: the default budget, one tuned for lockstep, and ours with the default."""

TRACED = 4000
WAITING = 8
"""Requests at a rank beyond those that it has slots for."""


def sizes(trace: Path | None, seed: int) -> list[Size]:
    """Prompts and answers in an order of the seed: the trace's, or of about its shape."""
    chance = random.Random(seed)
    if trace is not None:
        found = [(one.prompt_tokens, one.answer_tokens) for one in read_trace(trace)[:TRACED]]
    else:
        found = [(1 + int(chance.expovariate(1 / 1150)), 1 + int(chance.expovariate(1 / 210))) for _ in range(TRACED)]
    chance.shuffle(found)
    return found


async def turn(number: int, name: str, client: FrontendShell, drawn: list[Size], args: argparse.Namespace) -> Turn:
    load = FullLoad(client, drawn, args.ranks * (args.slots + WAITING), args.warm_up)
    seconds = await load.run(args.seconds)
    cuts = statistics.quantiles(load.gaps, n=100)
    first = statistics.median(load.firsts) if load.firsts else float("nan")
    return Turn(number, name, load.tokens / seconds, cuts[49], cuts[98], first)


async def measure(args: argparse.Namespace) -> list[Turn]:
    turns: list[Turn] = []
    async with AsyncExitStack() as stack:
        clients: dict[str, FrontendShell] = {}
        for quota, budget in VARIANTS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            changes = {"options": COSTS, "max_num_batched_tokens": budget, "kv_cache_tokens": 10_000_000}
            fleet = stack.enter_context(Fleet(folder, args.ranks, "timed-lockstep", args.slots, True, quota, changes))
            client, _ = await stack.enter_async_context(connected(fleet))
            clients[f"quota {quota}, budget {budget:,}"] = client
        for number in range(1, args.rounds + 1):
            drawn = sizes(args.trace, number)
            order = list(clients.items())
            for name, client in order if number % 2 else reversed(order):
                turns.append(await turn(number, name, client, drawn, args))
            print(to_console(turns), flush=True)
    return sorted(turns, key=lambda one: (one.round, list(clients).index(one.variant)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="quota.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--slots", type=int, default=32, help="requests that run at once on a rank (default: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=float, default=25.0, help="seconds of a turn that do not count (default: 25)")
    parser.add_argument("--seconds", type=float, default=35.0, help="seconds of a turn that do (default: 35)")
    trace = TRACE if TRACE.exists() else None
    parser.add_argument("--trace", type=Path, default=trace, help=f"draw from this file (default: {trace})")
    parser.add_argument("--write", action="store_true", help="write bench/results/quota.md")
    args = parser.parse_args()
    turns = asyncio.run(measure(args))
    print(table(turns))
    if args.write:
        options = f"--ranks {args.ranks} --slots {args.slots} --rounds {args.rounds} --write"
        about = (
            f"{args.ranks} ranks of `timed-lockstep`, {args.slots} slots each, a step of {COSTS['step_ms']} ms, "
            f"{COSTS['prefill_ms']} ms more for each prompt token and {COSTS['decode_ms']} ms for each request that "
            f"decodes ({SLOWER} times an 8B-class model's). Saturated: {WAITING} requests wait at each rank. "
            f"Prompts and answers: {args.trace.name if args.trace else 'drawn, of the trace’s means'}. In each of "
            f"{args.rounds} rounds every variant is loaded for {args.seconds:g} s, after {args.warm_up:g} s that do "
            "not count. Gaps are those between two tokens of an answer. Ratios are within a round."
        )
        path = RESULTS / "quota.md"
        new = section(turns, args.ranks, f"make bench-quota ARGS='{options}'", about)
        path.write_text(replaced(path.read_text() if path.exists() else "", args.ranks, new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
