"""What somebody tries who reaches a deployment's ports, and has not its secret.

`python -m tests.attacker HEAD WORKER OWN FOLDER`: the addresses of nodes with the ranks 0, 1 and 2, 3 on the default
ports, and of this machine. FOLDER holds `PORT-N.bytes`: what the worker has said to that port of the head, each
connection. Printed is, as JSON, what each attempt has gained: nothing, or what was read.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import zmq

from paceline.core import codec
from paceline.core.messages import PROTOCOL_VERSION, RankHello, RankLeaving
from paceline.core.requests import AddRequest, SamplingParams
from paceline.net.links import new_identity
from paceline.net.node import WhereIs
from paceline.net.sockets import open_socket, tcp_address
from tests.pace import stretched

PORT, RANK_PORTS, RANKS = 29550, 4, 4
PATIENCE_S = 2.0
LIMIT = codec.MAX_REQUEST_BYTES
VICTIM = 3
READY = b"\x05READY\x0bSocket-Type"


def port_of(recorded: Path) -> int:
    return int(recorded.stem.partition("-")[0])


def zmtp_frames(data: bytes) -> Iterator[bytes]:
    """The frames behind ZeroMQ's greeting, as they are on the wire."""
    at = 64
    while at + 9 < len(data):
        wide = data[at] & 2
        begin = at + (9 if wide else 2)
        at = begin + int.from_bytes(data[at + 1 : begin], "big")
        yield data[begin:at]


class Attacker:
    """`head`, `worker`: addresses. `own`: this machine's, where front-ends would reach it."""

    def __init__(self, head: str, worker: str, own: str, folder: Path) -> None:
        self.head, self.worker, self.own = head, worker, own
        self.recorded = sorted(folder.glob("*.bytes"))
        self.lives: dict[int, int] = {}
        """Of ranks whose word can be read in what was recorded."""
        for recorded in self.recorded:
            for frame in zmtp_frames(recorded.read_bytes()):
                with contextlib.suppress(codec.BadMessage):
                    message = codec.from_rank().decode(frame)
                    if isinstance(message, RankHello):
                        self.lives[message.rank] = message.incarnation
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def _open(self, kind: int, host: str, port: int, **how: Any) -> Any:
        return open_socket(self._context, kind, connect=tcp_address(host, PORT + port), max_bytes=LIMIT, **how)

    def _frames(self, opened: Any, seconds: float = PATIENCE_S) -> Iterator[list[bytes]]:
        end = time.monotonic() + stretched(seconds, 3)
        while (left_s := end - time.monotonic()) > 0 and opened.poll(int(left_s * 1000)):
            yield opened.recv_multipart()

    def asks_the_rendezvous(self) -> str:
        asking = self._open(zmq.DEALER, self.head, 0)
        asking.send(msgspec.msgpack.encode(WhereIs(PROTOCOL_VERSION, {})))
        return " ".join(repr(frames[-1]) for frames in self._frames(asking))[:200]

    def hears_what_ranks_hear(self) -> str:
        listening = self._open(zmq.XSUB, self.head, 3)
        listening.send(b"\x01")
        listening.send(b"\x01" + codec.rank_topic(0, new_identity()))
        return " ".join(repr(frames[-1]) for frames in self._frames(listening))[:200]

    def plays_a_front_end(self) -> str:
        identity = new_identity().to_bytes(8, "little")
        to_rank = self._open(zmq.DEALER, self.worker, RANK_PORTS + 2 * 2, routing_id=identity)
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        to_rank.send(codec.encode(AddRequest(1, 1, self.lives.get(2, 1), 0, [1, 2, 3], params)))
        said = [codec.outputs().decode(frames[-1]) for frames in self._frames(to_rank)]
        return "tokens" if any(output.token_ids for message in said for output in message.outputs) else ""

    def plays_a_rank_and_reads_prompts(self) -> str:
        router = open_socket(self._context, zmq.ROUTER, bind=tcp_address(self.own), max_bytes=LIMIT)
        address = router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        identity = new_identity()
        listening, saying = self._open(zmq.XSUB, self.head, 3), self._open(zmq.PUSH, self.head, 2)
        listening.send(b"\x01")
        listening.send(b"\x01" + codec.rank_topic(VICTIM, identity))
        end = time.monotonic() + stretched(PATIENCE_S, 3)
        while time.monotonic() < end:
            with contextlib.suppress(zmq.Again):
                saying.send(codec.encode(RankLeaving(VICTIM, self.lives.get(VICTIM, 1))), zmq.NOBLOCK)
                saying.send(codec.encode(RankHello(PROTOCOL_VERSION, VICTIM, identity, address, True)), zmq.NOBLOCK)
            if router.poll(200):
                message = codec.request().decode(router.recv_multipart()[-1])
                if isinstance(message, AddRequest):
                    return f"a prompt of {len(message.prompt_token_ids)} tokens"
        return ""

    def evicts_all_ranks(self) -> str:
        saying = self._open(zmq.PUSH, self.head, 2)
        end = time.monotonic() + stretched(PATIENCE_S, 3)
        while time.monotonic() < end:
            with contextlib.suppress(zmq.Again):
                for rank in range(RANKS):
                    saying.send(codec.encode(RankLeaving(rank, self.lives.get(rank, 1))), zmq.NOBLOCK)
            if missing := httpx2.get(f"http://{self.head}:8000/health", timeout=stretched(10)).json()["missing"]:
                return f"rank {missing}"
        return ""

    def replays(self) -> str:
        """What somebody says to whom it takes for a peer: its READY, which nobody else may hear."""
        gained = []
        for recorded in self.recorded:
            with socket.create_connection((self.head, port_of(recorded)), timeout=PATIENCE_S) as link:
                link.settimeout(PATIENCE_S)
                heard, data = b"", recorded.read_bytes()
                with contextlib.suppress(OSError):
                    # As ZeroMQ does: the greeting first, and then what follows.
                    for part in (data[:64], data[64:]):
                        link.sendall(part)
                        heard += link.recv(65536)
                    while READY not in heard and (part := link.recv(65536)):
                        heard += part
                gained += [recorded.stem] if READY in heard else []
        return " ".join(gained)

    def tries(self) -> dict[str, str]:
        attempts: list[Callable[[], str]] = [
            self.asks_the_rendezvous, self.hears_what_ranks_hear, self.plays_a_front_end,
            self.replays, self.plays_a_rank_and_reads_prompts, self.evicts_all_ranks,
        ]  # fmt: skip
        names = ["rendezvous", "broadcasts", "front-end", "replay", "rank", "eviction"]
        gained = {name: attempt() for name, attempt in zip(names, attempts, strict=True)}
        self._context.destroy(linger=0)
        return gained


if __name__ == "__main__":
    head, worker, own, folder = sys.argv[1:]
    print(json.dumps(Attacker(head, worker, own, Path(folder)).tries()))
