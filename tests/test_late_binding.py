"""Late binding on real processes: bursts far above the slots, and the ends of those that hold the queue."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
from msgspec import Struct

from tests.pace import stretched
from tests.serving import Deployment, deployment, process_name, wait_until

pytestmark = pytest.mark.slow

RANKS, SLOTS = 4, 4
FLAGS = ["--engine", "timed", "-dp", str(RANKS), "--max-num-seqs", str(SLOTS), "--engine-option", "step_ms=10"]


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


async def burst(url: str, count: int, tokens: int, gap_s: float = 0.001) -> list[Got]:
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
            await asyncio.sleep(max(0.0, begin + (number + 1) * gap_s - time.monotonic()))
    return answers


def whole(tokens: int) -> str:
    return "".join(f" {index}" for index in range(tokens))


def queued(running: Deployment) -> int:
    return int(running.http.get("/loads").json()["queued"])


@contextmanager
def paused(running: Deployment, count: int) -> Iterator[None]:
    """The ranks start nothing within, until so many wait: a queue is there then, however slow its clients are."""
    wait_until(lambda: running.http.post("/pause", json={}).status_code == 200, "a pause")
    yield
    wait_until(lambda: queued(running) >= count, f"{count} in the queue")
    assert running.http.post("/resume", json={}).status_code == 200


@pytest.mark.parametrize("frontends", [2, 4])
def test_a_burst_far_above_the_slots_is_served_in_order_and_level(frontends: int) -> None:
    count, tokens = 8 * RANKS * SLOTS, 20
    with deployment(*FLAGS, "-asc", str(frontends)) as running, ThreadPoolExecutor() as pool:
        with paused(running, count):
            work = pool.submit(lambda: asyncio.run(burst(running.url, count, tokens, 0.002)))
        answers = work.result(stretched(90))
    assert {got.text for got in answers} == {whole(tokens)}
    order = sorted(range(count), key=lambda number: answers[number].first)
    # All that run at once begin within one step of each other; a machine that is busy delays some connections.
    assert max(abs(place - number) for place, number in enumerate(order)) <= 3 * RANKS * SLOTS
    level = Counter(got.rank for got in answers if got.rank)
    # A rank that waits for a core ends less meanwhile, and gets less: where cores are few, as it should be.
    assert max(level.values(), default=0) - min(level.values(), default=0) <= 2 * SLOTS * stretched(1.0, most=3.0)
    why = [got.why for got in answers if got.why]
    assert sum("granted by the central queue" in text for text in why) >= len(why) // 2


def test_nobody_waits_behind_a_full_rank() -> None:
    count = 6 * RANKS * SLOTS
    with deployment(*FLAGS, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        with paused(running, count):
            work = pool.submit(lambda: asyncio.run(burst(running.url, count, 60)))
        waiting = []
        while queued(running) > SLOTS:
            waiting.append(max(load["waiting"] for load in running.http.get("/loads").json()["ranks"]))
        work.result(stretched(60))
    # What has just been granted waits for the step that it begins with, and no longer.
    assert waiting
    assert max(waiting) <= SLOTS
    assert sorted(waiting)[len(waiting) // 2] <= 1


def test_a_better_priority_goes_first() -> None:
    fill = 2 * RANKS * SLOTS

    async def one(url: str, priority: int) -> Got:
        async with httpx2.AsyncClient(base_url=url, timeout=stretched(60.0)) as client:
            await stream(client, got := Got(time.monotonic()), 5, priority)
        return got

    with deployment(*FLAGS) as running, ThreadPoolExecutor() as pool:
        with paused(running, fill + 2):
            pool.submit(lambda: asyncio.run(burst(running.url, fill, 60)))
            wait_until(lambda: queued(running) == fill, "a queue")
            late = pool.submit(lambda: asyncio.run(one(running.url, 9)))
            wait_until(lambda: queued(running) == fill + 1, "the late one")
            soon = pool.submit(lambda: asyncio.run(one(running.url, -9)))
        assert soon.result(stretched(60)).first < late.result(stretched(60)).first


def test_a_coordinator_killed_with_a_full_queue_loses_and_repeats_nothing() -> None:
    count, tokens = 5 * RANKS * SLOTS, 40
    with deployment(*FLAGS, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        work = []
        for _ in range(2):
            with paused(running, count):
                work.append(pool.submit(lambda: asyncio.run(burst(running.url, count, tokens))))
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

    async def cut(running: Deployment) -> list[Got]:
        limits = httpx2.Limits(max_connections=count)
        async with httpx2.AsyncClient(base_url=running.url, timeout=stretched(60.0), limits=limits) as client:
            answers = [Got(0.0) for _ in range(count)]
            with ExitStack() as stack:
                await asyncio.to_thread(stack.enter_context, paused(running, count))
                streams = [asyncio.create_task(stream(client, got, tokens)) for got in answers]
                await asyncio.to_thread(stack.close)
            while not any(got.first for got in answers):
                await asyncio.wait(streams, timeout=0.005)
            os.kill(running.pid_of("front-end 0"), signal.SIGKILL)
            done = await asyncio.gather(*streams, return_exceptions=True)
        broken = [got for got, end in zip(answers, done, strict=True) if end is not None]
        assert 0 < len(broken) < count
        return [got for got in answers if got not in broken]

    with deployment(*FLAGS, "-asc", "2") as running:
        served = asyncio.run(cut(running))
        assert {got.text for got in served} == {whole(tokens)}
        wait_until(lambda: queued(running) == 0, "an empty queue")
