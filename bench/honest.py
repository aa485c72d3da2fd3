"""Is the simulator right? The same requests on real processes and in virtual time: `make bench-honest`.

Real: `paceline serve --engine timed` (or `timed-lockstep`), 8 ranks behind 2 front-ends, and a streaming client over
loopback that sends each request of a trace at its moment. Virtual: `paceline simulate --trace`, with the same costs.
The costs are an 8B-class model's, ten times as slow, so that what Python itself takes does not matter.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
from bench.overload import Got, Load
from bench.routing import DATA, TRACES, at_random
from bench.serve_deployment import Deployment as Served, ending_on_signals, serve_arguments
from msgspec.structs import replace

from paceline.engines.timed import CostModel
from paceline.sim.engine import EngineShape
from paceline.sim.replay import Replay, Setup
from paceline.sim.trace import Arrival, faster, read_trace

RESULTS = Path(__file__).resolve().parent / "results"
RANKS, FRONTENDS = 8, 2
SLOWER = 10
COSTS = CostModel(6.0 * SLOWER, 0.09 * SLOWER, 0.02 * SLOWER)
SHAPE = EngineShape(COSTS, slots=64, budget=2048, kv_tokens=1 << 24)
PROMPT_LIMIT = 8192
MORE = ("--max-waiting", "100000")
WITHIN = 0.15
FIGURES = ("TTFT p50, s", "TTFT p90, s", "TTFT p99, s", "output tokens/s")


async def load(port: int, arrivals: list[Arrival]) -> list[Got]:
    clients, begin = Load(port), time.monotonic() + 1.0
    asks = (clients.ask(begin + one.at, one.prompt_tokens, one.answer_tokens) for one in arrivals)
    came = list(await asyncio.gather(*asks))
    for got, one in zip(came, arrivals, strict=True):
        if got.tokens < one.answer_tokens / 2:
            raise RuntimeError(f"an answer has {got.tokens} of {one.answer_tokens} tokens")
    return came


def figures(waits: list[float], tokens: int, span: float) -> list[float]:
    return [*(float(np.percentile(waits, percent)) for percent in (50, 90, 99)), tokens / span]


def real(arguments: list[str], arrivals: list[Arrival]) -> tuple[list[float], list[str]]:
    """On processes; returns the figures, and what the deployment complained of."""
    served = Served(FRONTENDS, 0.0, RANKS, arguments)
    try:
        times = asyncio.run(load(served.port, arrivals))
        complaints = served.complaints()
    finally:
        served.close()
    span = max(one.last for one in times) - min(one.at for one in times)
    tokens = sum(one.answer_tokens for one in arrivals)
    return figures([one.first - one.at for one in times], tokens, span), complaints


def virtual(arrivals: list[Arrival], lockstep: bool, bind: str, seed: int) -> list[float]:
    run = Replay(Setup(RANKS, FRONTENDS, lockstep, engine=SHAPE, delay_s=0.0005, bind=bind, seed=seed), arrivals)
    outcome = run.run()
    waits = [one.first - one.asked for answers in run.answers() for one in answers.values()]
    return figures(waits, outcome.output_tokens, outcome.duration_s)


def segment(data: Path, count: int, a_second: float) -> list[Arrival]:
    """Requests of the conversation trace at random moments; prompts at most as long as the engine takes."""
    rows = read_trace(data / TRACES["azure"])[:count]
    return faster(
        at_random([replace(one, prompt_tokens=min(one.prompt_tokens, PROMPT_LIMIT)) for one in rows]), a_second
    )


def table(rows: list[tuple[str, list[float], list[float]]]) -> str:
    lines = ["| deployment | figure | processes | simulator | simulator / processes | within 15% |", "| --- " * 6 + "|"]
    for name, measured, simulated in rows:
        for figure, one, two in zip(FIGURES, measured, simulated, strict=True):
            ratio = two / one
            verdict = "yes" if abs(ratio - 1) <= WITHIN else "no"
            lines.append(f"| {name} | {figure} | {one:,.2f} | {two:,.2f} | {ratio:.3f} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="honest.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rates", type=lambda text: [float(one) for one in text.split(",")], default=[4.5, 8.0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the traces (default: ../shared/data)")
    parser.add_argument("--bind", choices=["broker", "arrival"], default="broker", help="in the simulator")
    parser.add_argument("--serve", type=str.split, default=[], metavar="FLAGS", help="more flags for `paceline serve`")
    parser.add_argument("--lockstep", action="store_true", help="the `timed-lockstep` engine too")
    parser.add_argument("--write", action="store_true", help="write bench/results/honest.md")
    args = parser.parse_args()
    rows: list[tuple[str, list[float], list[float]]] = []
    with ending_on_signals():
        for lockstep in (False, True) if args.lockstep else (False,):
            for rate in args.rates:
                arrivals = segment(args.data, args.requests, rate)
                engine = "paceline.engines.timed:TimedLockstepEngine" if lockstep else "timed"
                measured, complaints = real(
                    [*serve_arguments(FRONTENDS, RANKS, SHAPE, engine), *MORE, *args.serve], arrivals
                )
                for complaint in complaints:
                    print(f"the deployment says: {complaint}", file=sys.stderr)
                kind = "timed-lockstep" if lockstep else "timed"
                rows.append((f"{kind}, {rate:g} requests/s", measured, virtual(arrivals, lockstep, args.bind, 0)))
                print(table(rows[-1:]), flush=True)
    if args.write:
        command = f"make bench-honest ARGS='{' '.join(sys.argv[1:])}'"
        (RESULTS / "honest.md").write_text(document(rows, command, args.requests))
    return 0


def document(rows: list[tuple[str, list[float], list[float]]], command: str, requests: int) -> str:
    return f"""# The simulator against real processes

    {command}

{os.cpu_count()} cores ({platform.machine()}), shared with other work: {os.getloadavg()[0]:.1f} ran or waited to run at
the end (one-minute load).

{table(rows)}

{RANKS} ranks, {FRONTENDS} front-ends, the first {requests} requests of `azure_llm_2023_conv.csv` at random moments
(Poisson), by a client of ours over loopback that streams every answer. A step costs {COSTS.step_ms:g} ms,
{COSTS.prefill_ms:g} ms a prompt token and {COSTS.decode_ms:g} ms a request that decodes: an 8B-class model's costs, ten
times as slow, so that Python's own time does not matter. The simulator has the same costs and the same requests; which
front-end a request comes to is up to the kernel here and to a seed there. In lockstep every step of the processes waits
for the one of {RANKS} that the machine's cores serve last, which the simulator knows nothing of.
"""


if __name__ == "__main__":
    sys.exit(main())
