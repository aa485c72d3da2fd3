"""A front-end written from docs/PROTOCOL.md alone: it imports nothing of Paceline.

It finds the ranks through the coordinator, sends one request and prints the answer, sends a second one and
aborts it after its first words, and leaves. `foreign_rank.py` says how to see it work.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
from msgspec import msgpack

VERSION = 1


@dataclass
class Link:
    """One life of one rank: what it reported last, and the sends that no report holds yet."""

    incarnation: int
    socket: Any
    step: int = -1
    load: Sequence[Any] = (0, 0)
    sent: int = 0
    taken: int = 0

    def requests(self) -> int:
        """Waiting and running as reported, and those not taken in yet: each counted once."""
        return self.load[0] + self.load[1] + self.sent - self.taken


@dataclass
class Answer:
    rank: int
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None


class Frontend:
    def __init__(self, address: str, timeout_s: float) -> None:
        # ZeroMQ keeps routing ids that begin with a zero byte for itself; the lowest byte comes first.
        self.identity = time.time_ns() | 1
        self.timeout_s, self.deadline = timeout_s, time.monotonic() + timeout_s
        self.wave, self.running, self.coordinator_life, self.view = 0, False, -1, 0
        self.links: dict[int, Link] = {}
        self.answers: dict[int, Answer] = {}
        self.context = zmq.Context()
        self.coordinator = self.context.socket(zmq.XSUB)
        self.coordinator.connect(address)
        self.coordinator.send(b"\x01")
        self.coordinator.send(b"\x01\xff" + self.identity.to_bytes(8, "little"))
        self.tell("front-end-hello", VERSION, self.identity)

    def send(self, prompt: list[int], max_tokens: int) -> int:
        """To the rank that has the fewest requests; returns the request's id."""
        rank = min(self.links, key=lambda number: self.links[number].requests())
        link, request = self.links[rank], len(self.answers)
        self.answers[request] = Answer(rank)
        link.sent += 1
        link.socket.send(msgpack.encode(["add", request, link.sent, link.incarnation, self.wave, prompt, [max_tokens]]))
        if not self.running:
            self.tell("wake-notice", self.identity, rank, self.wave)
        self.tell("send-notice", self.identity, [[rank, link.incarnation, link.sent, len(prompt)]])
        return request

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        while not condition():
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                sys.exit(f"foreign front-end: {what} has not come within {self.timeout_s:g} s")
            sockets = [self.coordinator, *(link.socket for link in self.links.values())]
            for socket in zmq.select(sockets, [], [], left_s)[0]:
                with suppress(Exception):  # garbage of any sort is dropped
                    self.take(msgpack.decode(socket.recv()))

    def take(self, message: Any) -> None:
        match message:
            case ["members", int(version), coordinator, wave, running, members, _, ended, *_] if version == VERSION:
                self.hear(coordinator, wave, running)
                lives = {rank: incarnation for rank, incarnation, *_ in members}
                for rank, life in [(rank, link.incarnation) for rank, link in self.links.items()]:
                    if [rank, life] in ended or lives.get(rank, life) != life:
                        self.lose(rank)
                for rank, incarnation, address, *_ in members:
                    if rank not in self.links:
                        socket = self.context.socket(zmq.DEALER)
                        socket.setsockopt(zmq.ROUTING_ID, self.identity.to_bytes(8, "little"))
                        socket.connect(address)
                        self.links[rank] = Link(incarnation, socket)
            case ["load-view", coordinator, number, wave, running, ranks, *_]:
                self.hear(coordinator, wave, running)
                newer, self.view = number > self.view, max(number, self.view)
                for rank, incarnation, step, load, taken, *_ in (ranks or []) if newer else []:
                    link = self.links.get(rank)
                    if link and link.incarnation == incarnation and step >= link.step:
                        link.step, link.load = step, load
                        link.taken = max(link.taken, taken.get(self.identity, 0))
            case ["outputs", rank, incarnation, outputs, *_] if self.links[rank].incarnation == incarnation:
                for request, _, text, *rest in outputs:
                    answer = self.answers[request]
                    answer.text += text
                    answer.finish_reason, _, _, answer.error, *_ = [*rest, None, None, None, None]

    def hear(self, coordinator: int, wave: int, running: bool) -> None:
        self.view = self.view if coordinator == self.coordinator_life else 0
        self.coordinator_life = coordinator
        if wave >= self.wave:
            self.wave, self.running = wave, running

    def lose(self, rank: int) -> None:
        self.links.pop(rank).socket.close(linger=0)
        for answer in self.answers.values():
            if answer.rank == rank and answer.finish_reason is None:
                answer.finish_reason, answer.error = "error", f"rank {rank} has ended"

    def tell(self, *message: Any) -> None:
        self.coordinator.send(msgpack.encode(message))


def main() -> None:
    parser = argparse.ArgumentParser(description="A toy front-end: one request, and one that it aborts.")
    parser.add_argument("--front-publish", default="tcp://127.0.0.1:29551", help="the coordinator, for front-ends")
    parser.add_argument("--prompt", default="3,1,4,1,5", help="token ids")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that all may take")
    options = parser.parse_args()
    frontend = Frontend(options.front_publish, options.timeout)
    frontend.wait(lambda: frontend.links, "a ready rank")
    answer = frontend.answers[frontend.send([int(token) for token in options.prompt.split(",")], options.max_tokens)]
    frontend.wait(lambda: answer.finish_reason, "the answer")
    print(f"rank {answer.rank} answered:{answer.text} ({answer.error or answer.finish_reason})")
    second = frontend.send([7] * 5000, 5000)
    answer = frontend.answers[second]
    frontend.wait(lambda: answer.text or answer.finish_reason, "the second answer's first word")
    link = frontend.links[answer.rank]
    link.socket.send(msgpack.encode(["abort", [second]]))
    frontend.wait(lambda: link.taken == link.sent and not link.requests(), "the rank's word that it is idle")
    print(f"aborted the second request; rank {answer.rank} took in {link.taken} and has none left")
    frontend.tell("front-end-leaving", frontend.identity)
    frontend.context.destroy(linger=200)


if __name__ == "__main__":
    main()
