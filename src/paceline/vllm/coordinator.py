"""What vLLM's launcher makes and uses in place of its own `DPCoordinator`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from paceline.errors import ConfigError, StartupError
from paceline.net.handle import CoordinatorHandle
from paceline.vllm.codec import VllmDialect
from paceline.vllm.process import Settings
from paceline.vllm.translation import Memory
from paceline.vllm.watchdog import run_watchdog

NAME = "Paceline_DP_Coordinator"
INTERVAL_MS = 10.0
STARTUP_TIMEOUT_S = 60.0


class VllmCoordinator(CoordinatorHandle):
    """A watchdog with a coordinator under it; names and arguments are those of vLLM's `DPCoordinator`.

    `parallel_config`: vLLM's. `logging_config`: vLLM's, of which nothing is used. `proc` is the watchdog's process,
    which vLLM watches. Raises StartupError where it does not come up, ConfigError for a variable of the environment
    that cannot be.
    """

    dialect = VllmDialect()
    """The installed vLLM's; the plugin sets it."""
    program = "paceline.vllm.main"
    """The module that the coordinator runs as."""

    def __init__(
        self, parallel_config: Any, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        super().__init__()
        try:
            addresses = self._chosen_addresses(parallel_config)
            settings = _settings(parallel_config, enable_wave_coordination, self.dialect, addresses)
            arguments = {"settings": settings | {"program": self.program}}
            level = settings["log_level"]
            self._start_process(NAME, run_watchdog, "report", arguments, level, STARTUP_TIMEOUT_S)
        except (StartupError, ConfigError):
            self.shutdown()
            raise


def _settings(config: Any, waves: bool, dialect: VllmDialect, addresses: dict[str, Any]) -> dict[str, Any]:
    """The coordinator's Settings, but for the channel."""
    environment = os.environ
    settings = Settings(
        channel=-1,
        **addresses,
        memory=Memory(config.data_parallel_size),
        dialect=dialect,
        interval_ms=_number(environment, "PACELINE_VLLM_INTERVAL_MS", INTERVAL_MS),
        lockstep=waves,
        publish_loads=not getattr(config, "data_parallel_external_lb", False),
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
