"""Late binding on real processes: bursts far above the slots, and the ends of those that hold the queue."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from msgspec import Struct

from tests.pace import stretched
from tests.serving import Deployment, deployment, process_name, wait_until

pytestmark = pytest.mark.slow

RANKS, SLOTS = 4, 4
# The ranks are as much slower as the clients are: what is told of their order holds on a busy machine, too.
SLOWER = stretched(1.0, most=4.0)
FLAGS = ["--engine", "timed", "-dp", str(RANKS), "--max-num-seqs", str(SLOTS)]
FLAGS += ["--engine-option", f"step_ms={10 * SLOWER}"]


class Got(Struct):
    """What one client got: when it asked and when its first token came, its text, its rank."""

    asked: float
    first: float = 0.0
    text: str = ""
    rank: str = ""
    why: str = ""


async def stream(client: httpx2.AsyncClient, got: Got, tokens: int, priority: int = 0) -> None:
    request = {"prompt": "a prompt", "max_tokens": tokens, "stream": True, "priority": priority}
    headers = {"X-Paceline-Routing": "1"}
    async with client.stream("POST", "/v1/completions", json=request, headers=headers) as answer:
        assert answer.status_code == 200
        # Whoever waits longer than a comment's interval has its headers before it has its rank.
        got.rank = answer.headers.get("x-data-parallel-rank", "")
        got.why = answer.headers.get("x-paceline-routing", "")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            got.first = got.first or time.monotonic()
            got.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]


async def burst(url: str, count: int, tokens: int, gap_s: float) -> list[Got]:
    """So many streams, each begun a moment after the one before, on connections of their own."""
    limits = httpx2.Limits(max_connections=count)
    async with (
        httpx2.AsyncClient(base_url=url, timeout=stretched(60.0), limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        answers: list[Got] = []
        begin = time.monotonic()
        for number in range(count):
            answers.append(Got(time.monotonic()))
            group.create_task(stream(client, answers[-1], tokens))
            # Spread over time by the clock, so that a late start is not made later.
            await asyncio.sleep(max(0.0, begin + (number + 1) * gap_s * SLOWER - time.monotonic()))
    return answers


def whole(tokens: int) -> str:
    return "".join(f" {index}" for index in range(tokens))


def queued(running: Deployment) -> int:
    return int(running.http.get("/loads").json()["queued"])


@pytest.mark.parametrize("frontends", [2, 4])
def test_a_burst_far_above_the_slots_is_served_in_order_and_level(frontends: int) -> None:
    count, tokens = 8 * RANKS * SLOTS, 20
    with deployment(*FLAGS, "-asc", str(frontends)) as running:
        answers = asyncio.run(burst(running.url, count, tokens, 0.002))
    assert {got.text for got in answers} == {whole(tokens)}
    order = sorted(range(count), key=lambda number: answers[number].first)
    # All that run at once begin within one step of each other; a machine that is busy delays some connections.
    assert max(abs(place - number) for place, number in enumerate(order)) <= 3 * RANKS * SLOTS
    level = Counter(got.rank for got in answers if got.rank)
    # A rank that waits for a core ends less meanwhile, and gets less: where cores are few, as it should be.
    assert max(level.values()) - min(level.values()) <= 2 * SLOTS * stretched(1.0, most=3.0)
    assert (
        sum("granted by the central queue" in got.why for got in answers) > sum(bool(got.why) for got in answers) // 2
    )


def test_nobody_waits_behind_a_full_rank() -> None:
    with deployment(*FLAGS, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        work = pool.submit(lambda: asyncio.run(burst(running.url, 6 * RANKS * SLOTS, 60, 0.001)))
        wait_until(lambda: queued(running) > SLOTS * RANKS, "a queue")
        waiting = []
        while queued(running) > SLOTS:
            waiting.append(max(load["waiting"] for load in running.http.get("/loads").json()["ranks"]))
        work.result(stretched(60))
    # What has just been granted waits for the step that it begins with, and no longer.
    assert waiting
    assert max(waiting) <= SLOTS
    assert sorted(waiting)[len(waiting) // 2] <= 1


def test_a_better_priority_goes_first() -> None:
    async def both(url: str) -> tuple[Got, Got]:
        async with httpx2.AsyncClient(base_url=url, timeout=stretched(60.0)) as client, asyncio.TaskGroup() as group:
            # All slots become free at about one time: what waits is more than fits then.
            fill = [Got(0.0) for _ in range(2 * RANKS * SLOTS)]
            streams = [group.create_task(stream(client, got, 60)) for got in fill]
            while sum(bool(got.first) for got in fill) < RANKS * SLOTS:
                await asyncio.wait(streams, timeout=0.005)
            late, soon = Got(0.0), Got(0.0)
            group.create_task(stream(client, late, 5, priority=9))
            group.create_task(stream(client, soon, 5, priority=-9))
        return late, soon

    with deployment(*FLAGS) as running:
        late, soon = asyncio.run(both(running.url))
    assert soon.first < late.first


def test_a_coordinator_killed_with_a_full_queue_loses_and_repeats_nothing() -> None:
    count, tokens = 5 * RANKS * SLOTS, 40
    with deployment(*FLAGS, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        # One a kill: where a coordinator comes back late, the ranks have served what was there before.
        work = []
        for _ in range(2):
            work.append(pool.submit(lambda: asyncio.run(burst(running.url, count, tokens, 0.001))))
            wait_until(lambda: queued(running) > RANKS * SLOTS, "a queue")
            victim = running.pid_of("coordinator")
            os.kill(victim, signal.SIGKILL)

            def another_one(before: int = victim) -> bool:
                names = {pid: process_name(pid) for pid in running.children()}
                return any(name == "pl:coordinator" and pid != before for pid, name in names.items())

            wait_until(another_one, "another coordinator")
        answers = [got for done in work for got in done.result(stretched(90))]
        assert len(answers) == 2 * count
        assert {got.text for got in answers} == {whole(tokens)}

        probes = 0

        def finished() -> int:
            """Requests that the ranks have ended; a front-end's next view follows the next change."""
            nonlocal probes
            probes += 1
            running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            return sum(int(load["finished"]) for load in running.http.get("/loads").json()["ranks"])

        wait_until(lambda: finished() >= 2 * count + probes - 1, "the ranks have ended everything")
        assert finished() <= 2 * count + probes, "something was sent twice"
        assert "Traceback" not in running.output


def test_a_killed_frontend_leaves_nothing_in_the_queue() -> None:
    count, tokens = 6 * RANKS * SLOTS, 50

    async def cut(url: str, victim: int) -> list[Got]:
        limits = httpx2.Limits(max_connections=count)
        async with httpx2.AsyncClient(base_url=url, timeout=stretched(60.0), limits=limits) as client:
            answers = [Got(0.0) for _ in range(count)]
            streams = [asyncio.create_task(stream(client, got, tokens)) for got in answers]
            while sum(bool(got.first) for got in answers) < RANKS * SLOTS:
                await asyncio.wait(streams, timeout=0.005)
            os.kill(victim, signal.SIGKILL)
            done = await asyncio.gather(*streams, return_exceptions=True)
        broken = [got for got, end in zip(answers, done, strict=True) if end is not None]
        assert 0 < len(broken) < count
        return [got for got in answers if got not in broken]

    with deployment(*FLAGS, "-asc", "2") as running:
        served = asyncio.run(cut(running.url, running.pid_of("front-end 0")))
        assert {got.text for got in served} == {whole(tokens)}
        wait_until(lambda: queued(running) == 0, "an empty queue")
