"""Chaos: a real deployment under steady streams, while its processes are killed and stopped at random from a seed,
it is suspended and resumed, gets more ranks and fewer, and garbage comes on every socket.

    python -m bench.chaos --seed 7 --minutes 2 --engine timed

Each stream is compared with the text of the same request undisturbed. Printed are the faults by kind, the requests,
those lost (an error, or no end) and wrong (another text), those refused on arrival since no rank was ready, those whose
front-end was killed under them, and the longest stall: the longest time between two pieces of one stream. The exit
status is 1 where one was lost or wrong. Suspensions and scaling only delay.
"""

from __future__ import annotations

import argparse
import sys
import time

from bench.chaos_calls import Scaler, Suspender
from bench.chaos_clients import Client, Tally, asks_of
from bench.chaos_mischief import FRONTENDS, RANKS, Mischief, flood_of
from tests.serving import deployment

MOE_SIZES = ("layers=2", "d_model=32", "heads=2", "expert_hidden=32")
ENGINES = {
    "timed": ["--engine", "timed", "--engine-option", "step_ms=10"],
    "moe": ["--engine", "moe", *(part for size in MOE_SIZES for part in ("--engine-option", size))],
    "llama": ["--max-model-len", "512", "--max-num-seqs", "8"],
}
RANK_TIMEOUT_S = 1.0
SETTLE_S = 30.0


def chaos(engine: str, seed: int, minutes: float, clients: int) -> Tally:
    """Run it; returns what came of it."""
    tally = Tally()
    arguments = [*ENGINES[engine], "-dp", str(RANKS), "-asc", str(FRONTENDS), "--rank-timeout", str(RANK_TIMEOUT_S),
                 "--max-rank-restarts", "100000", "--max-rank-losses", "100"]  # fmt: skip
    with deployment(*arguments) as running:
        asks = asks_of(engine, running.openai.models.list().data[0].id)
        texts = [running.openai.completions.create(**ask).choices[0].text for ask in asks]
        readers = [Client(index, running, asks, texts, tally) for index in range(clients)]
        operators = [Suspender(running, seed, tally), Scaler(running, seed, tally, RANKS)]
        flood = flood_of(running, seed)
        for thread in (*readers, *operators, flood):
            thread.start()
        Mischief(running, seed, tally).go_on(time.monotonic() + 60 * minutes)
        flood.stop()
        for operator in operators:
            operator.stop()
        tally.faults.update({f"garbage, {name.strip('-')}": count for name, count in flood.sent.items()})
        for reader in readers:
            reader.over.set()
        end = time.monotonic() + SETTLE_S
        for reader in readers:
            reader.join(max(0.1, end - time.monotonic()))
            if reader.is_alive():
                tally.lost.append(f"no end within {SETTLE_S:g} s after the last fault")
        tally.lost += ["a traceback in the log"] if "Traceback" in running.output else []
        if tally.lost or tally.wrong:
            print(running.output, file=sys.stderr)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="timed")
    parser.add_argument("--clients", type=int, default=12)
    given = parser.parse_args()
    tally = chaos(given.engine, given.seed, given.minutes, given.clients)
    for kind, count in sorted(tally.faults.items()):
        print(f"{kind}: {count}")
    print(f"requests: {tally.requests}, lost: {len(tally.lost)}, wrong: {len(tally.wrong)}")
    print(f"refused on arrival (503 with Retry-After): {tally.refused}")
    print(f"connections that broke with their front-end: {tally.cut}")
    print(f"longest stall: {tally.longest_stall_s:.2f} s, {tally.longest_stall}")
    print(f"longest suspension: {tally.longest_suspension_s:.2f} s, {tally.longest_suspension}")
    for what in [*tally.wrong, *tally.lost][:20]:
        print(what)
    sys.exit(1 if tally.lost or tally.wrong else 0)


if __name__ == "__main__":
    main()
