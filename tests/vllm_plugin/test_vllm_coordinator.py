"""The coordinator under vLLM as processes on sockets: what vLLM's launcher uses of it, and what survives what."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
from typer.testing import CliRunner

from paceline.errors import ConfigError, StartupError
from paceline.operate import loads_app
from paceline.process.spawn import wait_gone
from paceline.vllm.plugin import VllmCoordinator
from tests.net.peers import Context, context, send_bad_frames, shout_at
from tests.pace import stretched

pytestmark = pytest.mark.slow

DEADLINE_S = 20.0


class Deployment:
    """A real watchdog and coordinator; ranks and front-ends are bare sockets that speak as vLLM's do."""

    def __init__(self, zmq_context: Context, size: int = 2, *, waves: bool = True, **config: Any) -> None:
        fields = {"data_parallel_size_local": size, "data_parallel_master_ip": "127.0.0.1"} | config
        self.coordinator = VllmCoordinator(SimpleNamespace(data_parallel_size=size, **fields), waves)
        self._context = zmq_context
        self._sockets: list[zmq.Socket[bytes]] = []
        back_publish, back_output = self.coordinator.get_engine_socket_addresses()
        self.inputs = [self.socket(zmq.XSUB, back_publish) for _ in range(size)]
        self.outputs = [self.socket(zmq.PUSH, back_output) for _ in range(size)]
        self.frontends = [self.socket(zmq.XSUB, self.coordinator.get_stats_publish_address()) for _ in range(2)]
        for endpoint in (*self.inputs, *self.frontends):
            endpoint.send(b"\x01")

    def socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        self._sockets.append(endpoint := self._context.socket(kind))
        endpoint.connect(address)
        return endpoint

    def receive(self, endpoint: zmq.Socket[bytes]) -> list[bytes]:
        """The next message there. Meanwhile all sockets are looked at, as their owners would.

        One that is not, does not subscribe again when its coordinator comes back.
        """
        end = time.monotonic() + stretched(DEADLINE_S)
        while not endpoint.poll(10):
            assert time.monotonic() < end, "nothing came"
            for other in (*self.inputs, *self.frontends):
                other.getsockopt(zmq.EVENTS)
        return endpoint.recv_multipart()

    def greeted(self) -> Deployment:
        for endpoint in self.inputs:
            assert self.receive(endpoint) == [b"READY"]
        return self

    def says(self, rank: int, stats: object = None, complete: int | None = None, start: int | None = None) -> None:
        said = [rank, [], stats, time.monotonic(), None, None, complete, start, None]
        self.outputs[rank].send(msgspec.msgpack.encode(said))

    def reports(self, rank: int, waiting: int, running: int, wave: int = 0, step: int = 0) -> None:
        self.says(rank, {"num_waiting_reqs": waiting, "num_running_reqs": running, "step_counter": step,
                         "current_wave": wave, "kv_cache_usage": 0.5})  # fmt: skip

    def notices(self, rank: int, wave: int, frontend: int = 0) -> None:
        self.frontends[frontend].send(msgspec.msgpack.encode((rank.to_bytes(2, "little"), wave)))

    def next_wake(self, rank: int) -> list[Any]:
        """The next START_DP_WAVE at a rank: (wave, whom it leaves out)."""
        while True:
            frames = self.receive(self.inputs[rank])
            if frames != [b"READY"]:
                assert frames[0] == b"\x02"
                wake: list[Any] = msgspec.msgpack.decode(frames[1])
                return wake

    def wait_wake(self, rank: int, wave: int) -> None:
        """Read what a rank hears until it is woken for this wave."""
        while self.next_wake(rank)[0] != wave:
            pass

    def wait_view(self, wanted: Callable[[Any, int, bool], bool], frontend: int = 0) -> tuple[Any, int, bool]:
        """Read what front-ends hear until it is as wanted."""
        end = time.monotonic() + stretched(DEADLINE_S)
        while time.monotonic() < end:
            counts, wave, running = msgspec.msgpack.decode(self.receive(self.frontends[frontend])[0])
            if wanted(counts, wave, running):
                return counts, wave, running
        raise AssertionError("it was never published")

    def last_view(self) -> tuple[Any, int, bool]:
        """What front-ends hear when all that they have heard is read."""
        known: tuple[Any, int, bool] = self.wait_view(lambda *_: True)
        while self.frontends[0].poll(500):
            known = self.wait_view(lambda *_: True)
        return known

    def child(self) -> int:
        end = time.monotonic() + stretched(DEADLINE_S)
        while time.monotonic() < end:
            found = subprocess.run(["pgrep", "-P", str(self.coordinator.proc.pid)], capture_output=True, check=False)
            if found.stdout:
                return int(found.stdout.split()[0])
        raise AssertionError("there is no coordinator")

    def kill(self) -> int:
        """The coordinator dies; returns who it was."""
        pid = self.child()
        os.kill(pid, signal.SIGKILL)
        return pid


@contextlib.contextmanager
def deployment(size: int = 2, **config: Any) -> Iterator[Deployment]:
    with context() as zmq_context:
        made = Deployment(zmq_context, size, **config)
        try:
            yield made
        finally:
            made.coordinator.shutdown()


def test_a_wave_from_its_notice_to_its_end() -> None:
    with deployment(3) as running:
        running.greeted()
        running.notices(1, 0)
        assert [running.next_wake(rank) for rank in range(3)] == [[0, b"\x01\x00"]] * 3
        running.reports(1, 0, 1)
        running.says(0, start=0)
        running.wait_view(lambda _, wave, runs: (wave, runs) == (0, True), frontend=1)
        running.reports(1, 0, 1, step=2)
        running.says(0, complete=0)
        counts, _, _ = running.wait_view(lambda _, wave, runs: (wave, runs) == (1, False))
        assert counts == [[0, 0, 0.0], [0, 1, 0.5], [0, 0, 0.0]]


def test_cold_start_of_headless_ranks() -> None:
    # vllm #51983, #54762: a request of wave 0 at a rank in wave 0, and no front-end says a word.
    with deployment(4) as running:
        running.greeted()
        running.reports(3, 1, 0)
        for rank in (0, 1, 2):
            assert running.next_wake(rank)[0] == 0
        running.wait_view(lambda _, wave, runs: (wave, runs) == (0, True))


def test_a_notice_lost_while_the_coordinator_restarts() -> None:
    with deployment(3) as running:
        running.greeted()
        running.says(0, start=0)
        running.says(0, complete=0)
        running.wait_view(lambda _, wave, runs: (wave, runs) == (1, False))
        running.kill()
        # While nobody is there: the front-end's notice goes nowhere. The rank's report waits in its socket, or is lost
        # too, with the connection; then it is the wake of a new coordinator that helps.
        running.notices(2, 1)
        running.reports(2, 1, 0, wave=1)
        for rank in (0, 1):
            running.wait_wake(rank, 1)
        running.says(0, start=1)
        running.wait_view(lambda _, wave, runs: (wave, runs) == (1, True))


def test_a_rank_left_alone_by_a_lost_message_is_freed() -> None:
    # Everything that was said of wave 1 went down with the coordinator. Only waking all can find out.
    with deployment(2) as running:
        running.greeted()
        running.says(0, start=0)
        running.says(0, complete=0)
        running.wait_view(lambda _, wave, runs: (wave, runs) == (1, False))
        running.kill()
        for rank in range(2):
            running.wait_wake(rank, 1)


def test_killed_again_and_again() -> None:
    with deployment(2) as running:
        running.greeted()
        watchdog = running.coordinator.proc.pid
        for wave in range(5):
            before = running.kill()
            # What is said now may go down with the dead one's connection. That all are woken cannot.
            running.reports(1, 1, 0, wave=wave)
            running.wait_wake(0, wave)
            running.says(0, start=wave)
            running.wait_view(lambda _, at, runs, wave=wave: (at, runs) == (wave, True))  # type: ignore[misc]
            assert running.child() != before
            running.says(0, complete=wave)
            running.wait_view(lambda _, at, runs, wave=wave: (at, runs) == (wave + 1, False))  # type: ignore[misc]
        assert running.coordinator.proc.is_alive()
        assert running.coordinator.proc.pid == watchdog


def test_a_watchdogs_end_is_the_coordinators_end() -> None:
    with deployment(2) as running:
        child = running.child()
        running.coordinator.proc.kill()
        assert wait_gone([running.coordinator.proc], stretched(DEADLINE_S))
        assert running.coordinator.proc.exitcode == -signal.SIGKILL
        wait_until(lambda: not alive(child))


def test_shutdown_ends_both_and_leaves_nothing() -> None:
    with deployment(2) as running:
        child, folder = running.child(), running.coordinator.get_stats_publish_address()
        running.coordinator.shutdown(timeout=5)
        assert not running.coordinator.proc.is_alive()
        wait_until(lambda: not alive(child))
        assert not os.path.exists(os.path.dirname(folder.removeprefix("ipc://")))
        running.coordinator.shutdown()


def test_a_launchers_end_is_everybodys_end() -> None:
    program = """
import sys, types
from paceline.vllm.plugin import VllmCoordinator
if __name__ == "__main__":
    sizes = {"data_parallel_size": 2, "data_parallel_size_local": 2}
    config = types.SimpleNamespace(data_parallel_master_ip="127.0.0.1", **sizes)
    coordinator = VllmCoordinator(config)
    print(coordinator.proc.pid, flush=True)
    sys.stdin.read()
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdin is not None
    watchdog = int(launcher.stdout.readline())
    child = int(subprocess.run(["pgrep", "-P", str(watchdog)], capture_output=True, check=True).stdout.split()[0])
    launcher.kill()
    launcher.wait()
    launcher.stdin.close()
    launcher.stdout.close()
    wait_until(lambda: not alive(watchdog) and not alive(child))


def test_bad_frames_are_counted_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with status(monkeypatch) as port, deployment(2) as running:
        running.greeted()
        back_publish, back_output = running.coordinator.get_engine_socket_addresses()
        send_bad_frames(running.socket(zmq.PUSH, back_output))
        # What begins like a subscription is one: strangers speak here, not the front-ends and ranks themselves.
        send_bad_frames(running.socket(zmq.XSUB, running.coordinator.get_stats_publish_address()))
        send_bad_frames(running.socket(zmq.XSUB, back_publish))
        for address in (*running.coordinator.get_engine_socket_addresses(),
                        running.coordinator.get_stats_publish_address()):  # fmt: skip
            shout_at(address)
        running.reports(0, 2, 3)
        running.wait_view(lambda counts, *_: bool(counts) and counts[0] == [2, 3, 0.5])

        def counted() -> bool:
            # Each socket is read in its turn: that one's reports are in the view says nothing of the others.
            bad_frames = ask(port, "/health")["garbage"]
            return all(sum(bad_frames[whose].values()) > 50 for whose in ("ranks", "front_ends"))

        wait_until(counted)
        assert ask(port, "/health")["restarts"] == 0


def test_health_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_VLLM_STALL_TIMEOUT", "0.2")
    with status(monkeypatch) as port, deployment(3) as running:
        running.greeted()
        wait_until(lambda: ask(port, "/health")["listening"] == 3)
        assert [load["waiting"] for load in ask(port, "/loads")["ranks"]] == [0, 0, 0]
        running.reports(1, 2, 3, wave=0)
        wait_until(lambda: bool(ask(port, "/health")["stalls"]))
        health = ask(port, "/health")
        assert health["unanswered"] == [0, 2]
        assert "rank 0 was woken for wave 0" in health["stalls"][0]
        load = ask(port, "/loads")["ranks"][1]
        assert (load["rank"], load["waiting"], load["running"]) == (1, 2, 3)
        shown = CliRunner().invoke(loads_app, ["--url", f"http://127.0.0.1:{port}"], env={"COLUMNS": "120"})
        lines = [line.split() for line in shown.stdout.splitlines()]
        assert lines[1:] == [["0", "0", "0"], ["1", "2", "3", "50%"], ["2", "0", "0"], ["all", "2", "3", "50%"]]
        running.reports(1, 0, 3, wave=0, step=1)
        wait_until(lambda: not ask(port, "/health")["stalls"])
        assert ask(port, "/nonsense")["error"]
        running.kill()
        wait_until(lambda: ask(port, "/health").get("restarts") == 1)


def test_addresses_for_other_nodes() -> None:
    with deployment(2, data_parallel_size_local=1, data_parallel_hybrid_lb=True) as running:
        for address in (*running.coordinator.get_engine_socket_addresses(),
                        running.coordinator.get_stats_publish_address()):  # fmt: skip
            assert address.startswith("tcp://127.0.0.1:")
        running.greeted()
        running.kill()
        assert [running.next_wake(rank)[0] for rank in range(2)] == [0, 0], "at the same addresses"


def test_an_address_that_cannot_be_is_one_line() -> None:
    with context() as zmq_context, pytest.raises(StartupError, match="cannot bind"):
        Deployment(zmq_context, data_parallel_size_local=1, data_parallel_master_ip="192.0.2.1")


@pytest.mark.parametrize("name", ["PACELINE_VLLM_INTERVAL_MS", "PACELINE_VLLM_STALL_TIMEOUT"])
def test_a_setting_that_cannot_be_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "soon")
    with context() as zmq_context, pytest.raises(ConfigError, match=name):
        Deployment(zmq_context)


@contextlib.contextmanager
def status(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    monkeypatch.setenv("PACELINE_VLLM_STATUS", f"127.0.0.1:{port}")
    yield port


def ask(port: int, path: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=stretched(10)) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            content = error.read()
    said: dict[str, Any] = json.loads(content)
    return said


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + stretched(DEADLINE_S)
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0)
