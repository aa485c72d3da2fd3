"""`make bench-vllm`: vLLM's own coordinator against ours, as real processes, on the same rig in the same run."""

from __future__ import annotations

import argparse
import compileall
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.vllm_measure import BACKLOG, Busy, busy, flood, isolated, wakes
from bench.vllm_report import Row, to_markdown
from bench.vllm_rig import Rig, rigs, start_and_memory
from tests.vllm.pairs import StockCoordinators

SOURCE = Path(__file__).resolve().parent.parent / "src"
RESULTS = Path(__file__).resolve().parent / "results" / "vllm.md"
RANKS = (2, 64, 384)
FRONTENDS = (1, 8)
STEPS_MS = (5, 20)
PUSHED_A_SECOND = 20_000
"""What the rig can send beside all else."""


def measure(stock: StockCoordinators, size: int, frontends: int, quick: bool) -> Row:
    found: dict[str, Any] = {}
    with rigs(stock, size, frontends, waves=True, echo=True) as made:
        found["wakes"] = wakes(made, 60 if quick else 300 if size < 384 else 150)
        floor = made.pop("echo")
        floor.drain()
        both = {"stock": made["stock"], "ours": made["ours"]}
        found["isolated"] = isolated(both, 10 if quick else 60)
        found["busy"] = all_busy(both, size, True, 2.0 if quick else 5.0)
        found["flood"] = {name: flood(rig, BACKLOG // 8 if quick else BACKLOG) for name, rig in both.items()}
        found["memory"] = {name: rig.memory_mb() for name, rig in both.items()}
        floor.close()
    with rigs(stock, size, frontends, waves=False, echo=False) as made:
        found["isolated, independent"] = isolated(made, 10 if quick else 60)
        found["busy, independent"] = all_busy(made, size, False, 2.0 if quick else 5.0)
    return Row(size, frontends, found)


def all_busy(both: dict[str, Rig], size: int, lockstep: bool, seconds: float) -> dict[int, dict[str, Busy]]:
    """By the length of a step, as far as the rig can keep up."""
    steps = [step_ms for step_ms in STEPS_MS if size * 1000 / step_ms <= PUSHED_A_SECOND]
    return {ms: {name: busy(rig, ms / 1000, lockstep, seconds) for name, rig in both.items()} for ms in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look, not a result: fewer rounds, nothing written")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--front-ends", type=int, nargs="*", default=FRONTENDS)
    options = parser.parse_args()
    # As an installation has it: vLLM's is compiled, too.
    compileall.compile_dir(SOURCE, quiet=1)
    starts = [start_and_memory() for _ in range(1 if options.quick else 3)]
    start = {name: [statistics.median(one[name][part] for one in starts) for part in range(3)] for name in starts[0]}
    stock = StockCoordinators()
    rows: list[Row] = []
    try:
        for size in options.ranks:
            for frontends in options.frontends:
                rows.append(measure(stock, size, frontends, options.quick))
                print(f"{size} ranks, {frontends} front-ends: done", file=sys.stderr, flush=True)
    finally:
        stock.close()
    text = to_markdown(start, rows)
    print(text)
    if not options.quick:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
