"""Processes that are killed come back, and what is left serves meanwhile."""

from __future__ import annotations

import os
import signal

import pytest

from tests.serving import Deployment, deployment, is_alive, process_name, wait_until

pytestmark = pytest.mark.slow

TIMED = ("--engine", "timed", "--engine-option", "step_ms=10")


def pids(running: Deployment) -> dict[int, str]:
    """The node's children, by process id."""
    return {pid: process_name(pid).removeprefix("pl:") for pid in running.children() if is_alive(pid)}


def kill(running: Deployment, name: str) -> int:
    """Kill a child with -9; returns its process id."""
    victim = running.pid_of(name)
    os.kill(victim, signal.SIGKILL)
    return victim


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


def test_a_killed_front_end_comes_back_and_the_port_answers_meanwhile() -> None:
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


def test_the_only_front_end_comes_back_at_the_same_port() -> None:
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
