"""A Ray cluster whose nodes are network namespaces of this machine, and a deployment that is served on its head."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.namespaces import Host
from tests.ray.environment import binaries
from tests.serving import DEADLINE_S, Command, is_alive, process_name, wait_until

PORT = 6379
CPUS = 4
OBJECTS_BYTES = 80_000_000


def pids(host: Host) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
    return [int(pid) for pid in listed.stdout.split()]


def named(host: Host) -> dict[str, int]:
    """The processes of ours on a node, by name."""
    found = {process_name(pid): pid for pid in pids(host)}
    return {name.removeprefix("pl:"): pid for name, pid in found.items() if name.startswith("pl:")}


def ranks(host: Host) -> list[int]:
    """Those that run on a node."""
    return sorted(int(name.split()[1]) for name in named(host) if name.startswith("rank "))


class Cluster:
    """Ray's nodes. The first is its head; `folder` is where that keeps its files."""

    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self.hosts = hosts
        self._folder = folder
        self._lives = 0
        self.address = f"{hosts[0].address}:{PORT}"

    def start(self, host: Host) -> None:
        """Have a node, and wait until it is part of the cluster."""
        self._lives += 1
        where = ["--address", self.address]
        if host is self.hosts[0]:
            # The path of a socket must be short.
            where = ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir",
                     str(self._folder / str(self._lives))]  # fmt: skip
        arguments = [
            "start", *where, "--node-ip-address", host.address, "--num-cpus", str(CPUS),
            "--object-store-memory", str(OBJECTS_BYTES),
        ]  # fmt: skip
        subprocess.run(
            [*host.prefix, str(binaries() / "ray"), *arguments], check=True, timeout=DEADLINE_S * 2,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def kill(self, host: Host, *, spare: Sequence[int] = ()) -> None:
        """Kill -9 whatever runs on a node, and is not to be spared."""
        doomed = [pid for pid in pids(host) if pid not in spare]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in doomed), "all of the node is dead")

    @contextlib.contextmanager
    def serving(self, *arguments: str) -> Iterator[Command]:
        """`paceline serve` on the head, ready."""
        head = self.hosts[0]
        run = Command(
            "serve", "--host", "0.0.0.0", "--data-parallel-backend", "ray", "--ray-address", self.address, *arguments,
            python=str(binaries() / "python"), prefix=head.prefix,
        )  # fmt: skip
        try:
            run.wait_line("serves on http")
            run.open(f"http://{head.address}:8000")
            yield run
        except BaseException:
            print(run.output)
            raise
        finally:
            run.close()


@contextlib.contextmanager
def cluster(hosts: Sequence[Host], nodes: int, folder: Path) -> Iterator[Cluster]:
    """`nodes` of the hosts are started; all are ended."""
    made = Cluster(hosts, folder)
    try:
        for host in hosts[:nodes]:
            made.start(host)
        yield made
    finally:
        for host in hosts:
            made.kill(host)
