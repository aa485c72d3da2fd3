"""Addresses, limits, draining, and the log of garbage; waking a poll; a joining node's question."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.errors import StartupError
from paceline.net.links import BadFrames, SocketFolder
from paceline.net.node import Here, Rendezvous, find_coordinator, own_host
from paceline.net.sockets import bound_address, drain, open_socket, tcp_address
from paceline.process.spawn import Wakeup
from tests.net.peers import context, send_garbage
from tests.pace import stretched


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


def test_garbage_is_counted_and_logged_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
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
    """The clock counts the messages that were read."""
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


def test_joining_node_is_answered_through_garbage() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Here("tcp://a:1", "tcp://a:2", "tcp://a:3")
    rendezvous = Rendezvous("127.0.0.1", port, 4, "timed", here)
    try:
        with context() as zmq_context:
            stranger = zmq_context.socket(zmq.DEALER)
            stranger.connect(f"tcp://127.0.0.1:{port}")
            send_garbage(stranger)
            assert find_coordinator("127.0.0.1", port, 4, "timed", 10.0) == here
        with pytest.raises(StartupError, match="--engine is timed there and llama here"):
            find_coordinator("127.0.0.1", port, 4, "llama", 10.0)
    finally:
        rendezvous.close()
    with pytest.raises(StartupError, match=r"no answer .* within 0\.2 s"):
        find_coordinator("127.0.0.1", port, 4, "timed", 0.2)


def test_own_host_towards_loopback() -> None:
    assert own_host("127.0.0.1", 29550) == "127.0.0.1"
    with pytest.raises(StartupError, match="--data-parallel-address"):
        own_host("no such host", 29550)


def test_folder_is_where_temporary_files_are() -> None:
    folder = SocketFolder()
    assert os.path.basename(folder.path).startswith("paceline-")
    folder.close()
