"""Fixtures that several test files share: one deployment serves many tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.pace import examples
from tests.serving import Deployment, deployment

# A busy machine is no failure: a test that hangs is ended by its own deadline.
settings.register_profile("paceline", deadline=None, max_examples=examples(100))
settings.load_profile("paceline")

# Where this is set, every process that a test starts compiles all of its modules: two fifths of a deployment's start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell without job control starts what runs in the background with Ctrl-C ignored, `nohup` ignores SIGHUP, and our
# children would, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def timed_server() -> Iterator[Deployment]:
    """Two front-ends over four `timed` ranks with quick steps."""
    with deployment("--engine", "timed", "-dp", "4", "--api-server-count", "2", "--max-model-len", "4096",
                    "--engine-option", "step_ms=2", "--max-body-bytes", "200000") as running:  # fmt: skip
        yield running


@pytest.fixture(scope="session")
def llama_server() -> Iterator[Deployment]:
    """Gemma 3 270M over two ranks."""
    with deployment("--model", "gemma-3-270m", "--max-model-len", "2048") as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-full", action="store_true", help="make test-vllm: every case, not CI's choice")
