"""Behaviour, not cost: how fast a lost client is heard of, and whether a slow one holds its stream back."""

import select
import subprocess
import time
from typing import IO

import zmq

from http_stacks.client import FINAL_CHUNK, Conn, encode_step


def read_line(process: subprocess.Popen[str], start: str, seconds: float) -> list[str] | None:
    """The next line of the server's with this start, or None when none comes in time."""
    assert process.stdout is not None
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            return None
        line = process.stdout.readline().split()
        if line and line[0] == start:
            return line
        if not line and process.poll() is not None:
            return None
    return None


def open_stream(port: int, stream_id: int, receive_buffer: int = 0) -> Conn:
    conn = Conn(port, receive_buffer)
    conn.start_stream(stream_id)
    conn.wait_for(b": ok\n\n")
    return conn


def probe_leave(port: int, push: zmq.Socket[bytes], process: subprocess.Popen[str], feeding: bool) -> str:
    """Milliseconds from the client's close to the handler's knowledge."""
    stream_id = 900_001 if feeding else 900_000
    conn = open_stream(port, stream_id)
    push.send(encode_step([(stream_id, " x")]))
    conn.wait_for(b"data:")
    closed = time.monotonic_ns()
    conn.sock.close()
    line = None
    for _ in range(40):
        if feeding:
            push.send(encode_step([(stream_id, " x")]))
        line = read_line(process, "gone", 0.05)
        if line:
            break
    return "never (2 s)" if line is None else f"{(int(line[2]) - closed) / 1e6:.1f} ms"


def probe_pressure(port: int, push: zmq.Socket[bytes], process: subprocess.Popen[str]) -> str:
    """40 MB for a client which does not read: do the events wait with us, or pile up in the stack?"""
    conn = open_stream(port, 900_002, receive_buffer=65536)
    push.send(encode_step([(-1, None)]))
    before = read_line(process, "stat", 5)
    text = "x" * 4096
    for _ in range(40):
        for _ in range(25):
            push.send(encode_step([(900_002, text)] * 10))
        # The handlers get their turns between the parts: else one piece of everything would hide what they do.
        push.send(encode_step([(-1, None)]))
        read_line(process, "stat", 20)
    select.select([], [], [], 0.5)  # Long enough for the stack to have taken what it will take.
    push.send(encode_step([(-1, None)]))
    after = read_line(process, "stat", 5)
    # Now it reads: a held-back stream must go on and lose nothing.
    push.send(encode_step([(900_002, None)]))
    try:
        while not conn.last.endswith(FINAL_CHUNK):
            conn.on_readable()
        arrived = "all" if conn.events == 10_001 else f"{conn.events - 1}"
    except (TimeoutError, ConnectionError) as exc:
        arrived = f"{conn.events} ({type(exc).__name__})"
    conn.sock.close()
    if before is None or after is None:
        return "no report"
    grown = (int(after[3]) - int(before[3])) / 1e6
    return f"{after[2]} of 10000 held by us, +{grown:.0f} MB, {arrived} arrived when read"


def probe_all(label: str, port: int, push: zmq.Socket[bytes], process: subprocess.Popen[str], errors: IO[bytes]) -> str:
    quiet = probe_leave(port, push, process, feeding=False)
    fed = probe_leave(port, push, process, feeding=True)
    pressure = probe_pressure(port, push, process)
    begin = time.monotonic()
    process.terminate()
    try:
        process.wait(8)
        ending = f"{time.monotonic() - begin:.1f} s"
    except subprocess.TimeoutExpired:
        ending = "not in 8 s"
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines()
    tail = lines[-1][:90] if lines else ""
    return f"| {label} | {quiet} | {fed} | {pressure} | rc {process.returncode} after {ending} | {len(lines)} |  {tail}"
