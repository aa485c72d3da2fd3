"""Processes that are killed come back, and what is left serves meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serving import Deployment, deployment, is_alive, process_name, wait_until

pytestmark = pytest.mark.slow

TIMED = ("--engine", "timed", "--engine-option", "step_ms=10")
LOCKSTEP = ("--engine", "timed-lockstep", "--engine-option", "step_ms=10")

PROMISED_S = 1.0
BUSY_MACHINE = 5
"""So many times the promised time a test waits: it prints what it measured, and a machine may be shared."""


def pids(running: Deployment) -> dict[int, str]:
    return {pid: process_name(pid).removeprefix("pl:") for pid in running.children() if is_alive(pid)}


def kill(running: Deployment, name: str) -> int:
    """Kill a child with -9; returns its process id."""
    victim = running.pid_of(name)
    os.kill(victim, signal.SIGKILL)
    return victim


def measured(what: str, condition: Callable[[], Any]) -> None:
    """Until `condition`, within the promised time of an idle machine; prints how long it took."""
    begin = time.monotonic()
    wait_until(condition, what, PROMISED_S * BUSY_MACHINE)
    print(f"{what} after {time.monotonic() - begin:.2f} s; promised are {PROMISED_S:g} s")


def wait_back(running: Deployment, name: str, victim: int) -> None:
    """Until another process of this name is there, and serves."""
    wait_until(lambda: name in [n for pid, n in pids(running).items() if pid != victim], f"another {name}")
    running.wait_line(f"{name} is back")


def test_a_killed_rank_comes_back_and_serves() -> None:
    with deployment(*TIMED) as running:
        for _ in range(2):
            wait_back(running, "rank 1", kill(running, "rank 1"))
            running.lines.clear()
        wait_until(lambda: running.health()["missing"] == [], "all ranks ready")
        answer = running.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 3}, headers={"X-data-parallel-rank": "1"}
        )
        assert answer.json()["choices"][0]["text"] == " 0 1 2"


def test_a_killed_frontend_comes_back_and_the_port_answers_meanwhile() -> None:
    with deployment(*TIMED, "-asc", "2") as running:
        victim = kill(running, "front-end 0")
        wait_until(lambda: not is_alive(victim), "it is dead")
        for _ in range(8):
            # Its own connections have ended with it.
            running.http.close()
            running.connect()
            answer = running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200
        wait_back(running, "front-end 0", victim)


def test_the_only_frontend_comes_back_at_the_same_port() -> None:
    with deployment(*TIMED) as running:
        running.lines.clear()
        wait_back(running, "front-end 0", kill(running, "front-end 0"))
        running.http.close()
        answer = running.openai.completions.create(model="timed", prompt="a", max_tokens=2)
        assert answer.choices[0].text == " 0 1"


def test_a_rank_that_dies_too_often_is_given_up_and_the_others_serve() -> None:
    with deployment(*TIMED, "--max-rank-restarts", "0") as running:
        kill(running, "rank 1")
        running.wait_line("rank 1 ended (killed by SIGKILL) once too often (--max-rank-restarts)")
        answer = running.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers={"X-data-parallel-rank": "0"}
        )
        assert answer.status_code == 200
        children = running.children()
        kill(running, "rank 0")
        assert running.wait_end(20) == 1
        assert "no rank of this node is left; ending it" in running.output
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")


@pytest.mark.parametrize("engine", [TIMED, LOCKSTEP], ids=["independent", "lockstep"])
def test_a_killed_coordinator_is_back_within_a_second_and_knows_what_the_ranks_know(engine: tuple[str, ...]) -> None:
    with deployment(*engine, "-dp", "4") as running:
        for _ in range(3):
            before = running.health()["coordinator"]
            kill(running, "coordinator")

            def back(before: int = before) -> bool:
                health = running.health()
                return bool(health["coordinator"] != before and health["missing"] == [])

            measured("another coordinator knows all ranks", back)
        assert "Traceback" not in running.output


def test_a_wake_that_was_due_is_late_by_the_restart_at_most() -> None:
    with deployment(*LOCKSTEP, "-dp", "4") as running, ThreadPoolExecutor(1) as pool:
        paused = lambda: not running.health()["running"]  # noqa: E731
        for _ in range(3):
            wait_until(paused, "the ranks have paused")
            kill(running, "coordinator")
            asked = pool.submit(running.http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 1})
            measured("a rank that was paused has answered", asked.done)
            assert asked.result().json()["choices"][0]["text"] == " 0"


def test_what_a_killed_frontend_had_is_aborted_within_a_second_and_its_kv_is_free() -> None:
    """Seen through the other front-end, whose requests go on."""
    # At this pace an answer stays a small part of what its prompt takes, however slow the machine.
    pace = ("--engine-option", "step_ms=100", "--engine-option", "prefill_ms=0.01")
    count, prompt, tokens = 24, 3000, 8000
    ask = {"model": "timed", "prompt": "a" * prompt, "max_tokens": tokens}
    with deployment("--engine", "timed", *pace, "-dp", "2", "-asc", "2") as running, ThreadPoolExecutor(count) as pool:

        def total(figure: str) -> int:
            return sum(rank[figure] for rank in running.http.get("/loads").json()["ranks"])

        asked = [pool.submit(running.openai.completions.create, **ask) for _ in range(count)]
        wait_until(lambda: total("kv_used") > count * prompt, "all have their prompts in KV")
        kill(running, "front-end 0")
        running.http.close()
        running.connect()

        def free() -> bool:
            left = total("in_flight")
            fits = total("kv_used") <= left * prompt * 1.1
            return fits and total("running") == left and total("waiting") == 0

        measured("what the dead front-end had is aborted, and its KV free,", free)
        broken = [one for one in asked if one.done()]
        assert 0 < len(broken) < count
        assert all(isinstance(one.exception(), openai.APIConnectionError) for one in broken)
        assert total("kv_used") >= (count - len(broken)) * prompt
        # The others need not be waited for.
        kill(running, "front-end 1")
