"""Whether a connection is up: seen as it ends, comes up again, or never does; a stopped peer, and one that computes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from paceline.net.links import LinkMonitor
from paceline.net.sockets import giving_up_after, open_socket
from tests.net.peers import context
from tests.pace import stretched
from tests.serving import wait_until

pytestmark = pytest.mark.slow

PEER = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
print("bound", flush=True)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    pass
print("computed", flush=True)
time.sleep(3600)
"""


@contextmanager
def peer(address: str, busy_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """A process that binds a socket and computes for a while."""
    arguments = [sys.executable, "-c", PEER, address, str(busy_s)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def watched(address: str, silence_s: float = 0.0) -> Iterator[tuple[LinkMonitor, list[bool]]]:
    """A socket that connects there, and what its monitor has said."""
    with context() as zmq_context:
        options = giving_up_after(silence_s)
        socket = open_socket(zmq_context, zmq.DEALER, connect=address, max_bytes=100, options=options)
        said: list[bool] = []
        monitor = LinkMonitor(socket, said.append)
        yield monitor, said
        monitor.close()
        socket.close()


def wait_said(monitor: LinkMonitor, said: list[bool], expected: list[bool]) -> None:
    def heard() -> bool:
        monitor.read()
        return said == expected

    wait_until(heard, f"{expected}", 20.0)


def test_a_peer_that_dies_and_its_next_life_at_the_same_address(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/peer"
    with peer(address) as first, watched(address) as (monitor, said):
        first.kill()
        wait_said(monitor, said, [False])
        with peer(address):
            wait_said(monitor, said, [False, True])


def test_an_address_at_which_nobody_is(tmp_path: Path) -> None:
    with watched(f"ipc://{tmp_path}/nobody") as (monitor, said):
        wait_said(monitor, said, [False])


def test_a_stopped_peer_is_down_and_up_again_when_it_goes_on(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/peer"
    with peer(address) as process, watched(address, silence_s=0.5) as (monitor, said):
        os.kill(process.pid, signal.SIGSTOP)
        wait_said(monitor, said, [False])
        os.kill(process.pid, signal.SIGCONT)
        wait_said(monitor, said, [False, True])


def test_a_peer_that_computes_is_up(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/peer"
    silence_s = stretched(1.0, most=4.0)
    with peer(address, busy_s=2 * silence_s) as process, watched(address, silence_s=silence_s) as (monitor, said):
        assert process.stdout is not None
        assert process.stdout.readline() == "computed\n"
        monitor.read()
        assert said == []
