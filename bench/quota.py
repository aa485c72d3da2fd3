"""The common prefill quota against none, on real processes: `make bench-quota`.

Each variant is a deployment of its own: ranks that run `timed-lockstep`, a coordinator, and one front-end in this
process. All stand at the same time and take turns; while one is loaded, the others' ranks are paused. A turn begins
with an empty deployment and keeps more requests at each rank than it has slots. All variants get the same requests in
a round, drawn from a trace where there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from quota_load import FullLoad, Size
from quota_report import Turn, replaced, section, table, to_console

from fleet import Fleet, connected
from paceline.core.rank.prefill_quota import setting_of
from paceline.net.frontend import FrontendShell
from paceline.sim.trace import read_trace

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
            fleet = stack.enter_context(
                Fleet(folder, args.ranks, "timed-lockstep", args.slots, True, setting_of(quota), changes)
            )
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
