"""The plugin: vLLM's launcher gets Paceline's coordinator where the environment says `PACELINE_VLLM=1`.

vLLM loads it by its entry point in the group `vllm.general_plugins`, in every one of its processes and before the
launcher makes a coordinator. Without the variable it does nothing and says nothing. `paceline vllm ...` is the `vllm`
command with that variable set.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from paceline.errors import ConfigError
from paceline.vllm.codec import VllmDialect
from paceline.vllm.coordinator import VllmCoordinator

COORDINATOR = "vllm.v1.engine.coordinator"
USER = "vllm.v1.engine.utils"
"""The module whose `launch_core_engines` looks `DPCoordinator` up by its own name."""
OLD_SYNC_INTERVAL = 32


class InstalledCoordinator(VllmCoordinator):
    """Speaks as the installed vLLM does."""

    def __init__(
        self, parallel_config: Any, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self.dialect = installed_dialect(parallel_config)
        super().__init__(parallel_config, enable_wave_coordination, logging_config)


def register() -> None:
    """vLLM calls this."""
    if os.environ.get("PACELINE_VLLM", "") not in ("1", "true", "yes", "on"):
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
