"""Doors between nodes: an attacker in a namespace of its own, without the secret and with one of its own making."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from paceline.net.links import SocketFolder
from paceline.net.secret import make
from paceline.net.sockets import SECRET
from tests.attacker import port_of
from tests.fuzz.flood import socket_folders
from tests.namespaces import Host, hosts
from tests.pace import stretched
from tests.serving import command, deployment, wait_until

pytestmark = pytest.mark.slow

PORT, RPC_PORT = 8000, 29550
ETH_ALL = 3
"""What crosses a bridge is taken by it before those see it that ask for one protocol."""
NOTHING = dict.fromkeys(("rendezvous", "broadcasts", "front-end", "replay", "rank", "eviction"), "")


class Recorder(threading.Thread):
    """What a host says over tcp to each port of another, from its link."""

    def __init__(self, host: Host, to: Host) -> None:
        super().__init__(daemon=True)
        self._from, self._to = (socket.inet_aton(one.address) for one in (host, to))
        self._link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_ALL))
        self._link.bind((host.link, ETH_ALL))
        self._link.settimeout(0.2)
        self._over = threading.Event()
        self._said: dict[tuple[int, int], dict[int, bytes]] = {}

    def run(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                packet = self._link.recv(65536)[14:]
                if packet[9] == socket.IPPROTO_TCP and (packet[12:16], packet[16:20]) == (self._from, self._to):
                    self._keep(packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4])])
        self._link.close()

    def _keep(self, segment: bytes) -> None:
        source, port = int.from_bytes(segment[:2]), int.from_bytes(segment[2:4])
        if (data := segment[(segment[12] >> 4) * 4 :]) and RPC_PORT <= port < RPC_PORT + 16:
            self._said.setdefault((port, source), {})[int.from_bytes(segment[4:8])] = data

    def write(self, folder: Path) -> None:
        """Each connection, as `PORT-SOURCE.bytes`."""
        self._over.set()
        self.join(stretched(10))
        for (port, source), parts in self._said.items():
            (folder / f"{port}-{source}.bytes").write_bytes(b"".join(parts[at] for at in sorted(parts)))


def attack(host: Host, head: Host, worker: Host, folder: Path, secret: str | None = None) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name != SECRET}
    variables |= {} if secret is None else {SECRET: secret}
    program = [*host.prefix, sys.executable, "-m", "tests.attacker", head.address, worker.address, host.address]
    done = subprocess.run(
        [*program, str(folder)], capture_output=True, text=True, timeout=stretched(120), env=variables
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def asked_all_the_while(url: str) -> Iterator[None]:
    """There is a prompt to be read at each rank, all the time."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            with contextlib.suppress(httpx2.HTTPError):
                httpx2.post(f"{url}/v1/completions", json={"prompt": "a secret", "max_tokens": 2}, timeout=5)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join(stretched(10))


def refused(url: str) -> int:
    lines = httpx2.get(f"{url}/metrics", timeout=5).text.splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("paceline_refused_connections_total "))


@contextlib.contextmanager
def two_nodes(head: Host, worker: Host, folder: Path, *how: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Where it serves, and what its nodes print; what the worker says to the head lies in the folder."""
    common = ["serve", "--engine", "timed", "-dp", "4", "-dpl", "2", "-dpa", head.address, "--bind", "arrival", *how]
    recorder = Recorder(worker, head)
    recorder.start()
    leads = [*common, "--host", "0.0.0.0", "--port", str(PORT), "--open-metrics"]
    with (
        command(*leads, prefix=head.prefix) as leading,
        command(*common, "--headless", "--data-parallel-start-rank", "2", prefix=worker.prefix) as following,
    ):
        url = f"http://{head.address}:{PORT}"
        leading.wait_line("serves on http")
        wait_until(lambda: len(httpx2.get(f"{url}/health").json()["ready"]) == 4, "all ranks", 60)
        recorder.write(folder)
        yield url, leading.lines, following.lines


def test_who_has_no_secret_gains_nothing_and_is_counted(tmp_path: Path) -> None:
    for name in ("secret", "guess"):
        make(tmp_path / name)
    with (
        hosts(3) as (head, worker, host),
        two_nodes(head, worker, tmp_path, "--secret-file", str(tmp_path / "secret")) as (url, said, other),
        asked_all_the_while(url),
    ):
        assert {port_of(path) - RPC_PORT for path in tmp_path.glob("*.bytes")} == {0, 2, 3}
        assert attack(host, head, worker, tmp_path) == NOTHING
        wait_until(lambda: refused(url) >= 6, "the refused connections")
        before = refused(url)
        assert attack(host, head, worker, tmp_path, str(tmp_path / "guess")) == NOTHING
        wait_until(lambda: refused(url) > before, "the refused connections of the second")
        assert any(f"refused at tcp://{head.address}:" in line for line in said)
        wait_until(lambda: any(f"refused at tcp://{worker.address}:" in line for line in other), "the worker's word")
        assert httpx2.get(f"{url}/health").json()["ready"] == [0, 1, 2, 3]


def test_the_same_attempts_gain_all_of_it_without_a_secret(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    with (
        hosts(3) as (head, worker, host),
        two_nodes(head, worker, tmp_path, "--insecure") as (url, _, _),
        asked_all_the_while(url),
    ):
        gained = attack(host, head, worker, tmp_path)
        assert [name for name, what in gained.items() if not what] == []


def test_the_folder_of_sockets_is_its_users_alone_and_stays_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.umask(0)
    try:
        with deployment("--engine", "timed", "-dp", "2") as running:
            folders = set(socket_folders(running.process.pid))
            sockets = {path for folder in folders for path in folder.iterdir() if path.is_socket()}
            assert {path.parent for path in sockets} == folders
            assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
            # A cleaner takes them away: whoever makes them again makes them no wider.
            for folder in folders:
                shutil.rmtree(folder)
            wait_until(lambda: all(path.exists() for path in sockets), "the sockets")
            assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
            assert running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        made = SocketFolder()
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
        made.close()
    finally:
        os.umask(before)
