"""One connection of the load of `serve.py`: what it sends, and whether what comes is what must come."""

from __future__ import annotations

import socket
import time
from array import array

import msgspec

CONNECT_S = 10.0
TEXT_MARK = b'"text":"'
EVENT_END = b"\n\n"
LAST_CHUNK = b"0\r\n\r\n"
PROMPT = "Say something short about the weather of the week."
# One buffer for all reads: a fresh object a read would cost more than all else the client does.
BUFFER = bytearray(1 << 20)


class Wrong(Exception):
    """The deployment did not do what it must; the text says what."""


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.descriptor = self.socket.fileno()
        self.raw: list[bytes] | None = None
        self.gaps: array[float] | None = None
        self.tokens = self.expected = self.reads = 0
        self.sent_at = self.first_at = self.last_at = 0.0
        self.ended = True
        self._tail = b""

    def send(self, tokens: int, *, stream: bool, decoded: bool = False, rank: int | None = None) -> None:
        """Ask for `tokens` tokens. `decoded`: keep all bytes and decode them in the end."""
        self.tokens, self.expected, self.reads, self.ended, self._tail = 0, tokens, 0, False, b""
        self.raw = [] if decoded else None
        request = request_bytes(tokens, stream, rank)
        self.first_at = 0.0
        self.sent_at = time.perf_counter()
        if self.socket.send(request) != len(request):
            raise Wrong("a request did not fit into its socket")

    def on_readable(self) -> int:
        """Take in what is there; returns how many tokens came."""
        size = self.socket.recv_into(BUFFER)
        now = time.perf_counter()
        if not size:
            raise Wrong(f"a connection was closed after {self.tokens} of {self.expected} tokens")
        self.reads += 1
        if self.raw is not None:
            self.raw.append(bytes(memoryview(BUFFER)[:size]))
        data, end = BUFFER, size
        if self._tail:
            data = bytearray(self._tail) + memoryview(BUFFER)[:size]
            end, self._tail = len(data), b""
        whole = data.rfind(EVENT_END, 0, end) + len(EVENT_END)
        if whole < len(EVENT_END):
            whole = 0
        if end - whole != 2:
            self._tail = bytes(memoryview(data)[whole:end])
            self.ended = self._tail.endswith(LAST_CHUNK)
        came = data.count(TEXT_MARK, 0, whole)
        if came:
            self._count(came, data, whole, now)
        if self.ended and self.tokens != self.expected:
            raise Wrong(f"a stream ended after {self.tokens} of {self.expected} tokens: {bytes(data[:end])[-200:]!r}")
        return came

    def _count(self, came: int, data: bytearray, whole: int, now: float) -> None:
        if not self.tokens:
            self.first_at = now
            if not data.startswith(b"HTTP/1.1 200 "):
                raise Wrong(f"an answer began with {bytes(data[:200])!r}")
        elif self.gaps is not None:
            self.gaps.append(now - self.last_at)
            if came > 1:
                self.gaps.extend([0.0] * (came - 1))
        self.last_at = now
        self.tokens += came
        at = data.rfind(TEXT_MARK, 0, whole) + len(TEXT_MARK)
        shown = data[at : data.index(b'"', at)]
        if shown != b" %d" % (self.tokens - 1):
            raise Wrong(f"token {self.tokens - 1} of a stream read {bytes(shown)!r}")

    def answer_took(self) -> float:
        """Take in a part of an answer that is no stream: seconds that it took once it is whole, 0 before."""
        data = self._tail + self.socket.recv(65536)
        # The head can come alone: the rest is a read of its own.
        if data and not data.endswith(b"}}"):
            self._tail = data
            return 0.0
        if not data.startswith(b"HTTP/1.1 200 ") or b'"text":" 0"' not in data or b'"completion_tokens":1,' not in data:
            raise Wrong(f"an answer read {data[:300]!r}")
        return time.perf_counter() - self.sent_at

    def check(self) -> None:
        """Decode what was kept: framing, JSON, text and end are right. Raises Wrong."""
        if self.raw is None:
            return
        body = dechunk(b"".join(self.raw).partition(b"\r\n\r\n")[2])
        events = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
        choices = [msgspec.json.decode(event)["choices"][0] for event in events[:-1]]
        reasons = [None] * (self.expected - 1) + ["length"]
        if [choice["text"] for choice in choices] != [f" {number}" for number in range(self.expected)]:
            raise Wrong("a stream's texts, decoded, are not the engine's")
        if [choice["finish_reason"] for choice in choices] != reasons or events[-1] != b"[DONE]":
            raise Wrong("a stream, decoded, ended wrongly")


def request_bytes(tokens: int, stream: bool, rank: int | None) -> bytes:
    """One request for a completion."""
    body = msgspec.json.encode({"model": "timed", "prompt": PROMPT, "max_tokens": tokens, "stream": stream})
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    if rank is not None:
        head += b"x-data-parallel-rank: %d\r\n" % rank
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def dechunk(raw: bytes) -> bytes:
    """The body of a chunked answer whose head is cut off already."""
    parts: list[bytes] = []
    at = 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(raw[end + 2 : end + 2 + size])
        at = end + 4 + size
