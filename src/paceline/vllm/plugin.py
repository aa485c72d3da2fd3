"""The plugin: vLLM's launcher gets Paceline's coordinator where the environment says `PACELINE_VLLM=1`.

vLLM loads it by its entry point in the group `vllm.general_plugins`, in every one of its processes and before the
launcher makes a coordinator. Without the variable it does nothing and says nothing. `paceline vllm ...` is the `vllm`
command with that variable set. What the launcher then makes and uses in place of its own `DPCoordinator` is a watchdog
with a coordinator under it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
        channel=-1, **addresses, memory=Memory(config.data_parallel_size), dialect=dialect,
        interval_ms=_number(environment, "PACELINE_VLLM_INTERVAL_MS", INTERVAL_MS), lockstep=waves,
        publish_loads=not getattr(config, "data_parallel_external_lb", False),
        stall_s=_number(environment, "PACELINE_VLLM_STALL_TIMEOUT", 30.0),
        log_level=environment.get("PACELINE_VLLM_LOG_LEVEL", "info"),
    )  # fmt: skip
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


COORDINATOR = "vllm.v1.engine.coordinator"
USER = "vllm.v1.engine.utils"
"""The module whose `launch_core_engines` looks `DPCoordinator` up by its own name."""
OLD_SYNC_INTERVAL = 32
ROUTING = "PACELINE_VLLM_ROUTING"
ON = ("1", "true", "yes", "on")


class InstalledCoordinator(VllmCoordinator):
    """Speaks as the installed vLLM does."""

    def __init__(
        self, parallel_config: Any, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self.dialect = installed_dialect(parallel_config)
        super().__init__(parallel_config, enable_wave_coordination, logging_config)


def register() -> None:
    """vLLM calls this."""
    if os.environ.get(ROUTING, "") in ON:
        from paceline.vllm.routing import install

        install(importlib.import_module("vllm.v1.engine.core_client").DPLBAsyncMPClient)
    if os.environ.get("PACELINE_VLLM", "") not in ON:
        return
    coordinator = importlib.import_module(COORDINATOR)
    coordinator.DPCoordinator = InstalledCoordinator  # type: ignore[attr-defined]
    # Where it has not been imported yet, it will find ours there.
    if USER in sys.modules:
        sys.modules[USER].DPCoordinator = InstalledCoordinator  # type: ignore[attr-defined]


def installed_dialect(parallel_config: Any) -> VllmDialect:
    """The installed version's ways. Its own classes and source are asked: they tell more than its number does."""
    ranks = _source("vllm.v1.engine.core")
    interval = getattr(parallel_config, "dp_sync_interval", OLD_SYNC_INTERVAL)
    asked = dialect_of(ranks, _count_fields(), interval) if ranks else VllmDialect()
    return changed(asked, os.environ.get("PACELINE_VLLM_DIALECT", ""))


def dialect_of(ranks: str, count_fields: int, sync_interval: int) -> VllmDialect:
    """The dialect of the version whose ranks have this source (`vllm/v1/engine/core.py`)."""
    syncs_at_once = "step_counter != 1" in ranks
    waits = 'recv() == b"READY"' in ranks
    return VllmDialect(
        count_fields=count_fields,
        greeting="none" if not waits else "each" if 'buffer == b"READY"' in ranks else "once",
        proof_step=1 if syncs_at_once else sync_interval,
        wake_is_safe="ignore_start_dp_wave" in ranks,
        says_started=syncs_at_once and ranks.count("EngineCoreOutputs(start_wave=") >= 2,
    )


def changed(dialect: VllmDialect, text: str) -> VllmDialect:
    """With what `PACELINE_VLLM_DIALECT` sets, `name=value,name=value`. Raises ConfigError."""
    values: dict[str, Any] = msgspec.to_builtins(dialect)
    for setting in filter(None, text.split(",")):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in values:
            raise ConfigError(f"PACELINE_VLLM_DIALECT: {name!r} is none of {', '.join(values)}")
        values[name] = value
    try:
        return msgspec.convert(values, VllmDialect, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"PACELINE_VLLM_DIALECT: {error}") from None


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path.read_text(encoding="utf-8") if path is not None and path.suffix == ".py" and path.exists() else ""


def _count_fields() -> int:
    state = importlib.import_module(COORDINATOR).EngineState()
    return len(state.request_counts)


def run_command(arguments: Sequence[str]) -> None:
    """Become the `vllm` command: the one beside this interpreter, or on the path."""
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.exists() else shutil.which("vllm")
    if command is None:
        print("paceline: error: vllm: no such command here; install vLLM beside Paceline", file=sys.stderr)
        sys.exit(1)
    os.environ["PACELINE_VLLM"] = "1"
    os.execv(command, [command, *arguments])
