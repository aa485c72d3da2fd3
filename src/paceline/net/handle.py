"""A coordinator's process as its starter holds it: started with a pipe, found at its addresses, ended.

The names are those of vLLM's `DPCoordinator` (`vllm/v1/engine/coordinator.py`), so that an engine that starts its
coordinator can start one of ours. The process binds first and reports the bound addresses through the pipe, so that
port 0 works; its starter keeps the folder in which its ipc sockets lie.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from paceline.errors import StartupError
from paceline.net.links import SocketFolder
from paceline.net.sockets import tcp_address
from paceline.process.spawn import ChildProcess, spawn, stop

ADDRESSES = ("front_publish_address", "back_output_address", "back_publish_address")


class CoordinatorHandle:
    """One coordinator over all its lives."""

    def __init__(self) -> None:
        self._folder = SocketFolder()
        self._processes: list[ChildProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, self._folder)
        self._addresses: tuple[str, str, str]

    @property
    def proc(self) -> ChildProcess:
        """The process that runs now."""
        return self._processes[-1]

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect."""
        return self._addresses[0]

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """Where ranks connect: (their input, the coordinator's broadcasts; their output, its inbox)."""
        return self._addresses[2], self._addresses[1]

    def shutdown(self, timeout: float | None = None) -> None:
        """End the process, waiting up to `timeout` seconds before it is killed. May be called twice."""
        if self._finalizer.detach():
            _end(self._processes, self._folder, timeout)

    def _chosen_addresses(self, config: Any) -> dict[str, str]:
        """Where to bind, as vLLM chooses it: ipc where all that connect are on this node."""
        external = bool(getattr(config, "data_parallel_external_lb", False))
        front_local = not (external or getattr(config, "data_parallel_hybrid_lb", False))
        all_here = config.data_parallel_size == config.data_parallel_size_local and not getattr(config, "on_ray", False)
        # An elastic deployment may get ranks on other nodes.
        back_local = all_here and not getattr(config, "enable_elastic_ep", False)
        local = (front_local, back_local, back_local)
        # Ours are the same in every life; under vLLM the system chooses.
        ports = getattr(config, "coordinator_ports", (0, 0, 0))
        return {
            name: self._folder.address(name.removesuffix("_address").replace("_", "-"))
            if here else tcp_address(config.data_parallel_master_ip, port)
            for name, here, port in zip(ADDRESSES, local, ports, strict=True)
        }  # fmt: skip

    def _start_process(
        self, name: str, target: Callable[..., None], pipe: str, arguments: dict[str, Any], log_level: str,
        timeout_s: float,
    ) -> None:  # fmt: skip
        """Start `target(pipe=…, **arguments)` and take its addresses. Raises StartupError after `timeout_s`."""
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        with reader:
            self._processes.append(spawn(name, target, arguments | {pipe: writer}, log_level))
            writer.close()
            self._addresses = _read_addresses(reader, timeout_s)


def _read_addresses(reader: Connection, timeout_s: float) -> tuple[str, str, str]:
    try:
        if not reader.poll(timeout_s):
            raise StartupError(f"the coordinator did not report its addresses within {timeout_s:g} s")
        answer = reader.recv()
    except EOFError:
        raise StartupError("the coordinator ended before it was up") from None
    if isinstance(answer, str):
        raise StartupError(f"coordinator: {answer}")
    addresses: tuple[str, str, str] = answer
    return addresses


def _end(processes: list[ChildProcess], folder: SocketFolder, timeout_s: float | None = None) -> None:
    stop(processes, 2.0 if timeout_s is None else timeout_s)
    folder.close()
