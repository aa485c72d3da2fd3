"""A vLLM model whose experts two ranks share, in Paceline's waves; a death of one is the end of the group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.serving import Deployment, deployment, wait_until
from tests.vllm.mixed import ASKED, Said, run
from tests.vllm.test_engine import FLAGS, PYTHON, VARIABLES, model

pytestmark = pytest.mark.slow

BACK_S = 300.0


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment(model("moe"), "--engine", "vllm", "-dp", "2", "--max-rank-restarts", "50", *FLAGS,
                    python=PYTHON, variables=VARIABLES) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: Deployment) -> list[Said]:
    first = run(server.url)
    assert [said.error for said in first] == [None] * len(ASKED)
    assert run(server.url) == first
    return first


def test_its_ranks_run_in_waves(server: Deployment, undisturbed: list[Said]) -> None:
    wait_until(lambda: not server.health()["running"], "the ranks are idle")
    wave = server.health()["wave"]
    assert wave > 0
    # One rank has work, and the other takes part with dummy steps.
    assert run(server.url, ASKED[:1]) == undisturbed[:1]
    wait_until(lambda: server.health()["wave"] > wave and not server.health()["running"], "the next wave has ended")


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_paused_and_resumed_in_mid_stream(server: Deployment, undisturbed: list[Said], mode: str) -> None:
    def pause() -> None:
        # Doubled, and resumed at once while a wave runs: neither may leave a rank behind in a collective.
        for _ in range(2):
            assert server.http.post(f"/pause?mode={mode}").status_code == 200
        for _ in range(2):
            assert server.http.post("/resume").status_code == 200

    for _ in range(3):
        assert run(server.url, midway=pause) == undisturbed


def test_scaled_up_and_down_streams_go_on(
    server: Deployment, undisturbed: list[Said], request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--vllm-full"):
        pytest.skip("three loads of three ranks: --vllm-full")
    for size in (3, 2):
        wait_until(lambda: server.health()["running"] is False, "the ranks are idle", BACK_S)

        def scale(size: int = size) -> None:
            asked = {"new_data_parallel_size": size, "drain_timeout": 5, "startup_timeout": BACK_S}
            assert server.http.post("/scale_elastic_ep", json=asked, timeout=BACK_S).status_code == 200

        assert run(server.url, midway=scale) == undisturbed
        wait_until(lambda size=size: server.health()["ready"] == list(range(size)), f"{size} ranks are there", BACK_S)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(20 if metafunc.config.getoption("--vllm-full") else 2))


def test_a_killed_member_ends_the_group_and_no_stream(server: Deployment, undisturbed: list[Said], kill: int) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", BACK_S)
    victim = server.pid_of(f"rank {kill % 2}")
    begin = time.monotonic()
    assert run(server.url, midway=lambda: os.kill(victim, signal.SIGKILL)) == undisturbed
    print(f"16 streams took {time.monotonic() - begin:.1f} s with a rank killed")
    assert server.health()["moved"] >= len(ASKED) // 2


def test_killed_while_idle_the_next_request_waits_and_is_served(server: Deployment, undisturbed: list[Said]) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", BACK_S)
    os.kill(server.pid_of("rank 1"), signal.SIGKILL)
    wait_until(lambda: server.health()["ready"] == [], "no rank is left", 60)
    assert run(server.url, ASKED[:2]) == undisturbed[:2]
