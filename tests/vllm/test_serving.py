"""Real vLLM, two ranks on CPU, on Paceline's coordinator: it answers as with its own, and outlives the coordinator.

Waves are numbered by vLLM's own words: rank 0 logs the end of each.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec import Struct

from tests.vllm.serving import PROMPTS, VERSION, Server, burst, rest, vllm, waves

pytestmark = pytest.mark.slow

CASES = [("moe", 2), ("dense", 1), ("moe", 1), ("dense", 2)]
SHORT = CASES[:2]
KILLS_S = 60.0
KILL_EVERY_S = 2.0
CLIENTS = 4

OLD = VERSION == "0.12.0"
"""Its dense ranks run in waves, too; and its MoE ranks give two texts for one greedy prompt, on vLLM's own coordinator:
of 40 texts of two such runs 11 were equal.
"""


class Case(Struct):
    """A deployment on our coordinator, and what it said next to what it says with vLLM's own."""

    model: str
    server: Server
    stock: list[str]
    ours: list[str]
    waves: list[int]

    @property
    def in_waves(self) -> bool:
        return self.model == "moe" or OLD

    @property
    def repeatable(self) -> bool:
        """Whether vLLM's own two runs give one text."""
        return self.model == "dense" or not OLD


def case_name(case: tuple[str, int]) -> str:
    return f"{case[0]}-{case[1]}-api"


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    model, api_servers = request.param
    folder = tmp_path_factory.mktemp("vllm")
    with vllm(model, folder, paceline=False, api_servers=api_servers) as server:
        stock = forty(server)
    with vllm(model, folder, paceline=True, api_servers=api_servers, VLLM_LOGGING_LEVEL="DEBUG") as server:
        ours = forty(server)
        yield Case(model, server, stock, ours, waves(server))


def forty(server: Server) -> list[str]:
    """40 completions: one after the other, after times of rest, and in bursts."""
    texts = [server.complete(prompt) for prompt in PROMPTS]
    for prompt in PROMPTS:
        # The ranks agree to pause within 16 steps; a rest of a second is enough for these.
        rest(1.0)
        texts.append(server.complete(prompt))
    for length in (4, 16, 32):
        texts += burst(server, PROMPTS, length)
    return texts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--vllm-full")
        metafunc.parametrize("case", CASES if full else SHORT, indirect=True, ids=case_name, scope="module")


def test_the_text_is_the_same(case: Case) -> None:
    assert len(case.ours) == 40
    if not case.repeatable:
        pytest.skip("vLLM's own two runs give different texts")
    assert case.ours == case.stock


def test_it_is_our_coordinator(case: Case) -> None:
    assert "Paceline's coordinator is up, for 2 ranks" in case.server.text()
    assert len(case.server.coordinator_pids()) == 1


def test_both_ranks_are_used(case: Case) -> None:
    counts = case.server.requests_by_rank()
    assert counts.total() == 40
    assert min(counts["0"], counts["1"]) >= 8


def test_waves_without_a_gap(case: Case) -> None:
    if not case.in_waves:
        assert not case.waves, "independent ranks have none"
        return
    assert len(case.waves) >= 6
    assert case.waves == list(range(len(case.waves)))


def test_it_can_die(case: Case) -> None:
    """Killed with -9 every 2 s under load: no request fails, vLLM stays, waves go on."""
    expected = dict(zip(PROMPTS, case.stock[:8], strict=True))
    before = len(waves(case.server))
    end = time.monotonic() + KILLS_S

    def client(seed: int) -> int:
        draw = random.Random(seed)
        for count in itertools.count():
            if time.monotonic() >= end:
                return count
            prompt = draw.choice(PROMPTS)
            text = case.server.complete(prompt)
            assert text == expected[prompt] or not case.repeatable
            rest(draw.choice((0.0, 0.0, 0.3)))
            if seed == 0:
                rest(0.5)
        raise AssertionError

    killed: set[int] = set()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, seed) for seed in range(CLIENTS)]
        due = time.monotonic()
        while due < end:
            rest(max(0.0, due - time.monotonic()))
            for pid in case.server.coordinator_pids():
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            due += KILL_EVERY_S
        served = sum(each.result() for each in clients)
    assert case.server.process.poll() is None
    # On a busy machine a new one may take longer than that.
    assert len(killed) >= 0.5 * KILLS_S / KILL_EVERY_S
    assert served > len(killed)
    if case.in_waves:
        seen = waves(case.server)
        assert len(seen) > before
        assert seen == list(range(len(seen)))
