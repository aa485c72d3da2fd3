"""The corpus: real messages, one a file, in a folder for each kind of socket; and what fuzzing has found.

`python -m tests.fuzz.corpus` writes the messages anew: those that a small deployment of real machines says to one
another, and of the classes that it does not use, one each. Files whose names begin with `found-` stay.
"""

from __future__ import annotations

import functools
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from paceline.core import codec
from paceline.core.codec import UNIONS, tag_of
from paceline.core.rank.events import Agree
from paceline.core.rank.prefill_quota import integers
from paceline.net.collective import BLOCK, GATHER, HEADER, RESULT, URGENT, array_parts
from paceline.net.group import GREETING, MAGIC
from paceline.net.node import Here, WhereIs
from paceline.vllm.codec import SCALE
from tests.fuzz.grammar import Grammar
from tests.vllm_plugin import vllm_frames

FOLDER = Path(__file__).parent / "corpus"
EACH = 4
"""So many of one class are kept."""
DIRECTIONS = {direction: direction.replace(" → ", "-to-") for direction in UNIONS}
"""Direction to its folder."""


@functools.cache
def frames_of(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((FOLDER / folder).iterdir())]


def classes_of(direction: str) -> list[type]:
    union: Any = UNIONS[direction]
    return list(getattr(union, "__args__", ()) or (union,))


class Recorder:
    """Keeps what is said on harness links, in the direction whose union it is of."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, bytes]] = {}
        self._seen: Counter[type] = Counter()
        self._direction = {kind: direction for direction in UNIONS for kind in classes_of(direction)}

    def keep(self, message: Any) -> None:
        """One message, if there are not enough of its class."""
        kind, direction = type(message), self._direction[type(message)]
        frame = codec.encode(message)
        kept = self.kept.setdefault(direction, {})
        if self._seen[kind] < EACH and frame not in kept.values():
            self._seen[kind] += 1
            kept[f"{tag_of(kind)}-{self._seen[kind]}"] = frame

    def run(self) -> None:
        """Deployments of real machines: lockstep with a suspension, brokered, a death; then what they do not say."""
        from paceline.sim.world import Link
        from tests.sim.deployments import ready

        send = Link.send
        Link.send = lambda link, message: (self.keep(message), send(link, message))[1]  # type: ignore[method-assign]
        try:
            for lockstep in (True, False):
                deployment = ready(ranks=2, frontends=2, lockstep=lockstep, late_binding=not lockstep, slots=1)
                first, second = deployment.frontends.values()
                for number in range(6):
                    (first, second)[number % 2].submit(tokens=5, max_tokens=4)
                first.abandon(1)
                deployment.world.run_for(0.05)
                first.control("keep")
                deployment.world.run_for(1.0)
                first.control("resume")
                deployment.world.run_for(5.0)
        finally:
            Link.send = send  # type: ignore[method-assign]
        draw = random.Random(1)
        for direction in UNIONS:
            for kind in classes_of(direction):
                while self._seen[kind] < 2:
                    self.keep(Grammar(draw, [0, 1, 2, 3]).value(msgspec.inspect.type_info(kind)))


def write(folder: str, frames: dict[str, bytes]) -> None:
    """Put these there in place of all but what was found."""
    place = FOLDER / folder
    place.mkdir(parents=True, exist_ok=True)
    for path in place.iterdir():
        if not path.name.startswith("found-"):
            path.unlink()
    for name, frame in frames.items():
        (place / name).write_bytes(frame)


def others() -> dict[str, dict[str, bytes]]:
    """What is no message of `protocol/messages.py`: by folder, by name."""
    view = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = b"".join(bytes(part) for part in array_parts(view))
    parts = integers(Agree(True, 3, 4, ()))
    row = struct.pack(f"<{len(parts)}q", *parts)
    vllm = {name.lower(): frame for name, frame in vars(vllm_frames).items() if isinstance(frame, bytes)}
    notice = vllm.pop("notice_of_rank_1")
    completion = {
        "prompt": "Once",
        "max_tokens": 5,
        "temperature": 0.5,
        "logit_bias": {"3": 1.5},
        "stop": ["a"],
        "n": 2,
    }
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
    return {
        "subscriptions": {
            "rank": codec.rank_topic(2, 13), "front-end": codec.frontend_topic(101), "all": b"",
            "stranger": codec.rank_topic(1, 2**62),
        },
        "collective": {
            "gather": HEADER.pack(GATHER, 1, len(row)) + row, "result": HEADER.pack(RESULT, 1, len(row)) + row,
            "block": HEADER.pack(BLOCK, 1, len(array)) + array, "urgent": HEADER.pack(BLOCK | URGENT, 1, 0),
        },
        "greeting": {"greeting": GREETING.pack(MAGIC, 1, 1, 0), "other": GREETING.pack(MAGIC, 2, 1, 0)},
        "rendezvous": {
            "where-is": msgspec.msgpack.encode(WhereIs(1, {"--engine": "timed", "--data-parallel-size": "4"})),
            "here": msgspec.msgpack.encode(Here("tcp://a:1", "tcp://a:2", "tcp://a:3")),
        },
        "vllm-rank": vllm,
        "vllm-front-end": {
            "notice": notice, "nobody": msgspec.msgpack.encode([None, 3]), "number": msgspec.msgpack.encode([1, 0]),
            "scale": msgspec.msgpack.encode([SCALE, 3]),
        },
        "http-body": {"completion": msgspec.json.encode(completion), "chat": msgspec.json.encode(chat)},
        "http-requests": {
            "get": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
            "post": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 18\r\n\r\n" + b'{"prompt": "Once"}',
            "chunked": b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        },
        "watchdog": {
            "health": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", "loads": b"GET /loads?x HTTP/1.0\r\n\r\n",
            "post": b"POST / HTTP/1.1\r\n\r\n",
        },
    }  # fmt: skip


def main() -> None:
    recorder = Recorder()
    recorder.run()
    for direction, frames in recorder.kept.items():
        write(DIRECTIONS[direction], frames)
    for folder, frames in others().items():
        write(folder, frames)


if __name__ == "__main__":
    main()
