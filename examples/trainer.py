"""A trainer that gives a running deployment new weights again and again, as in reinforcement learning.

    python examples/trainer.py [--updates 200] [--ranks 2] [--streams 8]

It serves a mixture of experts whose weights are a file that all ranks have mapped, keeps streams of requests
running, and meanwhile suspends, rewrites the file, and resumes. After each update a question with a known answer
shows which weights every rank has. Exit status 1 where an answer is wrong or a request fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from paceline.control import Control
from paceline.engines.moe import MoeConfig
from paceline.engines.moe_model import write_weights


class Server:
    """A deployment in a process of its own."""

    def __init__(self, weights: Path, ranks: int) -> None:
        arguments = ["--engine", "moe", "--engine-option", f"weights={weights}", "-dp", str(ranks), "--port", "0"]
        command = [sys.executable, "-m", "paceline", "serve", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "serves on " in line:
                self.url = line.split("serves on ")[1].split("/v1")[0]
                break
        else:
            raise SystemExit("the deployment did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def complete(self, tokens: int, rank: int | None = None) -> str:
        """A greedy answer of `tokens` tokens."""
        body = {"prompt": "the same question", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        headers = {"content-type": "application/json"} | ({} if rank is None else {"x-data-parallel-rank": str(rank)})
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            choice = json.load(answer)["choices"][0]
        if choice["finish_reason"] != "length":
            raise RuntimeError(f"ended by {choice['finish_reason']}")
        return str(choice["text"])

    def close(self) -> None:
        """End it and wait."""
        self.process.terminate()
        self.process.wait(60)


class Streams:
    """Clients that ask without a pause until `stop`."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self._stopping = threading.Event()
        self.served = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._server.complete(32)
                self.served += 1
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return

    def stop(self) -> None:
        """Let each finish what it has begun."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def train(server: Server, weights: Path, updates: int, ranks: int) -> tuple[list[float], list[float], int]:
    """Update the weights this often; returns the times to stop and to be back, in seconds, and wrong answers."""
    control = Control(server.url)
    stops, restarts, wrong = [], [], 0
    known: dict[int, str] = {}
    for update in range(updates):
        seed = update % 2
        begin = time.monotonic()
        control.pause("keep")
        stops.append(time.monotonic() - begin)
        write_weights(weights, MoeConfig(), seed)
        begin = time.monotonic()
        control.resume()
        text = server.complete(6, rank=update % ranks)
        restarts.append(time.monotonic() - begin)
        if text != known.setdefault(seed, text) or (len(known) == 2 and known[0] == known[1]):
            wrong += 1
    return stops, restarts, wrong


def show(what: str, seconds: list[float]) -> None:
    """One line of figures, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{what:8} p50 {statistics.median(ordered) * 1000:7.1f} ms   p99 {p99 * 1000:7.1f} ms")


def main() -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description="Update the weights of a running deployment again and again.")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights")
        write_weights(weights, MoeConfig(), 0)
        server = Server(weights, options.ranks)
        try:
            streams = Streams(server, options.streams)
            stops, restarts, wrong = train(server, weights, options.updates, options.ranks)
            streams.stop()
        finally:
            server.close()
    show("stop", stops)
    show("restart", restarts)
    print(f"{options.updates} updates, {streams.served} requests served beside them, "
          f"{len(streams.failures)} failed, {wrong} wrong answers")  # fmt: skip
    for failure in streams.failures[:3]:
        print(failure)
    return 1 if wrong or streams.failures else 0


if __name__ == "__main__":
    sys.exit(main())
