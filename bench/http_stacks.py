"""Measures the CPU cost of HTTP stacks for token streaming: `python bench/http_stacks.py --help`.

One server process a stack, pinned to core 0; this process (feeder and client) is pinned to core 1.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import zmq

# The package beside this file has its name and goes before it in a search for modules.
from http_stacks.client import Conn, Figure, Load, check_stream, measure_requests
from http_stacks.probe import probe_all
from http_stacks.server import VARIANTS

# Steps in flight when unpaced: one which the server works on and one which waits for it.
WINDOW = 2
BENCH = Path(__file__).resolve().parent


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    push: zmq.Socket[bytes]
    errors: IO[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_accepting(server_process: subprocess.Popen[str], port: int) -> None:
    """Only the stacks which bind by themselves are not there yet at `ready`."""
    for _ in range(200):
        try:
            Conn(port).sock.close()
            return
        except ConnectionRefusedError:
            pass
        try:
            server_process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise RuntimeError("the server ended before it accepted")
    raise TimeoutError("the server does not accept")


@contextmanager
def running(label: str) -> Iterator[Server]:
    context = zmq.Context.instance()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        endpoint = f"ipc://{folder}/steps"
        push = context.socket(zmq.PUSH)
        push.bind(endpoint)
        port = free_port()
        command = [sys.executable, "-m", "http_stacks.server", label, "--port", str(port), "--endpoint", endpoint]
        process = subprocess.Popen(command, cwd=BENCH, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                errors.seek(0)
                raise RuntimeError(errors.read().decode()[-2000:])
            wait_accepting(process, port)
            yield Server(process, port, push, errors)
        finally:
            process.terminate()
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            push.close(linger=0)


def measure(label: str, tokens: int, rate: float, requests: int) -> dict[str, Figure]:
    """All figures of one stack, in one server process."""
    figures: dict[str, Figure] = {}
    with running(label) as server:
        load = Load(server.port, server.push, server.pid, 0)
        check_stream(load)
        for streams in (1, 32, 128):
            load.open(streams)
            steps = max(tokens // (6 if streams == 1 else 1) // streams, 1)
            warm = steps // 5
            load.feed(warm, 0.0, WINDOW)
            fast = load.measure(steps, 0.0, WINDOW)
            # A single stream's step is one token: a step each millisecond is a fast decode already.
            pace = min(rate if streams > 1 else 1000.0, 0.6 * fast.rate)
            paced = load.measure(steps, streams / pace, 64)
            load.close(warm + 2 * steps)
            figures[f"{streams} fast"], figures[f"{streams} paced"] = fast, paced
        measure_requests(server.port, server.pid, requests // 5)
        figures["request"] = measure_requests(server.port, server.pid, requests)
    return figures


COLUMNS = ("1 fast", "1 paced", "32 fast", "32 paced", "128 fast", "128 paced", "request")


def table(results: dict[str, list[dict[str, Figure]]]) -> str:
    head = (*COLUMNS, "system share, 32 paced", "tokens/s, 128 fast", "events a read, 128 fast")
    lines = ["| stack, hand-over | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for label, rounds in results.items():
        if not rounds:
            continue
        cells = []
        for column in COLUMNS:
            values = [figures[column].us for figures in rounds]
            mark = "*" if any(figures[column].lagged for figures in rounds) else ""
            cells.append(f"{statistics.median(values):.1f}{mark} ({min(values):.1f})")
        cells.append(f"{100 * statistics.median(f['32 paced'].system_share for f in rounds):.0f} %")
        cells.append(f"{statistics.median(f['128 fast'].rate for f in rounds):,.0f}")
        cells.append(f"{statistics.median(f['128 fast'].merged for f in rounds):.1f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the rows whose label contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--rate", type=float, default=8_000.0, help="tokens a second when paced (32 and 128 streams)")
    parser.add_argument("--requests", type=int, default=6_000)
    parser.add_argument("--probe", action="store_true", help="probe disconnects and back-pressure instead")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    args = parser.parse_args()
    os.sched_setaffinity(0, {1})
    labels = [label for label in VARIANTS if args.only in label]
    if args.probe:
        for label in labels:
            with running(label) as server:
                print(probe_all(label, server.port, server.push, server.process, server.errors), flush=True)
        return
    results: dict[str, list[dict[str, Figure]]] = {label: [] for label in labels}
    # Rounds outside, so that a neighbour's busy minute does not fall on one stack alone.
    for number in range(args.rounds):
        for label in labels:
            print(f"round {number + 1}: {label}", file=sys.stderr, flush=True)
            results[label].append(measure(label, args.tokens, args.rate, args.requests))
    print(table(results))
    if args.json:
        plain = {label: [{c: asdict(f) for c, f in r.items()} for r in rounds] for label, rounds in results.items()}
        args.json.write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
