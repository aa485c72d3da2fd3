"""A client of our own that reads one stream when it is told to: none that comes with a library lets a socket fill."""

from __future__ import annotations

import json
import socket
import threading
import time

from tests.pace import stretched

TEXT = b'"text":'


class RawStream(threading.Thread):
    """One streamed completion. `reads`: whether it reads at all; only what has one choice can be read."""

    def __init__(
        self, url: str, max_tokens: int, *, reads: bool = True, rank: int | None = None, prompt: str = "a",
        choices: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(daemon=True)
        host, port = url.removeprefix("http://").rsplit(":", 1)
        self.socket = socket.socket()
        if not reads:
            # What the kernel would take in for it, megabytes, has to be computed and sent first.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((host, int(port)))
        self._parts: list[bytes] = []
        self._reads = reads
        self.last = time.monotonic()
        self.longest_gap_s = 0.0
        self.bytes = 0
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "n": choices, "stream": True}).encode()
        named = b"" if rank is None else b"X-data-parallel-rank: %d\r\n" % rank
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + named
        self.socket.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.start()

    def run(self) -> None:
        if self._reads:
            with self.socket:
                self._read()

    def _read(self) -> None:
        while part := self.socket.recv(1 << 16):
            now = time.monotonic()
            # Before the first token it waits for its rank, which is no gap.
            if self.bytes:
                self.longest_gap_s = max(self.longest_gap_s, now - self.last)
            self.last = now
            self.bytes += len(part)
            self._parts.append(part)

    def text(self, deadline_s: float = 60.0) -> str:
        """The whole text, once it has ended. Fails where it did not end as it should."""
        self.join(stretched(deadline_s))
        assert not self.is_alive(), f"no end after {deadline_s:g} s and {self.bytes} bytes"
        said = b"".join(self._parts)
        assert said.startswith(b"HTTP/1.1 200 "), said[:200]
        assert b"data: [DONE]" in said, said[-300:]
        events = [line for line in said.split(b"\n") if line.startswith(b"data: {")]
        return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)

    def close(self) -> None:
        self.socket.close()


def expected(tokens: int) -> str:
    return "".join(f" {index}" for index in range(tokens))
