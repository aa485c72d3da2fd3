"""The watchdog on real processes: a rank that does not go on is named, everywhere where somebody looks."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from paceline.control import Control
from tests.pace import stretched
from tests.serving import deployment, wait_until

pytestmark = pytest.mark.slow

CULPRIT = 2


def test_a_rank_that_holds_the_group_up_is_named() -> None:
    arguments = ["--engine", "moe", "-dp", "4", "--stall-timeout", "0.5"]
    with deployment(*arguments) as running, ThreadPoolExecutor() as pool:
        control = Control(running.url)
        assert control.health()["stalls"] == []
        stopped = running.pid_of(f"rank {CULPRIT}")
        request = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
        answer = pool.submit(running.http.post, "/v1/completions", json=request, timeout=stretched(100))
        wait_until(lambda: control.health()["running"], "a wave")
        os.kill(stopped, signal.SIGSTOP)
        try:
            wait_until(lambda: "waiting: rank 0, 1, 3" in str(control.health()["stalls"]), "the stall in /health")
            health = running.http.get("/health")
            assert health.status_code == 503
            assert health.json()["status"] == f"rank {CULPRIT} holds the group up"
            (line,) = health.json()["stalls"]
            assert line.startswith(f"rank {CULPRIT} holds the group up: all_")
            assert "in step" in line
            assert "for 0." in line or "for 1." in line
            wait_until(lambda: f"rank {CULPRIT} holds the group up" in running.output, "the stall in the log")
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_until(lambda: running.http.get("/health").status_code == 200, "health")
        # Its own step has been long, too.
        wait_until(lambda: control.health()["stalls"] == [], "nobody is named any more")
        assert answer.result().status_code == 200
