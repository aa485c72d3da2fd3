"""The load: a zmq feeder and a raw epoll client in one thread, which also reads the server's CPU clock."""

import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq

encode_step = msgspec.msgpack.Encoder().encode
TEXTS = (" the", " serving", " of", " tokens", " and", " so", " on", " \u00e9t\u00e9", ' "q"')
FINAL_CHUNK = b"0\r\n\r\n"
BUFFER = bytearray(262144)


def request_bytes(request_id: int, stream: bool) -> bytes:
    body = msgspec.json.encode(
        {
            "model": "paceline-bench-7b",
            "prompt": "Say something short about the weather of the week.",
            "max_tokens": 16,
            "temperature": 0.7,
            "stream": stream,
            "request_id": request_id,
        }
    )
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def process_cpu_ns(pid: int) -> int:
    """User+system CPU of a whole process, dead threads too, to the nanosecond (/proc/PID/stat has 10 ms ticks)."""
    return time.clock_gettime_ns((~pid << 3) | 2)  # The kernel's CPUCLOCK_SCHED clock id of another process.


def process_split(pid: int) -> tuple[int, int]:
    """User and system ticks of a process, for the shares only."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(") ")[2].split()
    return int(fields[11]), int(fields[12])


@dataclass
class Figure:
    us: float
    system_share: float
    rate: float
    lagged: bool = False
    # Events in one read of the client's: above 1, the server put several into one write.
    merged: float = 1.0


class Conn:
    """One keep-alive connection; counts `data:` without decoding anything."""

    __slots__ = ("events", "last", "raw", "sock", "stream_id", "tail")

    def __init__(self, port: int, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect(("127.0.0.1", port))
        self.sock.settimeout(20)
        self.events = 0
        self.tail = b""
        self.last = b""
        self.raw: list[bytes] | None = None
        self.stream_id = 0

    def start_stream(self, stream_id: int) -> None:
        self.stream_id = stream_id
        self.events = 0
        self.sock.sendall(request_bytes(stream_id, True))

    def wait_for(self, mark: bytes) -> bytes:
        got = b""
        while mark not in got:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError(f"closed before {mark!r}, after {got[-200:]!r}")
            got += data
        return got

    def on_readable(self) -> int:
        # One buffer for all: a fresh 256 KiB object a read costs more than all else the client does.
        size = self.sock.recv_into(BUFFER)
        if not size:
            raise ConnectionError("the server closed a stream")
        if self.raw is not None:
            self.raw.append(bytes(BUFFER[:size]))
        count = BUFFER.count(b"data:", 0, size)
        if self.tail:
            # A mark may be cut by the read; four bytes cannot hold a whole one, so none is counted twice.
            count += (self.tail + BUFFER[: min(size, 4)]).count(b"data:")
            self.tail = b""
        if BUFFER[size - 1] != 10:
            self.tail = bytes(BUFFER[max(0, size - 4) : size])
        self.last = bytes(BUFFER[max(0, size - 8) : size])
        self.events += count
        return count


class Load:
    """Feeds steps to n streams and counts what comes back."""

    def __init__(self, port: int, push: zmq.Socket[bytes], pid: int, next_id: int) -> None:
        self.port, self.push, self.pid, self.next_id = port, push, pid, next_id
        self.conns: list[Conn] = []
        self.received = self.reads = 0

    def open(self, count: int) -> None:
        self.poll = select.epoll()
        self.conns = [Conn(self.port) for _ in range(count)]
        for conn in self.conns:
            self.next_id += 1
            conn.start_stream(self.next_id)
        for conn in self.conns:
            conn.wait_for(b": ok\n\n")
            conn.sock.setblocking(False)
            self.poll.register(conn.sock.fileno(), select.EPOLLIN)
        self.by_fd = {conn.sock.fileno(): conn for conn in self.conns}
        self.received = self.reads = 0

    def step(self, number: int) -> None:
        text = TEXTS[number % len(TEXTS)]
        self.push.send(encode_step([(conn.stream_id, text) for conn in self.conns]))

    def drain(self, timeout: float) -> None:
        for fd, _ in self.poll.poll(timeout):
            self.received += self.by_fd[fd].on_readable()
            self.reads += 1

    def feed(self, steps: int, interval: float, window: int) -> tuple[float, bool]:
        """Send `steps` steps, at most `window` unanswered, and wait for every event; returns seconds and lag."""
        count = len(self.conns)
        base = self.received
        sent, lagged = 0, False
        begin = due = time.perf_counter()
        deadline = begin + 120
        while self.received - base < steps * count:
            now = time.perf_counter()
            if now > deadline:
                raise TimeoutError(f"{self.received - base} of {steps * count} events after 120 s")
            while sent < steps and due <= now:
                if sent - (self.received - base) // count >= window:
                    lagged = True
                    break
                self.step(sent)
                sent += 1
                due += interval
            # epoll sleeps whole milliseconds; this core is the client's own, so the last one is spun.
            wait = 0.1 if sent == steps or (due <= now) else max(0.0, due - now - 0.001)
            self.drain(wait)
        return time.perf_counter() - begin, lagged

    def measure(self, steps: int, interval: float, window: int) -> Figure:
        reads, split, cpu = self.reads, process_split(self.pid), process_cpu_ns(self.pid)
        seconds, lagged = self.feed(steps, interval, window)
        spent = process_cpu_ns(self.pid) - cpu
        after = process_split(self.pid)
        user, system = after[0] - split[0], after[1] - split[1]
        tokens = steps * len(self.conns)
        share = system / max(1, user + system)
        merged = tokens / (self.reads - reads)
        return Figure(spent / tokens / 1e3, share, tokens / seconds, lagged and interval > 0, merged)

    def close(self, expected: int) -> None:
        """End the streams, check each connection's exact count, and that it still serves a request after."""
        self.push.send(encode_step([(conn.stream_id, None) for conn in self.conns]))
        ends = time.perf_counter() + 20
        while any(conn.last[-5:] != FINAL_CHUNK for conn in self.conns):
            self.drain(0.1)
            if time.perf_counter() > ends:
                raise TimeoutError("a stream did not end")
        for conn in self.conns:
            if conn.events != expected + 1:  # One more for [DONE].
                raise AssertionError(f"{conn.events} events on a connection, {expected + 1} expected")
        self.conns[0].sock.settimeout(20)
        self.conns[0].sock.sendall(request_bytes(1, False))
        self.conns[0].wait_for(b'"total_tokens":28}}')
        for conn in self.conns:
            conn.sock.close()
        self.poll.close()


def dechunk(raw: bytes) -> bytes:
    """The body of a chunked answer whose head is cut off already."""
    out, at = [], 0
    while True:
        end = raw.index(b"\r\n", at)
        size = int(raw[at:end], 16)
        if size == 0:
            return b"".join(out)
        out.append(raw[end + 2 : end + 2 + size])
        at = end + 4 + size


def check_stream(load: Load, steps: int = 60) -> int:
    """One stream decoded in full: framing, JSON and texts are right. Returns the bytes of an event."""
    load.open(1)
    conn = load.conns[0]
    conn.raw = []
    load.feed(steps, 0.0, 4)
    load.close(steps)
    raw = b"".join(conn.raw)
    # The stack may still owe the CRLF of the chunk which carried the greeting.
    body = dechunk(raw.removeprefix(b"\r\n"))
    events = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
    texts = [msgspec.json.decode(event)["choices"][0]["text"] for event in events[:-1]]
    if texts != [TEXTS[i % len(TEXTS)] for i in range(steps)] or events[-1] != b"[DONE]":
        raise AssertionError("the stream's content is not what was fed")
    return len(events[0]) + 8


def measure_requests(port: int, pid: int, total: int, connections: int = 32) -> Figure:
    """Closed loop: each connection has one request under way until `total` are answered."""
    conns: Sequence[Conn] = [Conn(port) for _ in range(connections)]
    by_fd = {conn.sock.fileno(): conn for conn in conns}
    poll = select.epoll()
    payload = request_bytes(7, False)
    for conn in conns:
        conn.sock.sendall(payload)
        conn.wait_for(b'"total_tokens":28}}')
        poll.register(conn.sock.fileno(), select.EPOLLIN)
    split, cpu, begin = process_split(pid), process_cpu_ns(pid), time.perf_counter()
    for conn in conns:
        conn.sock.sendall(payload)
    sent, answered = connections, 0
    partial: dict[int, bytes] = {}
    while answered < sent:
        for fd, _ in poll.poll(20):
            conn = by_fd[fd]
            data = partial.pop(fd, b"") + conn.sock.recv(65536)
            if not data.endswith(b"}}"):
                # The head came alone: the rest is a read of its own (a closed connection never ends well).
                partial[fd] = data
                continue
            if not data.startswith(b"HTTP/1.1 200"):
                raise AssertionError(data[:100])
            answered += 1
            if sent < total:
                conn.sock.sendall(payload)
                sent += 1
    seconds = time.perf_counter() - begin
    spent = process_cpu_ns(pid) - cpu
    after = process_split(pid)
    user, system = after[0] - split[0], after[1] - split[1]
    for conn in conns:
        conn.sock.close()
    return Figure(spent / answered / 1e3, system / max(1, user + system), answered / seconds)
