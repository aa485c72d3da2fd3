"""A rank's process and its workers, as vLLM wants them: variables, cores, log lines, and nothing left behind."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import multiprocessing
import os
import re
import socket
import subprocess
import warnings
from collections.abc import Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import msgspec

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.group import RankGroup
from paceline.engines.vllm_flags import About
from paceline.engines.vllm_worker import RANK_PROCESS

BIND = "VLLM_CPU_OMP_THREADS_BIND"


ADDRESS_BYTES = 16


def meeting_place(group: RankGroup, host: str) -> tuple[str, int]:
    """An address and a free port of the group's first member, wherever that runs, told to all. `host`: this one's."""
    said = [0] * (ADDRESS_BYTES + 2)
    if group.rank == group.members[0]:
        packed = ipaddress.ip_address(host).packed
        said = [_free_port(host), len(packed), *packed.ljust(ADDRESS_BYTES, b"\0")]
    port, length, *address = group.all_reduce(said, "max")
    return str(ipaddress.ip_address(bytes(address[:length]))), port


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def quieten() -> None:
    """vLLM's log lines come through ours, from `warning` on where its own variable says nothing else."""
    vllm = logging.getLogger("vllm")
    vllm.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    # It tells each user of its in-process engine so, and a rank has its process for itself.
    said_of_all = "The global random seed is set to"
    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(lambda record: not str(record.msg).startswith(said_of_all))
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def track_own_memory() -> None:
    """Have what this process and its workers share in memory removed when they have ended, however that happens.

    Python's resource tracker does so, but all that one process has started share one, which would remember what a
    killed rank has left until the deployment ends. So a rank has a tracker of its own.
    """
    tracker: Any = resource_tracker._resource_tracker
    vars(tracker).update(_fd=None, _pid=None)
    # It tells of what it removes, which is what it is there for.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    resource_tracker.ensure_running()
    del os.environ["PYTHONWARNINGS"]


def shared_memory() -> list[str]:
    """What vLLM's kernels have put into /dev/shm for this process and its workers, past Python that tracks the rest."""
    found: set[str] = set()
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text()
            found |= set(re.findall(r" (/dev/shm/vllm[^/\n]+)$", maps, re.MULTILINE))
    return sorted(found)


def remove_when_ended(paths: Sequence[str]) -> None:
    """A shell removes them once this process has ended and its pipe with it."""
    if paths:
        wait = ["/bin/sh", "-c", 'cat > /dev/null; rm -f "$@"', "sh", *paths]
        subprocess.Popen(wait, stdin=subprocess.PIPE, start_new_session=True)


def about_of(settings: EngineSettings) -> About:
    """What was learned of the model when the node was prepared."""
    return msgspec.convert(settings.learned, About)


def environment(settings: EngineSettings, about: About, together: bool) -> dict[str, str]:
    """The variables that a rank's process, and so its workers, need. What the user has set stays, where it can.
    `together`: whether ranks step so.
    """
    place, devices = settings.place, about.devices
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    name = f"rank {settings.rank}"
    made = {
        # Spawned workers load `vllm_worker.py`; forked ones would not.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CONFIGURE_LOGGING": "0",
        RANK_PROCESS: f"{os.getpid()},{name},{level}",
    }  # fmt: skip
    if "VLLM_NO_USAGE_STATS" not in os.environ:
        made["VLLM_NO_USAGE_STATS"] = "1"
    if about.device_kind == "cpu":
        allowed = sorted(os.sched_getaffinity(0))
        lists = cores(allowed, place, settings.places, devices)
        made["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(len(lists[0]))
        if together:
            # In a group vLLM takes its part of all by its local rank.
            lists = [one for each in range(settings.places) for one in cores(allowed, each, settings.places, devices)]
        made[BIND] = os.environ.get(BIND) or "|".join(",".join(map(str, one)) for one in lists)
    elif about.visible and not together:
        own = about.visible[place * devices : (place + 1) * devices]
        if len(own) < devices:
            raise EngineError(f"{name}: wants {devices} devices, {about.device_variable} has {len(own)} left for it")
        made[about.device_variable] = ",".join(own)
    return made


def cores(allowed: Sequence[int], place: int, places: int, workers: int) -> list[list[int]]:
    """The cores of each worker of the rank in this place: an equal share, or one that others have as well."""
    share = max(1, len(allowed) // (places * workers))
    first = place * workers * share
    return [
        [allowed[(first + worker * share + core) % len(allowed)] for core in range(share)] for worker in range(workers)
    ]
