"""Real processes flooded over all their sockets while requests go on; `make fuzz` has more of it."""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest
import zmq

from tests.fuzz.blind import rss_mb
from tests.fuzz.flood import addresses_in, socket_folders
from tests.fuzz.sockets import flood_sockets
from tests.fuzz.vllm_sockets import flood_vllm
from tests.pace import stretched
from tests.serving import deployment, wait_until

pytestmark = pytest.mark.slow

INPUTS = 400
PEERS, BURST = 20, 2000
MOST_OF_BURST_MB = 12.0
WARM_UP, BROKEN = 500, 4000
MOST_FOR_BROKEN_MB = 4.0
"""A front-end that keeps what belongs to each takes 15."""


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_streams_go_on_right_while_bad_frames_come_on_every_socket(engine: str) -> None:
    rows = flood_sockets(engine, INPUTS, seed=1)
    assert [row.first_error for row in rows if row.first_error] == []
    assert all(row.inputs >= INPUTS for row in rows)
    assert len(rows) == (6 if engine == "moe" else 5)


def test_the_coordinator_under_vllm_goes_on() -> None:
    rows = flood_vllm(INPUTS, seed=1)
    assert [row.first_error for row in rows if row.first_error] == []
    assert len(rows) == 4


def test_connections_that_break_after_an_answer_cost_a_frontend_nothing() -> None:
    with deployment("--engine", "timed", "-dp", "1") as running:
        host, _, port = running.url.removeprefix("http://").rpartition(":")
        frontend = running.pid_of("front-end 0")
        break_connections(host, int(port), WARM_UP)
        before = rss_mb(frontend)
        break_connections(host, int(port), BROKEN)
        assert rss_mb(frontend) < before + MOST_FOR_BROKEN_MB


def test_what_a_burst_takes_of_a_coordinator_is_given_back() -> None:
    with deployment("--engine", "timed", "-dp", "1") as running, zmq.Context() as context:
        coordinator = running.pid_of("coordinator")
        before = largest = rss_mb(coordinator)
        address = addresses_in(socket_folders(running.process.pid), 0)["back-output"]
        with contextlib.ExitStack() as peers:
            for _ in range(PEERS):
                peer = peers.enter_context(context.socket(zmq.PUSH))
                peer.sndhwm = peer.linger = 0
                peer.connect(address)
                for _ in range(BURST):
                    peer.send(b"\x00" * 1000)
            while largest < before + MOST_OF_BURST_MB:
                largest = max(largest, rss_mb(coordinator))
        wait_until(lambda: rss_mb(coordinator) < before + MOST_OF_BURST_MB / 2, "it is as small as before")


def break_connections(host: str, port: int, count: int) -> None:
    for _ in range(count):
        with socket.create_connection((host, port), timeout=stretched(30)) as peer:
            peer.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
            assert peer.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            # Closed with this it is broken off, with no end of what was said.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
