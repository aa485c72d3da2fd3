"""Chaos: a real deployment under steady streams, while its processes are killed and stopped at random from a seed,
it is suspended and resumed, gets more ranks and fewer, and bad frames come on every socket.

    python -m bench.chaos --seed 7 --minutes 2 --engine timed
    python -m bench.chaos --seed 7 --minutes 2 --engine moe --nodes 2

Each stream is compared with the text of the same request undisturbed. Printed are the faults by kind, the requests,
those lost (an error, or no end) and wrong (another text), those refused on arrival since no rank was ready, those whose
front-end was killed under them, and the longest stall: the longest time between two pieces of one stream. The exit
status is 1 where one was lost or wrong. Suspensions and scaling only delay. Over two nodes links are cut, too, and a
worker node and the head die and come back; a head takes the connections of its clients with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench.chaos_mischief import FRONTENDS, RANKS, Client, Mischief, Scaler, Suspender, Tally, asks_of, flood_of
from bench.chaos_nodes import NodesMischief, two_nodes
from tests.serving import deployment

MOE_SIZES = ("layers=2", "d_model=32", "heads=2", "expert_hidden=32")
ENGINES = {
    "timed": ["--engine", "timed", "--engine-option", "step_ms=10"],
    "moe": ["--engine", "moe", *(part for size in MOE_SIZES for part in ("--engine-option", size))],
    "llama": ["--max-model-len", "512", "--max-num-seqs", "8"],
}
RANK_TIMEOUT_S = 1.0
SETTLE_S = 30.0


def chaos(engine: str, seed: int, minutes: float, clients: int, nodes: int = 1, log: str | None = None) -> Tally:
    tally = Tally()
    arguments = [*ENGINES[engine], "-asc", str(FRONTENDS), "--rank-timeout", str(RANK_TIMEOUT_S),
                 "--max-rank-restarts", "100000", "--max-rank-losses", "100"]  # fmt: skip
    started: Any = two_nodes(arguments) if nodes > 1 else deployment(*arguments, "-dp", str(RANKS))
    with started as running:
        asks = asks_of(engine, running.openai.models.list().data[0].id)
        texts = [running.openai.completions.create(**ask).choices[0].text for ask in asks]
        readers = [Client(index, running, asks, texts, tally) for index in range(clients)]
        operators = [Suspender(running, seed, tally), Scaler(running, seed, tally, RANKS)]
        flood = flood_of(running, seed)
        for thread in (*readers, *operators, flood):
            thread.start()
        mischief = (NodesMischief if nodes > 1 else Mischief)(running, seed, tally)
        mischief.go_on(time.monotonic() + 60 * minutes)
        flood.stop()
        for operator in operators:
            operator.stop()
        tally.faults.update({f"bad frames, {name.strip('-')}": count for name, count in flood.sent.items()})
        for reader in readers:
            reader.over.set()
        end = time.monotonic() + SETTLE_S
        for reader in readers:
            reader.join(max(0.1, end - time.monotonic()))
            if reader.is_alive():
                tally.lost.append(f"no end within {SETTLE_S:g} s after the last fault")
        tally.lost += ["a traceback in the log"] if "Traceback" in running.output else []
        if log is not None:
            Path(log).write_text(running.output)
        elif tally.lost or tally.wrong:
            print(running.output, file=sys.stderr)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="timed")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="2: in network namespaces, as root")
    parser.add_argument("--log", metavar="FILE", help="where the deployment's log goes; stderr where something is lost")
    given = parser.parse_args()
    tally = chaos(given.engine, given.seed, given.minutes, given.clients, given.nodes, given.log)
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
