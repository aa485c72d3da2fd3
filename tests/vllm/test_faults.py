"""Real vLLM, a MoE model over two ranks, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.pace import stretched
from tests.vllm.environment import DEFAULT_VERSION
from tests.vllm.serving import PROMPTS, VERSION, Server, burst, free_port, rest, vllm, waves

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VERSION != DEFAULT_VERSION, reason="its ranks report after a step only, not before the first"),
]

STATUS = free_port()
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def deaf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {
        "PACELINE_TEST_COORDINATOR": "paceline_deaf_coordinator", "VLLM_LOGGING_LEVEL": "DEBUG",
        "PACELINE_VLLM_STATUS": f"127.0.0.1:{STATUS}", "PACELINE_VLLM_STALL_TIMEOUT": "2",
    }  # fmt: skip
    with vllm("moe", tmp_path_factory.mktemp("vllm"), paceline=True, **variables) as server:
        yield server


def health(server: Server) -> dict[str, Any]:
    try:
        return dict(json.loads(server.get("/health", STATUS)))
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.loads(error.read()))


def test_no_notice_is_heard(deaf: Server) -> None:
    """What ranks report wakes the others."""
    for prompt in PROMPTS:
        assert deaf.complete(prompt)
        rest(0.5)
    assert all(burst(deaf, PROMPTS))
    assert "a notice is not heard" in deaf.text()
    assert len(waves(deaf)) >= 6


def test_a_rank_that_does_not_come_is_named(deaf: Server) -> None:
    rest(1.0)
    assert health(deaf)["status"] == "ready"
    (stopped,) = deaf.pids("EngineCore_DP1")
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(deaf.complete, "Hello", X_data_parallel_rank="0")
            end = time.monotonic() + stretched(DEADLINE_S)
            while not (said := health(deaf))["stalls"]:
                assert time.monotonic() < end, said
                rest(0.1)
            assert [stall.split(" was woken")[0] for stall in said["stalls"]] == ["rank 1"]
            shown = subprocess.run(
                [sys.executable, "-m", "paceline", "loads", "--url", f"http://127.0.0.1:{STATUS}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert shown.stdout.splitlines()[1].split()[:3] in (["0", "1", "0"], ["0", "0", "1"])
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert answer.result(stretched(DEADLINE_S))
    while health(deaf)["stalls"]:
        assert time.monotonic() < end + DEADLINE_S
        rest(0.1)
