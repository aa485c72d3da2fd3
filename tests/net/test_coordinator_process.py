"""The coordinator's process: start, size, addresses, end, and what bad frames do to it (nothing)."""

from __future__ import annotations

import inspect
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.core import codec, messages
from paceline.core.load import Load
from paceline.errors import StartupError
from paceline.net.coordinator import DPCoordinator, DPCoordinatorProc
from paceline.process.spawn import spawn
from paceline.settings import ParallelConfig
from tests.net.peers import context, receive, send_bad_frames, shout_at
from tests.pace import stretched
from tests.serving import command, is_alive, memory_mb, wait_until
from tests.test_modes import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def coordinator() -> Iterator[DPCoordinator]:
    running = DPCoordinator(ParallelConfig())
    yield running
    running.shutdown()


def test_ready_soon_and_small() -> None:
    """0.25 s is the promise on a machine that has nothing else to do."""
    wall = []
    for _ in range(5):
        begin = time.monotonic()
        running = DPCoordinator(ParallelConfig())
        wall.append(time.monotonic() - begin)
        pid = running.proc.pid or 0
        most_mb = memory_mb(pid, "VmHWM")
        running.shutdown()
        assert most_mb < 40
    print(f"ready after {min(wall):.3f} s (best of 5), using {most_mb:.0f} MB")
    assert min(wall) < stretched(0.5)


def test_loads_neither_engine_nor_http_stack(coordinator: DPCoordinator) -> None:
    mapped = Path(f"/proc/{coordinator.proc.pid}/maps").read_text()
    for library in ("numpy", "llama", "uvloop", "httptools", "pydantic"):
        assert library not in mapped
    assert "msgspec" in mapped


def test_reports_bound_addresses() -> None:
    one_node = DPCoordinator(ParallelConfig())
    half: dict[str, Any] = {"data_parallel_size": 4, "data_parallel_size_local": 2}
    two_nodes = DPCoordinator(ParallelConfig(**half, data_parallel_rpc_port=int(free_port())))
    hybrid = DPCoordinator(
        ParallelConfig(**half, data_parallel_rpc_port=int(free_port()), data_parallel_hybrid_lb=True)
    )
    try:
        assert one_node.get_stats_publish_address().startswith("ipc://")
        assert all(address.startswith("ipc://") for address in one_node.get_engine_socket_addresses())
        assert two_nodes.get_stats_publish_address().startswith("ipc://")
        for address in (*two_nodes.get_engine_socket_addresses(), hybrid.get_stats_publish_address()):
            assert address.startswith("tcp://127.0.0.1:")
            assert int(address.rsplit(":", 1)[1]) > 0
    finally:
        for running in (one_node, two_nodes, hybrid):
            running.shutdown()


def test_shutdown_leaves_nothing(coordinator: DPCoordinator) -> None:
    pid, address = coordinator.proc.pid or 0, coordinator.get_stats_publish_address()
    folder = Path(address.removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o077 == 0
    coordinator.shutdown()
    coordinator.shutdown()
    assert not is_alive(pid)
    assert not folder.exists()
    assert coordinator.proc.exitcode == 0


def test_restart_at_the_same_addresses(coordinator: DPCoordinator) -> None:
    addresses = (coordinator.get_stats_publish_address(), *coordinator.get_engine_socket_addresses())
    for _ in range(3):
        before = coordinator.proc.pid or 0
        os.kill(before, signal.SIGKILL)
        coordinator.proc.join(stretched(10))
        assert coordinator.restart().pid != before
        assert coordinator.proc.is_alive()
        assert addresses == (coordinator.get_stats_publish_address(), *coordinator.get_engine_socket_addresses())


def test_start_that_fails_again_can_be_tried_again(coordinator: DPCoordinator) -> None:
    """Something else sits at its address for a while: no sockets' folder and no process is given up for that."""
    path = Path(coordinator.get_stats_publish_address().removeprefix("ipc://"))
    coordinator.proc.kill()
    coordinator.proc.join(stretched(10))
    path.unlink()
    path.mkdir()
    with pytest.raises(StartupError, match="cannot bind"):
        coordinator.restart()
    path.rmdir()
    assert coordinator.restart().is_alive()


def test_address_that_cannot_be_bound(tmp_path: Path) -> None:
    from multiprocessing import get_context

    reader, writer = get_context("spawn").Pipe(duplex=False)
    bad = f"ipc://{tmp_path}/no/such/folder/socket"
    kwargs = {"engine_count": 2, "front_publish_address": bad, "back_output_address": bad,
              "back_publish_address": bad, "zmq_addr_pipe": writer}  # fmt: skip
    process = spawn("coordinator", DPCoordinatorProc.run_coordinator, kwargs)
    writer.close()
    assert "cannot bind" in reader.recv()
    process.join(stretched(10))
    assert process.exitcode is not None
    reader.close()


def test_host_that_is_not_ours() -> None:
    with pytest.raises(StartupError, match=r"cannot bind tcp://192\.0\.2\.1"):
        DPCoordinator(
            ParallelConfig(data_parallel_size=4, data_parallel_size_local=2, data_parallel_master_ip="192.0.2.1")
        )


def test_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "from paceline.net.coordinator import DPCoordinator\n"
        "from paceline.settings import ParallelConfig\n"
        "import os, time\n"
        "if __name__ == '__main__':\n"
        "    print(DPCoordinator(ParallelConfig()).proc.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "parent.py"
    path.write_text(script)
    run = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=stretched(30), check=False
    )
    pid = int(run.stdout)
    wait_until(lambda: not is_alive(pid), "the coordinator ended", 2.0)


def test_command_prints_its_addresses_and_ends(tmp_path: Path) -> None:
    names = ("front-publish", "back-output", "back-publish")
    arguments = [part for name in names for part in (f"--{name}-address", f"ipc://{tmp_path}/{name}")]
    with command("coordinator", "-dp", "3", *arguments) as running:
        for name in names:
            assert running.wait_line(name).split() == [name, f"ipc://{tmp_path}/{name}"]
        running.signal(2)
        assert running.wait_end() == 0
        assert "Traceback" not in running.output


def test_bad_frames_on_every_socket(capfd: pytest.CaptureFixture[str]) -> None:
    # Started here and not by the fixture: what a process writes goes where capfd pointed when it began.
    coordinator = DPCoordinator(ParallelConfig())
    try:
        throw_bad_frames_at(coordinator)
        assert coordinator.proc.is_alive()
    finally:
        coordinator.shutdown()
    logged = [line for line in capfd.readouterr().err.splitlines() if "dropped a message" in line]
    assert logged
    assert len(logged) == len({line.split("dropped", 1)[1].split(":")[0] for line in logged}), "one line a kind"


def throw_bad_frames_at(coordinator: DPCoordinator) -> None:
    """Bad frames on all three sockets, then a conversation that must go as ever."""
    back_publish, back_output = coordinator.get_engine_socket_addresses()
    front_publish = coordinator.get_stats_publish_address()
    with context() as zmq_context:
        pushing, rank = zmq_context.socket(zmq.PUSH), zmq_context.socket(zmq.XSUB)
        frontend = zmq_context.socket(zmq.XSUB)
        pushing.connect(back_output)
        rank.connect(back_publish)
        frontend.connect(front_publish)
        for endpoint in (pushing, rank, frontend):
            send_bad_frames(endpoint)
        for address in (back_publish, back_output, front_publish):
            shout_at(address)
        rank.send(b"\x01")
        frontend.send(b"\x01")
        frontend.send(b"\x01" + codec.frontend_topic(9))
        decode_rank, decode_frontend = codec.to_rank().decode, codec.to_frontend().decode
        assert isinstance(decode_rank(receive(rank)[0]), messages.Identify)
        pushing.send(codec.encode(messages.RankHello(messages.PROTOCOL_VERSION, 0, 7, "ipc:///rank", False)))
        while not isinstance(message := decode_rank(receive(rank)[0]), messages.Admit):
            pass
        assert (message.rank, message.incarnation) == (0, 7)
        pushing.send(codec.encode(messages.RankHello(messages.PROTOCOL_VERSION, 0, 7, "ipc:///rank", True)))
        members: object = None
        while not (isinstance(members, messages.Members) and members.members):
            members = decode_frontend(receive(frontend)[0])
        assert members.missing == [1]
        frontend.send(codec.encode(messages.WakeNotice(9, 0, 0)))
        while not isinstance(wake := decode_rank(receive(rank)[0]), messages.StartDPWave):
            pass
        assert wake.wave == 0
        assert isinstance(decode_frontend(receive(frontend)[0]), messages.LoadView | messages.Members)


def test_oversized_frame_ends_its_sender_only(coordinator: DPCoordinator) -> None:
    _, back_output = coordinator.get_engine_socket_addresses()
    with context() as zmq_context:
        large, small = zmq_context.socket(zmq.PUSH), zmq_context.socket(zmq.PUSH)
        frontend = zmq_context.socket(zmq.XSUB)
        frontend.connect(coordinator.get_stats_publish_address())
        frontend.send(b"\x01")
        frontend.send(b"\x01" + codec.frontend_topic(9))
        before_mb = memory_mb(coordinator.proc.pid or 0, "VmHWM")
        large.connect(back_output)
        small.connect(back_output)
        large.send(os.urandom(1024) * 64 * 1024)
        small.send(codec.encode(messages.RankHello(messages.PROTOCOL_VERSION, 1, 7, "ipc:///rank", True)))
        message: object = None
        while not (isinstance(message, messages.Members) and message.members):
            message = codec.to_frontend().decode(receive(frontend)[0])
        assert memory_mb(coordinator.proc.pid or 0, "VmHWM") < before_mb + 16


# What the reference's users find -----------------------------------------------------------------
def test_it_has_the_reference_s_names_and_arguments() -> None:
    run = inspect.signature(DPCoordinatorProc.run_coordinator).parameters
    addresses = ["front_publish_address", "back_output_address", "back_publish_address"]
    assert list(run)[:5] == ["engine_count", *addresses, "min_stats_update_interval_ms"]
    assert run["min_stats_update_interval_ms"].default == 100
    assert all(one.default is not one.empty or one.kind is one.VAR_KEYWORD for one in list(run.values())[5:])
    assert list(inspect.signature(DPCoordinatorProc.process_input_socket).parameters)[1:4] == addresses
    assert list(inspect.signature(DPCoordinatorProc).parameters)[:2] == ["engine_count", "min_stats_update_interval_ms"]


def test_start_wave_is_one_message_to_all_ranks(tmp_path: Path) -> None:
    with context() as zmq_context:
        coordinator, rank = zmq_context.socket(zmq.XPUB), zmq_context.socket(zmq.XSUB)
        coordinator.bind(f"ipc://{tmp_path}/b")
        rank.connect(f"ipc://{tmp_path}/b")
        rank.send(b"\x01")
        assert receive(coordinator) == [b"\x01"]
        for exclude in (1, None):
            DPCoordinatorProc._send_start_wave(coordinator, 3, exclude)
            assert [codec.to_rank().decode(frame) for frame in receive(rank)] == [messages.StartDPWave(3, exclude)]


def test_the_parts_of_the_shell_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two ranks, one of them loaded: the counts, the log of them, and a wake, from `process_input_socket`."""
    caplog.set_level(logging.DEBUG, "paceline.coordinator")
    process = DPCoordinatorProc(2, 1)
    bound: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
    addresses = [f"ipc://{tmp_path}/{name}" for name in ("f", "o", "b")]
    serving = threading.Thread(target=process.process_input_socket, args=(*addresses, bound.put), daemon=True)
    serving.start()
    assert list(bound.get(timeout=stretched(10))) == addresses
    assert process._get_engine_counts() == [[0, 0], [0, 0]]
    with context() as zmq_context:
        rank, pushing = zmq_context.socket(zmq.XSUB), zmq_context.socket(zmq.PUSH)
        rank.connect(addresses[2])
        pushing.connect(addresses[1])
        rank.send(b"\x01")
        assert isinstance(codec.to_rank().decode(receive(rank)[0]), messages.Identify)
        for number in range(2):
            pushing.send(codec.encode(messages.RankHello(messages.PROTOCOL_VERSION, number, 7, "ipc:///rank", True)))
        pushing.send(codec.encode(messages.RankReport(1, 7, 1, 0, True, Load(waiting=4, running=2))))
        while not isinstance(wake := codec.to_rank().decode(receive(rank)[0]), messages.StartDPWave):
            pass
        assert wake.wave == 0
        assert process._get_engine_counts() == [[0, 0], [4, 2]]
        wait_until(lambda: "[[0, 0], [4, 2]]" in caplog.text, "the counts are logged")
    process.stop()
    serving.join(stretched(10))
    assert not serving.is_alive()
