"""Our routing against other systems' and a bound, on real traces in virtual time: `make bench-routing`.

Every row serves the same requests with every way to choose ranks. The rate is set by what the oracle sustains: `steady`
is 95% of that and `saturated` half as much again, both at random moments (Poisson); `bursts` is 70%, at the trace's own
moments, but with all requests of a period in its first half.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
from bench.replay import replay_of
from bench.routing_report import RESULTS, Cell, Measured, to_console, write
from msgspec.structs import replace

from paceline.sim.engine import EngineShape
from paceline.sim.outcome import Outcome
from paceline.sim.replay import Setup
from paceline.sim.trace import Arrival, faster, read_trace

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRACES = {"azure": "azure_llm_2023_conv.csv", "mooncake": "mooncake_conversation.jsonl"}
REQUESTS = {"azure": {8: 4000, 32: 9600, 128: 16000}, "mooncake": {8: 1600, 32: 4000, 128: 8000}}
"""How many requests of a trace are served, by ranks."""

STEADY, SATURATED, BURSTS = "steady", "saturated", "bursts"
SHARES = {STEADY: 0.95, SATURATED: 1.5, BURSTS: 0.7}
"""Load to the share of what the oracle sustains."""

SEED = 7
PERIODS = 6
BURST_SHARE = 0.5
WARM_UP = 0.2

OURS = "paceline"
ONCE = ("oracle", "sglang-total-tokens", "bf-io", "trtllm-adp")
"""Those for whom it makes no difference how many front-ends there are: one queue, or one controller."""

INDEPENDENT = ("oracle", "vllm-0.32", "vllm-0.9", "sglang-total-tokens", "round-robin", "power-of-two", OURS)
LOCKSTEP = ("oracle", "vllm-0.32", "vllm-0.9", "round-robin", "bf-io", "trtllm-adp", OURS)
TUNED = "vllm-0.32, tuned"
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
DEFAULT_BUDGET = 2048
TUNING_FRONTENDS = 4


class Bench:
    """Runs everything once, and keeps what makes no difference."""

    def __init__(self, data: Path, scale: float, engine: EngineShape) -> None:
        self._data = data
        self._scale = scale
        self._engine = engine
        self._traces: dict[str, list[Arrival]] = {}
        self._rates: dict[tuple[str, bool, int], float] = {}
        self._budgets: dict[Cell, int] = {}
        self._kept: dict[tuple[Cell, str, int], Outcome] = {}

    def row(self, cell: Cell) -> Iterator[Measured]:
        for policy in LOCKSTEP if cell.lockstep else INDEPENDENT:
            yield Measured(cell, policy, DEFAULT_BUDGET, self._outcome(cell, policy, DEFAULT_BUDGET))
        if cell.lockstep:
            budget = self._tuned(cell)
            yield Measured(cell, TUNED, budget, self._outcome(cell, "vllm-0.32", budget))

    def ours(self, cell: Cell) -> Measured:
        return Measured(cell, OURS, DEFAULT_BUDGET, self._outcome(cell, OURS, DEFAULT_BUDGET))

    def _tuned(self, cell: Cell) -> int:
        """The token budget that suits vLLM's rule best, as somebody would find it who has so many front-ends."""
        group = replace(cell, frontends=TUNING_FRONTENDS)
        if group not in self._budgets:
            swept = [(budget, self._outcome(group, "vllm-0.32", budget)) for budget in BUDGETS]
            best = max if cell.load == SATURATED else min
            self._budgets[group], _ = best(swept, key=lambda one: merit(one[1], cell.load))
        return self._budgets[group]

    def _outcome(self, cell: Cell, policy: str, budget: int) -> Outcome:
        key = (replace(cell, frontends=1) if policy in ONCE else cell, policy, budget)
        if key not in self._kept:
            self._kept[key] = replay_of(self._setup(key[0], policy, budget), self._arrivals(cell)).run()
        return self._kept[key]

    def _setup(self, cell: Cell, policy: str, budget: int) -> Setup:
        routing = "sticky" if policy == OURS else policy
        return Setup(
            cell.ranks, cell.frontends, cell.lockstep, routing, engine=replace(self._engine, budget=budget),
            warm_up=WARM_UP,
        )  # fmt: skip

    def _arrivals(self, cell: Cell) -> list[Arrival]:
        requests = self._segment(cell)
        rate = SHARES[cell.load] * self._sustained(cell)
        if cell.load != BURSTS:
            return at_rate(at_random(requests), rate)
        arrivals = at_rate(requests, rate)
        return in_bursts(arrivals, (arrivals[-1].at + 1e-9) / PERIODS, BURST_SHARE)

    def _segment(self, cell: Cell) -> list[Arrival]:
        if cell.trace not in self._traces:
            self._traces[cell.trace] = read_trace(self._data / TRACES[cell.trace])
        counts = REQUESTS[cell.trace]
        return self._traces[cell.trace][: int(self._scale * counts.get(cell.ranks, 100 * cell.ranks))]

    def _sustained(self, cell: Cell) -> float:
        """Output tokens a second that the oracle sustains.

        All requests come at once, and the queue is worked off: how long until the last one has its first token? What
        follows is a shrinking batch, and says nothing of the rate.
        """
        key = (cell.trace, cell.lockstep, cell.ranks)
        if key not in self._rates:
            requests = [replace(one, at=0.0) for one in self._segment(cell)]
            made = replay_of(self._setup(cell, "oracle", DEFAULT_BUDGET), requests)
            made.run()
            begun_s = max(one.first - one.asked for answers in made.answers() for one in answers.values())
            self._rates[key] = sum(one.answer_tokens for one in requests) / begun_s
        return self._rates[key]


def at_random(requests: list[Arrival]) -> list[Arrival]:
    """The same requests at random moments, one a second in the mean."""
    chance, now, found = Random(SEED), 0.0, []
    for one in requests:
        now += chance.expovariate(1.0)
        found.append(replace(one, at=now))
    return found


def at_rate(requests: list[Arrival], tokens_per_s: float) -> list[Arrival]:
    """The same requests, so fast that they ask for so many output tokens a second."""
    natural = sum(one.answer_tokens for one in requests) / requests[-1].at
    return faster(requests, tokens_per_s / natural)


def in_bursts(arrivals: list[Arrival], period_s: float, share: float) -> list[Arrival]:
    """The same requests with those of each `period_s` squeezed into the first `share` of it."""
    return [replace(one, at=one.at // period_s * period_s + one.at % period_s * share) for one in arrivals]


def merit(outcome: Outcome, load: str) -> float:
    """What a row is about: tokens a second where it is saturated, else the 99th percentile of first tokens."""
    return outcome.throughput_tokens_per_s if load == SATURATED else outcome.ttft_p99_ms


def cells(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(trace, lockstep, ranks, frontends, load)
        for ranks in args.ranks
        for trace in args.traces
        for lockstep in (False, True)
        if args.mode in ("both", "lockstep" if lockstep else "independent")
        for load in SHARES
        for frontends in args.frontends
    ]


def read(path: Path) -> list[Measured]:
    """What was measured before; of the same figure the last one."""
    lines = [msgspec.json.decode(line, type=Measured) for line in path.read_bytes().splitlines()]
    return list({(one.cell, one.policy): one for one in lines}.values())


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="routing.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 ranks, 1 and 4 front-ends, a quarter of the requests")
    parser.add_argument("--ranks", type=numbers, default=[8, 32, 128])
    parser.add_argument("--front-ends", dest="frontends", type=numbers, default=[1, 4, 16])
    parser.add_argument("--traces", type=lambda text: text.split(","), default=list(TRACES))
    parser.add_argument("--mode", choices=["both", "independent", "lockstep"], default="both")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the traces (default: ../shared/data)")
    parser.add_argument("--slots", type=int, default=EngineShape().slots)
    parser.add_argument("--kv-tokens", type=int, default=EngineShape().kv_tokens)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure there, and go on from what it has")
    parser.add_argument("--known", action="store_true", help="measure nothing: write what the file of --json has")
    parser.add_argument("--ours", action="store_true", help="with --json: ours anew, the others as the file has them")
    parser.add_argument("--write", action="store_true", help="write bench/results/routing.md and its plots")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.frontends = [8], [1, 4]
    bench = Bench(args.data, 0.25 if args.quick else 1.0, EngineShape(slots=args.slots, kv_tokens=args.kv_tokens))
    begin, measured = time.monotonic(), list[Measured]()
    known = read(args.json) if args.json and args.json.exists() else []
    there = {one.cell for one in known}
    rows = [cell for cell in cells(args) if cell in there or not args.known]
    for place, cell in enumerate(rows, 1):
        row = [one for one in known if one.cell == cell]
        new = list(bench.row(cell)) if not row else [bench.ours(cell)] if args.ours else []
        if new and args.json:
            with args.json.open("ab") as file:
                file.writelines(msgspec.json.encode(one) + b"\n" for one in new)
        row = [*(one for one in row if one.policy != OURS or not new), *new]
        measured += row
        print(to_console(row, f"{place}/{len(rows)}, {time.monotonic() - begin:.0f} s"), flush=True)
    if args.write:
        write(measured, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
