"""What one tenant's flood does to another: `make bench-tenants`.

Real processes: `timed` ranks behind two front-ends, and streaming clients over loopback. A tenant asks for a quarter of
what the ranks can do, alone; then beside requests for ten times what they can do, by nobody in particular as its own
are; then by another tenant. Times are those of whole answers, from when each was to be sent.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

from bench.overload import ANSWER_TOKENS, TOO_MANY, Load, poisson
from msgspec import Struct
from tests.serving import deployment

RANKS, FRONTENDS, SLOTS, QUEUE, STEP_MS = 2, 2, 16, 64, 60
ANSWER_S = ANSWER_TOKENS * STEP_MS / 1000
CAPACITY = RANKS * SLOTS / ANSWER_S
OWN, FLOOD = 0.25, 10.0
LEAD_S = 2 * ANSWER_S
"""How long the flood is there before anything is measured."""


class Figures(Struct):
    """Of the tenant's requests. Times in seconds, infinite where none was served."""

    served: int
    refused: int
    p50_s: float
    p99_s: float


def figures(own: Load) -> Figures:
    times = sorted(got.last - got.at for got in own.got if got.status == 200)
    refused = sum(got.status == TOO_MANY for got in own.got)
    if not times:
        return Figures(0, refused, float("inf"), float("inf"))
    return Figures(len(times), refused, statistics.median(times), times[len(times) * 99 // 100])


async def measured(port: int, seconds: float, flood: float, own_name: str, flood_name: str) -> Figures:
    own, other = Load(port, own_name), Load(port, flood_name)
    begin = time.monotonic() + 0.2
    end = begin + LEAD_S + seconds
    # Of one length they would all end at once, again and again, and nobody could begin in between.
    lengths = random.Random(3)
    moments = poisson(begin, end, flood * CAPACITY, 1) if flood else []
    floods = asyncio.gather(*(other.ask(at, answer_tokens=lengths.randint(1, 2 * ANSWER_TOKENS - 1)) for at in moments))
    mine = own.at_moments(poisson(begin + LEAD_S, end, OWN * CAPACITY, 2))
    await asyncio.gather(floods, mine)
    return figures(own)


def run(seconds: float, flood: float = FLOOD) -> dict[str, Figures]:
    """`flood`: in parts of what the ranks can do."""
    arguments = ("--engine", "timed", "--engine-option", f"step_ms={STEP_MS}", "-dp", str(RANKS),
                 "-asc", str(FRONTENDS), "--max-num-seqs", str(SLOTS), "--max-waiting", str(QUEUE))  # fmt: skip
    with deployment(*arguments) as running:
        port = int(running.url.rpartition(":")[2])
        return {
            "alone": asyncio.run(measured(port, seconds, 0.0, "", "")),
            "beside a flood, no tenants": asyncio.run(measured(port, seconds, flood, "", "")),
            "beside another tenant's flood": asyncio.run(measured(port, seconds, flood, "quiet", "loud")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    print(f"{'':32}{'served':>8}{'refused':>9}{'p50':>8}{'p99':>8}")
    for name, one in run(parser.parse_args().seconds).items():
        print(f"{name:32}{one.served:8}{one.refused:9}{one.p50_s:8.2f}{one.p99_s:8.2f}")


if __name__ == "__main__":
    main()
