"""Ranks in a Ray cluster of several nodes, each a namespace: nodes, ranks and Ray itself die under streams."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces import Host, hosts
from tests.ray.cluster import Cluster, cluster, named, pids, ranks
from tests.ray.environment import binaries
from tests.serving import Command, command, wait_until
from tests.streams import TIMED, streams

pytestmark = pytest.mark.slow

TOKENS = 600
WHOLE = "".join(f" {index}" for index in range(TOKENS))
ASK: dict[str, Any] = {"prompt": "a", "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def three() -> Iterator[list[Host]]:
    with hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def ray(three: list[Host]) -> Iterator[Cluster]:
    """Two nodes; the third is not started yet."""
    with tempfile.TemporaryDirectory(prefix="pl-ray-") as folder, cluster(three, 2, Path(folder)) as made:
        yield made


def ready(running: Command) -> list[int]:
    return list(running.health()["ready"])


def all_ready(running: Command, count: int) -> None:
    wait_until(lambda: ready(running) == list(range(count)), f"{count} ranks are ready", 90)


def scale(head: Host, size: int) -> None:
    with command("scale", str(size), "--url", "http://127.0.0.1:8000", prefix=head.prefix) as scaling:
        assert scaling.wait_end() == 0, scaling.output


def secret(folder: Path) -> tuple[str, str]:
    with command("secret", "new", str(folder / "secret")) as made:
        assert made.wait_end() == 0
    return "--secret-file", str(folder / "secret")


def test_ranks_live_on_all_nodes_and_elsewhere_when_one_dies(ray: Cluster, three: list[Host], tmp_path: Path) -> None:
    head, worker, third = three
    with ray.serving(*TIMED, *secret(tmp_path), "-dp", "4") as running:
        all_ready(running, 4)
        assert (len(ranks(head)), len(ranks(worker))) == (2, 2)
        with streams(running, [ASK] * 8) as read:
            (first, *_) = ranks(worker)
            os.kill(named(worker)[f"rank {first}"], signal.SIGKILL)
            running.wait_line(f"rank {first} ended (killed by SIGKILL)")
            running.wait_line(f"rank {first} is back")
            assert first in ranks(worker), "what was set aside for it is kept"
            ray.kill(worker)
            assert read.wait() == [WHOLE] * 8
        all_ready(running, 4)
        assert ranks(head) == [0, 1, 2, 3]
        ray.start(third)
        scale(head, 6)
        all_ready(running, 6)
        assert len(ranks(third)) == 2
        scale(head, 2)
        wait_until(lambda: len(ranks(head)) + len(ranks(third)) == 2, "the others have ended")
        with streams(running, [ASK] * 2) as read:
            # As systemd or Slurm would: to all that this node has, but Ray's own.
            for pid in [running.process.pid, *named(head).values()]:
                os.kill(pid, signal.SIGTERM)
            assert read.wait() == [WHOLE] * 2
        assert running.wait_end() == 0
        wait_until(lambda: not named(head) and not named(third), "nothing is left")


def test_ranks_in_lockstep_and_a_supervisor_that_is_killed(ray: Cluster, three: list[Host], tmp_path: Path) -> None:
    head, _, third = three
    with ray.serving("--engine", "timed-lockstep", *secret(tmp_path), "-dp", "2") as running:
        assert (len(ranks(head)), len(ranks(third))) == (1, 1)
        with streams(running, [ASK] * 2) as read:
            assert read.wait() == [WHOLE] * 2
        (main,) = [pid for pid in pids(head) if b"paceline\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(main, signal.SIGKILL)
        wait_until(lambda: not named(head) and not named(third), "no orphans")


def test_streams_outlive_what_speaks_with_ray_and_the_whole_of_ray(ray: Cluster, three: list[Host]) -> None:
    head = three[0]
    with ray.serving(*TIMED, "--insecure", "-dp", "2") as running:
        with streams(running, [ASK] * 4) as read:
            os.kill(named(head)["ray"], signal.SIGKILL)
            assert read.wait() == [WHOLE] * 4
        all_ready(running, 2)
        with streams(running, [ASK] * 4) as read:
            ours = [running.process.pid, *(pid for name, pid in named(head).items() if not name.startswith("rank "))]
            for host in three:
                ray.kill(host, spare=[*ours, *supervisors(head)])
            ray.start(head)
            assert read.wait() == [WHOLE] * 4
        assert ranks(head) == [0, 1]


def supervisors(host: Host) -> list[int]:
    """Those that serve, and what Python starts beside them."""
    found = []
    for pid in pids(host):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"paceline\0serve" in line or b"resource_tracker" in line:
                found.append(pid)
    return found


def test_what_is_wrong_is_said(ray: Cluster, three: list[Host]) -> None:
    python = {"python": str(binaries() / "python"), "prefix": three[0].prefix}
    serve = ("serve", *TIMED, "--data-parallel-backend", "ray", "--insecure", "--ray-address")
    with command(*serve, f"{three[0].address}:1", **python) as running:
        assert running.wait_end() == 1
        assert f"--data-parallel-backend ray: {three[0].address}:1: [Errno 111] Connection refused" in running.output
    little = ("--ray-cpus-per-rank", "3", "-dp", "2", "--startup-timeout", "10")
    with command(*serve, ray.address, *little, **python) as running:
        assert running.wait_end() == 1
        assert "not ready within --startup-timeout of 10 s: rank" in running.output
        assert "(waiting for room in the Ray cluster: 3 CPU, 0%)" in running.output
