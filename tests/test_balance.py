"""Bursts are level over the ranks, however many front-ends they come through."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx2
import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow

BURST = 64
RANKS = 4


async def burst(url: str) -> Counter[str]:
    """64 equal requests in one go, each on a connection of its own; how many each rank served."""
    async with httpx2.AsyncClient(
        base_url=url, timeout=stretched(60.0), limits=httpx2.Limits(max_connections=BURST)
    ) as client:
        # Two seconds each or more: the last of the burst must be routed before the first is finished.
        request = {"prompt": "a prompt of some length", "max_tokens": 200}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=request) for _ in range(BURST)))
    assert all(answer.status_code == 200 for answer in answers)
    return Counter(answer.headers["x-data-parallel-rank"] for answer in answers)


def idle(running: Deployment) -> bool:
    """Whether the view says that no rank has anything to do."""
    loads = running.http.get("/loads").json()["ranks"]
    return all(not load["waiting"] and not load["running"] for load in loads)


@pytest.mark.parametrize("frontends", [1, 4])
def test_burst_is_level(frontends: int) -> None:
    """16 at every rank, give or take 1, each time. Every split: tests/core/routing/test_policies.py."""
    arguments = [
        "--engine",
        "timed",
        "-dp",
        str(RANKS),
        "-asc",
        str(frontends),
        "--engine-option",
        f"step_ms={stretched(10, most=4.0)}",
    ]
    with deployment(*arguments) as running:
        for _ in range(2):
            wait_until(lambda: idle(running), "idle ranks")
            served = asyncio.run(burst(running.url))
            assert len(served) == RANKS
            assert all(15 <= count <= 17 for count in served.values()), served


def test_single_requests_visit_all_ranks(timed_server: Deployment) -> None:
    ranks = set()
    for _ in range(40):
        answer = timed_server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        ranks.add(answer.headers["x-data-parallel-rank"])
    assert ranks == {"0", "1", "2", "3"}
