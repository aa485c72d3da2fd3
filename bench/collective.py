"""`make bench-collective`: an all-reduce of two integers among local ranks, in the same processes.

`agreement` is a lockstep step agreement in full: what a rank puts in for the common prefill quota, the all-reduce of
it all, and the decision. `paceline` is the group of sockets, `gloo` torch's own call, which does not notice a
member's end. Each rank is a process; blocks of each take turns, so that all see the same machine. Without torch only
the first two are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from paceline.core.rank.prefill_quota import PART_REDUCTIONS, Part, decide
from paceline.engines.group import EpochEnded, RankGroup
from paceline.net.group import GroupListener, form_group

BLOCK = 200


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49] * 1e6, "p99": cuts[98] * 1e6}


def timed(call: Any, rounds: int) -> list[float]:
    """How long each of `rounds` calls took, in seconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def agreement(group: RankGroup, rank: int) -> None:
    """What ranks do when they agree: whether any has work, the wave, the suspension, the quota."""
    part = Part(2048, 500 * rank, 100, 256, 8_000_000, 90_000)
    agreed = group.all_reduce([1, 7, 0, *part.packed()], ["max", "max", "max", *PART_REDUCTIONS])
    decide(agreed[3:])


def member(rank: int, size: int, folder: str, blocks: int, with_gloo: bool, results: Connection) -> None:
    """One rank's process; rank 0 reports."""
    addresses = {peer: f"ipc://{folder}/group-{peer}" for peer in range(size)}
    listener = GroupListener(addresses[rank])
    group = form_group(listener, 1, rank, addresses, 60.0)
    calls: dict[str, Callable[[], Any]] = {
        "paceline": lambda: group.all_reduce([rank, 1], "max"),
        "agreement": lambda: agreement(group, rank),
    }
    if with_gloo:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        tensor = torch.tensor([rank, 1], dtype=torch.int64)
        calls["gloo"] = lambda: distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call, BLOCK)
    for _ in range(blocks):
        for name, call in calls.items():
            group.barrier()
            times[name] += timed(call, BLOCK)
    if rank == 0:
        results.send({name: percentiles(values) for name, values in times.items()})
    # Whoever is through first ends the group for the others.
    with contextlib.suppress(EpochEnded):
        group.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=25, help=f"blocks of {BLOCK} all-reduces of each kind")
    options = parser.parse_args()
    with_gloo = importlib.util.find_spec("torch") is not None
    spawning = get_context("spawn")
    reader, writer = spawning.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawning.Process(
                target=member, args=(rank, options.ranks, folder, options.blocks, with_gloo, writer), daemon=True
            )
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        if not reader.poll(300):
            raise SystemExit("bench-collective: no result within 300 s")
        found = reader.recv()
        for process in processes:
            process.join(10)
    print(f"all-reduce of 2 integers, {options.ranks} local ranks, {options.blocks * BLOCK} times each")
    for name, figures in found.items():
        print(f"  {name:9} p50 {figures['p50']:7.0f} us   p99 {figures['p99']:7.0f} us")
    if with_gloo:
        ratios = (f"{name} {found['paceline'][name] / found['gloo'][name]:.2f}" for name in ("p50", "p99"))
        print(f"  paceline to gloo: {', '.join(ratios)}")
    print(f"  agreement to paceline: p50 {found['agreement']['p50'] / found['paceline']['p50']:.2f}")
    if not with_gloo:
        print("  gloo: not measured, torch is not installed")


if __name__ == "__main__":
    main()
