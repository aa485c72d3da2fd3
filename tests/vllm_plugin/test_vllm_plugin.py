"""The plugin: silent unless asked, and what it makes of an installed version."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.vllm.codec import VllmDialect
from paceline.vllm.plugin import changed, dialect_of, register
from tests.test_tidy import loaded_by

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
WAITS = 'assert coord_socket.recv() == b"READY"\n'
IGNORES = 'if type_frame.buffer == b"READY":\n    continue\n'
SAFE = "self.ignore_start_dp_wave = False\n"
SYNCS = "if self.step_counter != 1 and self.step_counter % self.dp_sync_interval != 0:\n"
STARTS = "EngineCoreOutputs(start_wave=self.current_wave)\n"


def test_vllm_finds_it() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    found = project["entry-points"]["vllm.general_plugins"]
    assert found["paceline"] == f"{register.__module__}:{register.__name__}"


@pytest.mark.parametrize("value", ["", "0", "no"])
def test_not_asked_it_does_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it did anything, it would fail: there is no vLLM here.
    monkeypatch.setenv("PACELINE_VLLM", value)
    register()


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        # 0.10.0; 0.12.0; 0.20.2; 0.22.1; 0.32.0, as far as they differ
        (STARTS, 2, VllmDialect(2, "none", 32, False, False)),
        (WAITS + STARTS, 2, VllmDialect(2, "once", 32, False, False)),
        (WAITS + IGNORES + STARTS * 2, 2, VllmDialect(2, "each", 32, False, False)),
        (WAITS + IGNORES + STARTS + SAFE, 2, VllmDialect(2, "each", 32, True, False)),
        (WAITS + IGNORES + SAFE + SYNCS + STARTS * 2, 3, VllmDialect(3, "each", 1, True, True)),
    ],
)
def test_versions(source: str, fields: int, expected: VllmDialect) -> None:
    assert dialect_of(source, fields, 32) == expected


def test_a_dialect_can_be_set() -> None:
    assert changed(VllmDialect(), "") == VllmDialect()
    assert changed(VllmDialect(), "count_fields=2, greeting=once") == VllmDialect(count_fields=2, greeting="once")
    assert not changed(VllmDialect(), "wake_is_safe=false").wake_is_safe


@pytest.mark.parametrize("wrong", ["colour=blue", "greeting=loud", "count_fields=many", "count_fields"])
def test_a_dialect_that_cannot_be_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match="PACELINE_VLLM_DIALECT"):
        changed(VllmDialect(), wrong)


@pytest.mark.slow
def test_the_watchdog_needs_the_standard_library_alone() -> None:
    # It stays beside every deployment and must not be what breaks.
    top = {module.split(".")[0] for module in loaded_by("paceline.vllm.watchdog")}
    assert "multiprocessing" in top
    assert not top - {"paceline"} - sys.stdlib_module_names


@pytest.mark.slow
def test_without_vllm_the_command_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paceline", "vllm", "serve", "x"],
        env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "paceline: error: vllm: no such command here; install vLLM beside Paceline\n"
