"""What the secret costs: requests and tokens a second over tcp, encrypted and not, two deployments asked in turn.

    python -m bench.secret_cost --rounds 8

Each deployment has a head with the front-end and a worker with the ranks, in network namespaces of their own (as root):
every request and token crosses. Both stay up all the while and are asked one after the other, so that what else the
machine does meets both; printed are the medians, and the median of the rounds' ratios. The ranks' steps cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.namespaces import Host, hosts
from tests.serving import Command, command, cpu_s

from paceline.net.secret import make

PORT, CONNECTIONS, STREAMED = 8000, 16, 500
TOKENS, REQUESTS = "streamed tokens", "requests of one token"
Measured = tuple[float, float]
"""How many a second, and CPU microseconds of both nodes for each."""


class Pair:
    """A head and a worker that serve. `how`: with the secret, or without."""

    def __init__(self, head: Host, leading: Command, following: Command) -> None:
        self._address, self._commands = head.address, (leading, following)

    def cpu_s(self) -> float:
        return sum(cpu_s(pid) for one in self._commands for pid in (one.process.pid, *one.children()))

    def measure(self, what: str, seconds: float) -> Measured:
        cpu, begin = self.cpu_s(), time.monotonic()
        count = asyncio.run(self._ask(what == TOKENS, begin + seconds))
        return count / (time.monotonic() - begin), 1e6 * (self.cpu_s() - cpu) / count

    async def _ask(self, streams: bool, until: float) -> int:
        return sum(await asyncio.gather(*(self._go_on(streams, until) for _ in range(CONNECTIONS))))

    async def _go_on(self, streams: bool, until: float) -> int:
        """One request after the other on one connection; returns how many tokens came."""
        tokens = STREAMED if streams else 1
        body = json.dumps({"prompt": "a", "max_tokens": tokens, "stream": streams, "ignore_eos": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        reader, writer = await asyncio.open_connection(self._address, PORT, limit=1 << 20)
        count = 0
        while time.monotonic() < until:
            writer.write(head.encode() + b"\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in answer, answer
            if streams:
                while not (await reader.readuntil(b"\r\n\r\n")).endswith(b"0\r\n\r\n"):
                    pass
            else:
                length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.partition(b":")[2]))
            count += tokens
        writer.close()
        return count


@contextlib.contextmanager
def pair(head: Host, worker: Host, *how: str) -> Iterator[Pair]:
    common = ["serve", "--engine", "timed", "--engine-option", "step_ms=0", "--max-num-seqs", "64"]
    common += ["-dp", "2", "-dpa", head.address, *how]
    with (
        command(*common, "-dpl", "0", "--host", "0.0.0.0", "--port", str(PORT), prefix=head.prefix) as leading,
        command(*common, "-dpl", "2", "--headless", prefix=worker.prefix) as following,
    ):
        leading.wait_line("serves on http")
        yield Pair(head, leading, following)


def measure(rounds: int, seconds: float) -> dict[str, list[tuple[Measured, Measured]]]:
    """By what was asked for, each round's two measurements, without the secret and with it."""
    with tempfile.TemporaryDirectory() as folder, hosts(4) as nodes:
        make(Path(folder) / "secret")
        with (
            pair(nodes[0], nodes[1], "--insecure") as plain,
            pair(nodes[2], nodes[3], "--secret-file", f"{folder}/secret") as locked,
        ):
            for one in (plain, locked):
                one.measure(REQUESTS, 1.0)
            return {
                what: [(plain.measure(what, seconds), locked.measure(what, seconds)) for _ in range(rounds)]
                for what in (REQUESTS, TOKENS)
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    for what, found in measure(given.rounds, given.seconds).items():
        for index, (unit, better) in enumerate((("a second", 1), ("CPU us each", -1))):
            plain, locked = (statistics.median(one[side][index] for one in found) for side in (0, 1))
            ratio = statistics.median(one[1][index] / one[0][index] for one in found)
            worse = 100 * (ratio - 1) * -better
            print(f"{what}, {unit}: {plain:,.1f} without, {locked:,.1f} with the secret; {worse:+.1f}% cost")


if __name__ == "__main__":
    main()
