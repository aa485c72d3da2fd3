"""A rank written from docs/PROTOCOL.md alone: it imports nothing of Paceline.

Its model is an echo: it answers a prompt with the prompt's token ids as words, one token a step. It is an
independent rank: it knows no waves. To see it work, run these three, each in a shell of its own:

    paceline coordinator -dp 1 --no-wave-coordination
    python examples/foreign_rank.py
    python examples/foreign_frontend.py
"""

import argparse
import math
import signal
import sys
import time
from itertools import islice
from typing import Any

import zmq
from msgspec import msgpack

VERSION, HELLO_REPEAT_S, SLOTS = 1, 0.1, 8


def decode(frame: bytes) -> Any:
    try:
        return msgpack.decode(frame)
    except Exception:  # garbage of any sort is dropped
        return None


class EchoRank:
    """One life of the rank: its sockets, and the requests it holds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.incarnation, self.ready = options.rank, time.time_ns(), False
        self.step_s, self.step_number, self.finished = options.step_ms / 1000, 0, 0
        # (front-end, its id for the request) to (tokens still to say, finish reason), in order of arrival.
        self.requests: dict[tuple[int, int], tuple[list[int], str]] = {}
        self.taken: dict[int, int] = {}
        self.hello_due, self.reported = 0.0, None
        self.context = zmq.Context()
        self.frontends = self.context.socket(zmq.ROUTER)
        self.frontends.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.frontends.setsockopt(zmq.MAXMSGSIZE, 64 * 2**20)
        self.frontends.bind(options.bind)
        self.address = self.frontends.getsockopt_string(zmq.LAST_ENDPOINT)
        self.broadcasts = self.context.socket(zmq.SUB)
        self.broadcasts.connect(options.back_publish)
        self.broadcasts.subscribe(b"")
        self.broadcasts.subscribe(b"\xfe" + self.rank.to_bytes(2, "little") + self.incarnation.to_bytes(8, "little"))
        self.coordinator = self.context.socket(zmq.PUSH)
        self.coordinator.connect(options.back_output)

    def run(self, timeout_s: float) -> None:
        give_up, step_due = time.monotonic() + timeout_s, 0.0
        while True:
            self.report()
            due = min(self.hello_due, step_due if self.requests else math.inf)
            self.read(max(0.0, due - time.monotonic()) if due < math.inf else None)
            now = time.monotonic()
            if not self.ready and now > give_up:
                sys.exit(f"foreign rank {self.rank}: no coordinator has admitted it within {timeout_s:g} s")
            if now >= self.hello_due:
                self.tell("rank-hello", VERSION, self.rank, self.incarnation, self.address, self.ready)
                self.hello_due = math.inf if self.ready else now + HELLO_REPEAT_S
            self.report()
            if self.requests and now >= step_due:
                self.step()
                step_due = now + self.step_s

    def read(self, wait_s: float | None) -> None:
        zmq.select([self.broadcasts, self.frontends], [], [], wait_s)
        while self.broadcasts.poll(0):
            match decode(self.broadcasts.recv()):
                case ["identify", int(version), *_] if version == VERSION:
                    # A coordinator that has just come back knows nothing of this rank.
                    self.hello_due, self.reported = 0.0, None
                case ["admit", self.rank, self.incarnation, *_] if not self.ready:
                    self.hello_due, self.ready = 0.0, True
                    print(f"foreign rank {self.rank} is ready at {self.address}", flush=True)
        while self.frontends.poll(0):
            routing_id, *frames = self.frontends.recv_multipart()
            frontend = int.from_bytes(routing_id, "little")
            if len(routing_id) == 8 and frontend < 2**63 and len(frames) == 1:
                self.take(frontend, decode(frames[0]))

    def take(self, frontend: int, message: Any) -> None:
        match message:
            case ["add", int(request), int(number), incarnation, _, list(prompt), [int(most), *_], *_]:
                key = (frontend, request)
                if incarnation != self.incarnation or key in self.requests:
                    self.send(frontend, [[request, [], "", "error", None, None, "refused"]])
                else:
                    self.requests[key] = (prompt[:most], "stop" if len(prompt) <= most else "length")
                    self.taken[frontend] = max(number, self.taken.get(frontend, 0))
            case ["abort", list(requests), *_]:
                self.drop([(frontend, request) for request in requests if isinstance(request, int)])

    def drop(self, keys: list[tuple[int, int]]) -> None:
        self.finished += sum(self.requests.pop(key, None) is not None for key in keys)

    def step(self) -> None:
        self.step_number += 1
        outputs: dict[int, list[Any]] = {}
        for (frontend, request), (tokens, reason) in list(islice(self.requests.items(), SLOTS)):
            said, tokens[:] = tokens[:1], tokens[1:]
            text = "".join(f" {token}" for token in said)
            outputs.setdefault(frontend, []).append([request, said, text, None if tokens else reason])
            self.drop([] if tokens else [(frontend, request)])
        for frontend, made in outputs.items():
            self.send(frontend, made)

    def send(self, frontend: int, outputs: list[Any]) -> None:
        frame = msgpack.encode(["outputs", self.rank, self.incarnation, outputs])
        try:
            self.frontends.send_multipart([frontend.to_bytes(8, "little"), frame], zmq.NOBLOCK)
        except zmq.ZMQError:  # it is gone, or does not read
            self.drop([key for key in self.requests if key[0] == frontend])
            self.taken.pop(frontend, None)

    def report(self) -> None:
        running = min(len(self.requests), SLOTS)
        load = [len(self.requests) - running, running, SLOTS, 0, 0, 0, 0.0, 0.0, self.finished]
        if self.ready and (load, self.taken) != self.reported:
            self.reported = (load, dict(self.taken))
            self.tell("rank-report", self.rank, self.incarnation, self.step_number, 0, False, load, self.taken)

    def tell(self, *message: Any) -> None:
        if self.coordinator.poll(0, zmq.POLLOUT):  # what is lost while it is away, the coordinator will ask for
            self.coordinator.send(msgpack.encode(message))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A toy rank that echoes prompts.")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--back-publish", default="tcp://127.0.0.1:29553", help="the coordinator's broadcasts")
    parser.add_argument("--back-output", default="tcp://127.0.0.1:29552", help="the coordinator's inbox")
    parser.add_argument("--bind", default="tcp://127.0.0.1:*", help="where front-ends reach this rank")
    parser.add_argument("--step-ms", type=float, default=1.0, help="how long a step lasts")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds in which to be admitted")
    options = parser.parse_args()
    rank = EchoRank(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        rank.run(options.timeout)
    finally:
        rank.tell("rank-leaving", rank.rank, rank.incarnation)
        rank.context.destroy(linger=200)
