"""Agentic sessions on simulated ranks: our default beside what other systems do, and a bound: `make bench-sessions`.

So many sessions at once, a closed loop: each turn comes some time after the answer before it has ended. All begin at
the same moment with nothing in any cache, and TURNS turns a session are served. Every row serves the same sessions
with every way to choose ranks, in orders drawn by SEEDS.

The bound: each turn is alone on a rank of its own that has all that was ever computed, of whichever session: caches
without end, and no queue. No way to choose ranks can have a shorter time to a first token, nor more turns a second, and
none comes near it where memory or ranks are short: it tells how far there is to go at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from heapq import heapify, heapreplace
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from bench.replay import replay_of
from bench.routing_report import RESULTS
from bench.session_peers import SESSION_CLIENTS
from msgspec import Struct

from paceline.sim.engine import EngineShape
from paceline.sim.replay import Setup
from paceline.sim.trace import SESSION_BLOCK_TOKENS, Session, Sessions, read_sessions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "agentic_sessions.jsonl"
TURNS = 16
SEEDS = 3
KV_TOKENS = 1 << 20
OURS, BEFORE, BOUND = "paceline", "paceline, least-load", "bound"
ROUTINGS = {OURS: "sticky", BEFORE: "least-load"} | {name: name for name in SESSION_CLIENTS}
ROWS = {8: (32, 64, 96, 160), 32: (256, 512)}
WORDS = "## In words"
"""What stands behind this in the report was written by hand, and stays."""
FIGURES = ("turns_per_s", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "hit_rate", "tokens_per_s")


class Row(Struct, frozen=True):
    """What is served by whom."""

    ranks: int
    frontends: int
    sessions: int


class Served(Struct, frozen=True):
    """One run's figures, in the names of `Outcome`."""

    row: Row
    seed: int
    by: str
    turns_per_s: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    hit_rate: float
    tokens_per_s: float


def sessions(found: list[Session], row: Row, seed: int) -> Sessions:
    """The same for all that serve it."""
    order = list(found)
    Random(seed).shuffle(order)
    # The first one must fit, whichever it is.
    order.sort(key=lambda one: one.turns[0][1] + one.turns[0][2] > KV_TOKENS)
    return Sessions(order, KV_TOKENS, row.sessions, None, seed, TURNS * row.sessions)


def serve(found: list[Session], row: Row, seed: int, by: str) -> Served:
    if by == BOUND:
        return bound(sessions(found, row, seed), row, seed)
    engine = EngineShape(kv_tokens=KV_TOKENS, block_tokens=SESSION_BLOCK_TOKENS)
    setup = Setup(row.ranks, row.frontends, routing=ROUTINGS[by], engine=engine, seed=seed)
    made = replay_of(setup, sessions(found, row, seed)).run()
    return Served(
        row, seed, by, made.turns_per_s, made.ttft_p50_ms, made.ttft_p90_ms, made.ttft_p99_ms, made.prefix_hit_rate,
        made.throughput_tokens_per_s,
    )  # fmt: skip


def bound(load: Sessions, row: Row, seed: int) -> Served:
    """Each turn alone on a rank that has everything."""
    shape, known = EngineShape(block_tokens=SESSION_BLOCK_TOKENS), set[int]()
    # By when they come; the next of a session once the one before has ended.
    coming = [(turn.at, place, turn) for place in range(row.sessions) if (turn := load.next(place)) is not None]
    heapify(coming)
    firsts, prompts, hits, answers, last = list[float](), 0, 0, 0, 0.0
    while len(firsts) < load.turns:
        now, place, arrival = coming[0]
        whole = arrival.blocks[: (arrival.prompt_tokens - 1) // SESSION_BLOCK_TOKENS]
        there = next((count for count, block in enumerate(whole) if block not in known), len(whole))
        known.update(arrival.blocks)
        tokens = arrival.prompt_tokens - there * SESSION_BLOCK_TOKENS
        steps = -(-tokens // shape.budget)
        first_s = shape.costs.seconds(tokens, 0) + (steps - 1) * shape.costs.seconds(0, 0)
        ends = now + first_s + (arrival.answer_tokens - 1) * shape.costs.seconds(0, 1)
        firsts.append(1e3 * first_s)
        prompts, hits = prompts + arrival.prompt_tokens, hits + there * SESSION_BLOCK_TOKENS
        answers, last = answers + arrival.answer_tokens, max(last, ends)
        following = load.next(place)
        assert following is not None, "one session follows the other"
        heapreplace(coming, (ends + following.at, place, following))
    p50, p90, p99 = map(float, np.percentile(firsts, (50, 90, 99)))
    return Served(row, seed, BOUND, load.turns / last, p50, p90, p99, hits / prompts, answers / last)


# The report ---------------------------------------------------------------------------------------


def mean(served: list[Served], figure: str) -> float:
    return statistics.fmean(getattr(one, figure) for one in served)


def cell(served: list[Served], figure: str) -> str:
    values, shares = [getattr(one, figure) for one in served], figure in ("hit_rate", "turns_per_s")
    middle, digits = statistics.fmean(values), 2 if shares else 0
    spread = f" ± {(max(values) - min(values)) / 2:,.{digits}f}" if len(values) > 1 else ""
    return f"{middle:,.{digits}f}{spread}"


def table(row: Row, all_of: list[Served]) -> Iterator[str]:
    """One row's figures by who served it, and how ours compare."""
    by = {name: [one for one in all_of if one.row == row and one.by == name] for name in (BOUND, *ROUTINGS)}
    by = {name: served for name, served in by.items() if served}
    peers = [name for name in by if name in SESSION_CLIENTS]
    seeds = len(by[OURS])
    yield f"### {row.ranks} ranks, {row.sessions} sessions, {row.frontends} front-end{'s' * (row.frontends > 1)}"
    yield f"\n{seeds} order{'s' * (seeds > 1)} of the sessions, mean ± half the spread.\n"
    yield "| by | turns/s | p50 | p90 | p99 to the first token, ms | hit rate | output tokens/s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, served in by.items():
        yield f"| {name} | " + " | ".join(cell(served, figure) for figure in FIGURES) + " |"
    said = []
    for figure, best_of in zip(FIGURES[:4], (max, min, min, min), strict=True):
        best = best_of(peers, key=lambda name: mean(by[name], figure))
        ratio = mean(by[OURS], figure) / mean(by[best], figure)
        limit = mean(by[OURS], figure) / mean(by[BOUND], figure)
        said.append(f"{figure} {ratio:.2f} x {best}'s, {limit:.2f} x the bound's")
    yield "\nOurs to the best peer of each figure: " + "; ".join(said) + ".\n"


def report(all_of: list[Served]) -> str:
    rows = sorted({one.row for one in all_of}, key=lambda row: (row.ranks, row.sessions, row.frontends))
    head = (
        "# Agentic sessions: where a request belongs\n\n    make bench-sessions ARGS='--write'\n\n"
        f"{(__doc__ or '').partition(chr(10) * 2)[2]}\n"
        f"{TURNS} turns a session, {KV_TOKENS:,} tokens of KV memory a rank, an 8B-class model's costs "
        "(6 ms a step, 0.09 ms a prompt token, 0.02 ms a request that decodes). Peers: `bench/session_peers.py`.\n"
    )
    return head + "\n" + "\n".join(line for row in rows for line in table(row, all_of))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=numbers, default=list(ROWS))
    parser.add_argument("--sessions", type=numbers, help="rows with so many alone")
    parser.add_argument("--front-ends", dest="frontends", type=numbers, default=[1, 4])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data", type=Path, default=DATA, help="a trace of sessions (default: of ../shared/data)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure there, and go on from what it has")
    parser.add_argument("--known", action="store_true", help="measure nothing: report what the file of --json has")
    parser.add_argument("--write", action="store_true", help="write bench/results/sessions.md")
    given = parser.parse_args()
    lines = given.json.read_bytes().splitlines() if given.json and given.json.exists() else []
    known = [msgspec.json.decode(line, type=Served) for line in lines]
    found, begin = read_sessions(given.data), time.monotonic()
    rows = [
        Row(ranks, frontends, count)
        for ranks in given.ranks for frontends in given.frontends for count in ROWS[ranks]
        if given.sessions is None or count in given.sessions
    ]  # fmt: skip
    wanted = [(row, seed, by) for seed in range(1, given.seeds + 1) for row in rows for by in (BOUND, *ROUTINGS)]
    there = {(one.row, one.seed, one.by) for one in known}
    for row, seed, by in wanted:
        if given.known or (row, seed, by) in there:
            continue
        known.append(serve(found, row, seed, by))
        print(f"{time.monotonic() - begin:6.0f} s  {msgspec.json.encode(known[-1]).decode()}", flush=True)
        if given.json:
            with given.json.open("ab") as file:
                file.write(msgspec.json.encode(known[-1]) + b"\n")
    if given.write:
        path = RESULTS / "sessions.md"
        _, there, words = (path.read_text() if path.exists() else "").partition(WORDS)
        path.write_text(report(known) + "\n" + there + words)


if __name__ == "__main__":
    main()
