"""The real model, loaded once for all tests of the llama engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.engines.base import EngineSettings
from paceline.engines.gguf import read_header
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer, load_model
from paceline.engines.models import GEMMA, named_model
from tests.engines.llama_runs import Makes


@pytest.fixture(scope="session")
def model_file() -> Path:
    return named_model(GEMMA, lambda what, share: None)


@pytest.fixture(scope="session")
def makes(model_file: Path) -> Iterator[Makes]:
    model = load_model(model_file, lambda what, share: None, repack=False)
    yield Makes(model, read_header(model_file))
    model.close()


@pytest.fixture(scope="session")
def engine(makes: Makes) -> LlamaEngine:
    """An engine of 16 slots. Every test leaves it empty."""
    return makes.engine()


@pytest.fixture(scope="session")
def tokenizer() -> LlamaTokenizer:
    return LlamaEngine.tokenizer(EngineSettings(model=GEMMA))
