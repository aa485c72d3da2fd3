"""Addresses, limits, draining, and the log of bad frames; waking a poll; a joining node's question."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.errors import StartupError
from paceline.net.links import CALLS, BadFrames, Callers, LinkMonitor, SocketFolder
from paceline.net.node import Here, Rendezvous, find_coordinator, own_host, seen_from
from paceline.net.sockets import DOORS_S, bound_address, drain, giving_up_after, open_socket, tcp_address
from paceline.process.spawn import Wakeup
from tests.net.peers import context, send_bad_frames
from tests.pace import stretched
from tests.serving import wait_until


def test_folder_is_private_and_removed() -> None:
    folder = SocketFolder()
    assert folder.path.stat().st_mode & 0o077 == 0
    assert folder.address("a") == f"ipc://{folder.path}/a"
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_a_folder_whose_process_was_killed_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os; from paceline.net.links import SocketFolder; print(SocketFolder().path); os._exit(9)"
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)},
                            capture_output=True, text=True, check=False)  # fmt: skip
    abandoned = Path(killed.stdout.strip())
    assert abandoned.is_dir()
    held = SocketFolder()
    assert not abandoned.exists()
    SocketFolder().close()
    assert held.path.is_dir()
    held.close()


def test_path_too_long_for_a_socket_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = SocketFolder()
    with pytest.raises(StartupError, match="TMPDIR"):
        folder.address("rank-0")
    folder.close()


@pytest.mark.parametrize(("host", "text"), [("1.2.3.4", "tcp://1.2.3.4:5"), ("::1", "tcp://[::1]:5")])
def test_tcp_address(host: str, text: str) -> None:
    assert tcp_address(host, 5) == text


def test_port_that_was_found_is_told() -> None:
    with context() as zmq_context:
        bound = open_socket(zmq_context, zmq.PULL, bind=tcp_address("127.0.0.1"), max_bytes=10)
        assert bound_address(bound).startswith("tcp://127.0.0.1:")
        with pytest.raises(StartupError, match="cannot bind tcp://127"):
            open_socket(zmq_context, zmq.PULL, bind=bound_address(bound), max_bytes=10)
        with pytest.raises(StartupError, match="cannot connect to nowhere"):
            open_socket(zmq_context, zmq.PUSH, connect="nowhere", max_bytes=10)


def test_bad_frames_are_counted_and_logged_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    bad_frames = BadFrames(logging.getLogger("test"), "a socket")
    with caplog.at_level("WARNING"):
        for _ in range(3):
            bad_frames.add("malformed", "bad\nline" + "x" * 1000)
        bad_frames.add("version", "2")
    assert bad_frames.counts == {"malformed": 3, "version": 1}
    assert len(caplog.messages) == 2
    assert "\n" not in caplog.messages[0]
    assert len(caplog.messages[0]) < 400


@pytest.fixture
def queued() -> Iterator[zmq.Socket[bytes]]:
    """A socket in which five messages wait, the third of two frames."""
    with context() as zmq_context:
        receiver = open_socket(zmq_context, zmq.PULL, bind="inproc://drained", max_bytes=100)
        sender = open_socket(zmq_context, zmq.PUSH, connect="inproc://drained", max_bytes=100)
        for frames in ([b"1"], [b"2"], [b"3", b"more"], [b"4"], [b"5"]):
            sender.send_multipart(frames)
        yield receiver


@pytest.mark.parametrize(
    ("bounds", "read", "bad"),
    [
        ({}, [b"1", b"2", b"4", b"5"], 1),
        ({"messages": 2}, [b"1", b"2"], 0),
        ({"messages": 4}, [b"1", b"2", b"4"], 1),
        ({"until": 2.0}, [b"1", b"2"], 0),
        ({"until": 3.0}, [b"1", b"2"], 1),
        ({"parts": 2}, [b"3"], 4),
        ({"parts": None}, [b"1", b"2", b"3", b"more", b"4", b"5"], 0),
    ],
)
def test_a_socket_is_drained_within_bounds(
    queued: zmq.Socket[bytes], bounds: dict[str, Any], read: list[bytes], bad: int
) -> None:
    bad_frames, times = BadFrames(logging.getLogger("test"), "a socket"), itertools.count(1)
    came = [message[0] for message in drain(queued, bad_frames, clock=lambda: next(times), **bounds)]
    assert came == read
    assert bad_frames.counts.total() == bad


def test_who_reads_a_socket_may_close_it(queued: zmq.Socket[bytes]) -> None:
    for came, _ in enumerate(drain(queued, BadFrames(logging.getLogger("test"), "a socket"))):
        assert came == 0
        queued.close()


def test_wakeup_from_another_thread() -> None:
    wakeup = Wakeup()
    poller = zmq.Poller()
    poller.register(wakeup, zmq.POLLIN)
    assert not poller.poll(0)
    thread = threading.Thread(target=wakeup.set)
    thread.start()
    assert poller.poll(stretched(10) * 1000)
    thread.join()
    for _ in range(100_000):
        wakeup.set()
    wakeup.clear()
    assert not poller.poll(0)
    wakeup.close()
    wakeup.set()


def test_joining_node_is_answered_through_bad_frames() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Here("ipc:///a", "tcp://a:2", "tcp://a:3")
    assert seen_from("head", here) == Here("ipc:///a", "tcp://head:2", "tcp://head:3")
    facts = {"--engine": "timed", "the model": "a (12)"}
    rendezvous = Rendezvous("127.0.0.1", port, facts, here)
    try:
        with context() as zmq_context:
            stranger = zmq_context.socket(zmq.DEALER)
            stranger.connect(f"tcp://127.0.0.1:{port}")
            send_bad_frames(stranger)
            assert find_coordinator("127.0.0.1", port, facts) == seen_from("127.0.0.1", here)
        differs = "--engine is timed there and llama here; the model is a (12) there and a (34) here"
        with pytest.raises(StartupError, match=re.escape(differs)):
            find_coordinator("127.0.0.1", port, {"--engine": "llama", "the model": "a (34)"})
    finally:
        rendezvous.close()


def test_a_node_asks_until_it_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Here("tcp://a:1", "tcp://a:2", "tcp://a:3")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(find_coordinator, "127.0.0.1", port, {})
        wait_until(lambda: f"waiting for the node with rank 0 at 127.0.0.1:{port}" in caplog.text, "the line")
        rendezvous = Rendezvous("127.0.0.1", port, {}, here)
        assert answer.result(stretched(20)) == seen_from("127.0.0.1", here)
        rendezvous.close()


@contextmanager
def stranger() -> Iterator[tuple[int, list[bool]]]:
    """A program at a port that speaks something else. Yields the port, and an entry for each that called."""
    called: list[bool] = []

    def answer() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            with caller:
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))
                called.append(True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1], called
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_who_called_a_stranger_calls_again() -> None:
    """ZeroMQ itself gives the address up for ever: what is subscribed to would never be heard again."""
    with context() as sockets:
        with stranger() as (port, called):
            address = tcp_address("127.0.0.1", port)
            calling = open_socket(sockets, zmq.XSUB, max_bytes=64, connect=address, watched=CALLS)
            callers = Callers({calling: address})
            calling.send(b"\x01topic")
            clock = itertools.count(0.0, DOORS_S)
            wait_until(lambda: callers.look(next(clock)), "it has been refused")
            assert called
        found = open_socket(sockets, zmq.XPUB, max_bytes=64, bind=address)

        def is_found() -> bool:
            callers.look(next(clock))
            return bool(found.poll(50))

        wait_until(is_found, "it calls again")
        assert found.recv() == b"\x01topic"


def test_a_joining_node_asks_on_where_a_stranger_has_answered(caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as pool:
        with stranger() as (port, called):
            found = pool.submit(find_coordinator, "127.0.0.1", port, {"a": "1"})
            wait_until(lambda: "the connection is refused" in caplog.text, "it says so")
            assert called
        answering = Rendezvous("127.0.0.1", port, {"a": "1"}, Here("ipc:///front", "ipc:///output", "ipc:///publish"))
        try:
            assert found.result(stretched(20.0)).front_publish == "ipc:///front"
        finally:
            answering.close()


def test_own_host_towards_loopback() -> None:
    assert own_host("127.0.0.1", 29550) == "127.0.0.1"
    with pytest.raises(StartupError, match="--data-parallel-address"):
        own_host("no such host", 29550)


def test_folder_is_where_temporary_files_are() -> None:
    folder = SocketFolder()
    assert os.path.basename(folder.path).startswith("paceline-")
    folder.close()


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
