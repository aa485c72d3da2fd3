"""Fuzzing: so many inputs for each target, and a row for what came of it.

    python -m tests.fuzz --inputs 1000000 [--seed 1] [TARGET ...]

Targets whose names begin with `sockets-` are real processes, flooded over all their sockets while requests go on: so
many inputs for each kind of socket. Each target runs in a process of its own; the exit status is 1 where one found
something.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.fuzz.blind import Row, fuzz
from tests.fuzz.sockets import flood_sockets
from tests.fuzz.targets import TARGETS
from tests.fuzz.vllm_sockets import flood_vllm

SOCKETS = ("sockets-timed", "sockets-moe", "sockets-vllm")
HEAD = "| target | inputs | seconds | errors | remembered | RSS before, after (MB) |\n|---|---|---|---|---|---|"


def line_of(row: Row) -> str:
    return (
        f"| {row.name} | {row.inputs:,} | {row.seconds:.0f} | {row.errors} | {row.things:,} | "
        f"{row.rss_before_mb:.0f}, {row.rss_after_mb:.0f} |"
    )


def show(row: Row) -> None:
    """Progress, on one line that is written over and over."""
    print(f"\r{row.name}: {row.inputs:,} inputs, {row.seconds:.0f} s   ", end="", file=sys.stderr, flush=True)


def rows_of(name: str, inputs: int, seed: int) -> list[Row]:
    if name not in SOCKETS:
        return [fuzz(TARGETS[name], inputs, seed, show)]
    engine = name.partition("-")[2]
    return flood_vllm(inputs, seed, show) if engine == "vllm" else flood_sockets(engine, inputs, seed, show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    known = [*TARGETS, *SOCKETS]
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(known))
    given = parser.parse_args()
    if unknown := [name for name in given.targets if name not in known]:
        parser.error(f"no target {unknown[0]}; targets: {', '.join(known)}")
    if len(given.targets) == 1:
        rows = rows_of(given.targets[0], given.inputs, given.seed)
        print("\r", end="", file=sys.stderr)
        for row in rows:
            print(line_of(row), flush=True)
            if row.first_error:
                print(row.first_error, file=sys.stderr)
        sys.exit(any(row.errors for row in rows))
    print(HEAD, flush=True)
    failed = 0
    for name in given.targets or known:
        command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(given.inputs), "--seed", str(given.seed), name]
        failed += subprocess.run(command, check=False).returncode != 0
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
