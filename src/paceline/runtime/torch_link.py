"""How the members of a generation form a torch process group: over the connections of `group_link`."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from paceline.engines.group import GenerationEnded
from paceline.errors import StartupError
from paceline.runtime.collective import SocketGroup
from paceline.runtime.group_link import GroupListener, connect_members, host_and_port
from paceline.runtime.torch_group import SLOWEST_MEMBER, TorchGroup, first_line, sweep


def form_torch_group(
    listener: GroupListener,
    generation: int,
    rank: int,
    addresses: Mapping[int, str],
    timeout_s: float,
    backend: str = "gloo",
) -> TorchGroup:
    """Connect with all other members as `group_link.form_group` does, and form a torch process group of them.

    `backend` is `gloo`, or `nccl` (with this rank's GPU set by torch.cuda.set_device). The first member opens the
    store on a free port of its address's host, loopback for `ipc://`. Raises StartupError after `timeout_s`.
    """
    if backend not in ("gloo", "nccl"):
        raise StartupError(f"there is no group backend {backend}: gloo or nccl")
    if backend == "nccl" and not torch.cuda.is_available():
        raise StartupError("the group backend nccl needs a GPU")
    sweep()
    deadline = time.monotonic() + timeout_s
    links = connect_members(listener, generation, rank, addresses, timeout_s)
    made = None
    try:
        if links:
            store = _open_store(SocketGroup(generation, rank, links), addresses, deadline)
            own = sorted(addresses).index(rank)
            host = _host(addresses[rank])
            made = _process_group(backend, distributed.PrefixStore(f"generation-{generation}", store),
                                  own, len(addresses), host, deadline)  # fmt: skip
    except (GenerationEnded, RuntimeError, OSError) as error:
        for link in links.values():
            link.close()
        raise StartupError(f"generation {generation}: no {backend} group: {first_line(error)}") from None
    return TorchGroup(generation, rank, links, made, "cuda" if backend == "nccl" else "cpu")


def _open_store(wire: SocketGroup, addresses: Mapping[int, str], deadline: float) -> Any:
    """The store in which torch's members find each other: the first member's, who tells its port to the others."""
    root = wire.members[0]
    host = _host(addresses[root])
    timeout = _left(deadline)
    if wire.rank != root:
        (port,) = wire.all_reduce([0], "max")
        return distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    # Given a socket that listens on this host; the store's own would listen on all interfaces.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    store = distributed.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout,
                                 master_listen_fd=listening.detach())  # fmt: skip
    wire.all_reduce([port], "max")
    return store


def _process_group(backend: str, store: Any, own: int, size: int, host: str, deadline: float) -> Any:
    """torch's process group; returns when all are connected."""
    if backend == "nccl":
        return distributed.ProcessGroupNCCL(store, own, size, SLOWEST_MEMBER)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = _left(deadline)
    made = distributed.ProcessGroupGloo(store, own, size, options)
    made._set_default_timeout(SLOWEST_MEMBER)
    return made


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _host(address: str) -> str:
    """Where a member's torch connections are: its address's host, loopback where that is a file."""
    return "127.0.0.1" if address.startswith("ipc://") else host_and_port(address)[0]
