"""Weights from a seed and from a file, and a file that changes under the running engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.engines.base import EngineError
from paceline.engines.moe import MoeConfig, MoeEngine, MoeOptions
from paceline.engines.moe_model import load_weights, make_weights, write_weights
from tests.engines.moe_runs import make_engine, request, run_alone, text_of

CONFIG = MoeConfig(layers=2, d_model=32, heads=2, expert_hidden=32)
"""The sizes of `make_engine`."""


def ask(engine: MoeEngine) -> str:
    """The answer to a prompt of no meaning."""
    engine.add(request(0, tokens=20))
    return text_of(run_alone(engine), 0)


def test_text_tells_the_seed() -> None:
    texts = [ask(make_engine(options={"weights_seed": str(seed)})) for seed in range(6)]
    assert len(set(texts)) == 6
    assert ask(make_engine()) == texts[0]


def test_same_weights_everywhere() -> None:
    # Exact operations on a fixed generator's bits. What changes these changes every answer.
    flat = make_weights(CONFIG, 3)
    assert flat.dtype == np.float32
    assert len(flat) == CONFIG.parameters
    assert flat[:3].tolist() == [0.5395416021347046, -0.7176767587661743, -0.5552250146865845]


def test_file_rewritten_in_place_changes_all_engines_at_once(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, CONFIG, 1)
    inode = path.stat().st_ino
    engines = [make_engine(options={"weights": str(path)}) for _ in range(2)]
    first = ask(make_engine(options={"weights_seed": "1"}))
    second = ask(make_engine(options={"weights_seed": "2"}))
    assert first != second
    assert [ask(engine) for engine in engines] == [first, first]
    write_weights(path, CONFIG, 2)
    assert [ask(engine) for engine in engines] == [second, second]
    write_weights(path, CONFIG, 1)
    assert [ask(engine) for engine in engines] == [first, first]
    assert path.stat().st_ino == inode


def test_engine_cannot_write_its_weights(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights", CONFIG, 1)
    weights = load_weights(MoeOptions(CONFIG, tmp_path / "weights"))
    with pytest.raises(ValueError, match="read-only"):
        weights["head"][:] = 0


def test_file_that_has_been_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_weights(path, CONFIG, 1)
    options = MoeOptions(CONFIG, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EngineError, match="--engine-option weights: "):
        load_weights(options)
