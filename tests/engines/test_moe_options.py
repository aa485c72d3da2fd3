"""Options and limits that cannot be are refused with their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.moe import MoeConfig, MoeOptions, read_limits, read_options


def test_defaults() -> None:
    assert read_options(EngineSettings()) == MoeOptions(MoeConfig())


def test_all_options() -> None:
    options = {"layers": "1", "d_model": "32", "heads": "2", "experts": "5", "experts_per_token": "3"}
    options |= {"expert_hidden": "7", "weights_seed": "9", "step_ms": "1.5"}
    assert read_options(EngineSettings(options=options)) == MoeOptions(MoeConfig(1, 32, 2, 5, 3, 7), None, 9, 1.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speed": "1"}, "speed"),
        ({"layers": "0"}, "layers"),
        ({"layers": "two"}, "layers"),
        ({"experts": "100000"}, "experts"),
        ({"experts_per_token": "9"}, "experts_per_token"),
        ({"heads": "5"}, "d_model"),
        ({"d_model": "64", "heads": "64"}, "d_model"),
        ({"weights_seed": "-1"}, "weights_seed"),
        ({"weights_seed": "1", "weights": __file__}, "weights_seed"),
        ({"weights": "there/is/none"}, "weights"),
        ({"weights": __file__}, "weights"),
        ({"step_ms": "-1"}, "step_ms"),
        ({"step_ms": "nan"}, "step_ms"),
        ({"step_ms": "x"}, "step_ms"),
    ],
)
def test_option_that_cannot_be(options: dict[str, str], named: str) -> None:
    with pytest.raises(EngineError, match=f"^--engine-option {named}: ") as raised:
        read_options(EngineSettings(options=options))
    assert "\n" not in str(raised.value)


def test_model_is_not_taken_silently() -> None:
    with pytest.raises(EngineError, match="--model gemma"):
        read_options(EngineSettings(model="gemma.gguf"))


def test_file_of_wrong_size(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * 100)
    needed = MoeConfig().parameters * 4
    with pytest.raises(EngineError, match=re.escape(f"{path} has 100 bytes, a model of these sizes {needed}")):
        read_options(EngineSettings(options={"weights": str(path)}))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "--max-num-batched-tokens 8"),
        ({"max_model_len": 1}, "--max-model-len 1"),
        ({"max_model_len": 1 << 40}, "--max-model-len"),
        ({"kv_cache_tokens": 1}, "--kv-cache-tokens 1"),
        ({"kv_cache_tokens": 50, "max_model_len": 51}, "--kv-cache-tokens 50"),
    ],
)
def test_limit_that_cannot_be(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineError, match=named):
        read_limits(EngineSettings(**settings))
