"""What vLLM's launcher makes and uses in place of its own `DPCoordinator`."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Mapping
from multiprocessing.context import SpawnProcess
from typing import Any

import msgspec

from paceline.errors import ConfigError, StartupError
from paceline.net.links import SocketFolder
from paceline.net.sockets import tcp_address
from paceline.process.spawn import spawn, stop
from paceline.vllm.codec import VllmDialect
from paceline.vllm.process import Settings
from paceline.vllm.translation import Memory
from paceline.vllm.watchdog import run_watchdog

NAME = "Paceline_DP_Coordinator"
INTERVAL_MS = 10.0
STARTUP_TIMEOUT_S = 60.0


class VllmCoordinator:
    """A keeper with a coordinator under it; names and arguments are those of vLLM's `DPCoordinator`.

    `parallel_config`: vLLM's. `logging_config`: vLLM's, of which nothing is used. Raises StartupError where it does not
    come up, ConfigError for a variable of the environment that cannot be.
    """

    dialect = VllmDialect()
    """The installed vLLM's; the plugin sets it."""
    program = "paceline.vllm.main"
    """The module that the coordinator runs as."""

    def __init__(
        self, parallel_config: Any, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self._folder = SocketFolder()
        self._processes: list[SpawnProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, self._folder)
        try:
            settings = _settings(parallel_config, enable_wave_coordination, self.dialect, self._folder)
            self._addresses = self._start(settings | {"program": self.program})
        except (StartupError, ConfigError):
            self.shutdown()
            raise

    @property
    def proc(self) -> SpawnProcess:
        """The keeper's process, which vLLM watches."""
        return self._processes[0]

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect."""
        return self._addresses[0]

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """Where ranks connect: (their input, the coordinator's broadcasts; their output, its inbox)."""
        return self._addresses[2], self._addresses[1]

    def shutdown(self, timeout: float | None = None) -> None:
        """End both, waiting up to `timeout` seconds. May be called twice."""
        if self._finalizer.detach():
            _end(self._processes, self._folder, timeout)

    def _start(self, settings: dict[str, Any]) -> tuple[str, str, str]:
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        with reader:
            kwargs = {"settings": settings, "report": writer}
            self._processes.append(spawn(NAME, run_watchdog, kwargs, settings["log_level"]))
            writer.close()
            try:
                if not reader.poll(STARTUP_TIMEOUT_S):
                    raise StartupError(f"the coordinator did not report its addresses within {STARTUP_TIMEOUT_S:g} s")
                answer = reader.recv()
            except EOFError:
                raise StartupError("the coordinator's keeper ended before it was up") from None
        if isinstance(answer, str):
            raise StartupError(f"coordinator: {answer}")
        addresses: tuple[str, str, str] = answer
        return addresses


def _settings(config: Any, waves: bool, dialect: VllmDialect, folder: SocketFolder) -> dict[str, Any]:
    """The coordinator's Settings, but for the channel. Addresses are chosen as vLLM chooses them."""
    environment = os.environ
    size = config.data_parallel_size
    external = bool(getattr(config, "data_parallel_external_lb", False))
    front_local = not (external or getattr(config, "data_parallel_hybrid_lb", False))
    back_local = size == config.data_parallel_size_local and not getattr(config, "enable_elastic_ep", False)

    def address(local: bool, name: str) -> str:
        return folder.address(name) if local else tcp_address(config.data_parallel_master_ip)

    settings = Settings(
        channel=-1,
        front_publish_address=address(front_local, "front-publish"),
        back_output_address=address(back_local, "back-output"),
        back_publish_address=address(back_local, "back-publish"),
        memory=Memory(size),
        dialect=dialect,
        interval_ms=_number(environment, "PACELINE_VLLM_INTERVAL_MS", INTERVAL_MS),
        lockstep=waves,
        publish_loads=not external,
        stall_s=_number(environment, "PACELINE_VLLM_STALL_TIMEOUT", 30.0),
        log_level=environment.get("PACELINE_VLLM_LOG_LEVEL", "info"),
    )
    made: dict[str, Any] = msgspec.to_builtins(settings)
    del made["channel"]
    return made | {"status_address": environment.get("PACELINE_VLLM_STATUS", "")}


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value <= 3_600_000:
        raise ConfigError(f"{name}: must be a number above 0 and at most 3600000, not {text!r}")
    return value


def _end(processes: list[SpawnProcess], folder: SocketFolder, timeout_s: float | None = None) -> None:
    stop(processes, 2.0 if timeout_s is None else timeout_s)
    folder.close()
