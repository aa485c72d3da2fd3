"""A step that does not return: named, routed around, and ended, on real processes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow


def _arguments(folder: Path, engine: str = "Hanging", *more: str) -> list[str]:
    return ["--engine", f"tests.hanging_engines:{engine}", "--engine-option", f"folder={folder}", "-dp", "3",
            "--stall-timeout", "1", *more]  # fmt: skip


def _ask(running: Deployment, rank: int | None = None, tokens: int = 3) -> Any:
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    return running.http.post("/v1/completions", json=body, headers=headers, timeout=stretched(60))


def _hang(running: Deployment, folder: Path, rank: int, pool: ThreadPoolExecutor) -> Future[Any]:
    """Let a rank hang, with a request; returns that."""
    (folder / f"hang-{rank}").touch()
    answer = pool.submit(_ask, running, rank)
    wait_until((folder / f"hangs-{rank}").exists, "the hang")
    return answer


@pytest.mark.parametrize("bind", ["late", "arrival"])
def test_a_hung_rank_is_named_and_routed_around_and_comes_back(tmp_path: Path, bind: str) -> None:
    arguments = _arguments(tmp_path, "Hanging", "--bind", bind, "-asc", "2")
    with deployment(*arguments) as running, ThreadPoolExecutor(32) as pool:
        first = _hang(running, tmp_path, 1, pool)
        # They wait at whatever rank they have, some at the one that hangs.
        burst = [pool.submit(_ask, running, None) for _ in range(12)]
        assert all(answer.result().status_code == 200 for answer in [first, *burst])
        wait_until(lambda: running.health()["stalls"], "the stall in /health")
        health = running.http.get("/health")
        assert health.json()["status"] == "rank 1 hangs in a step", health.text
        assert health.status_code == 200, "two ranks of three serve"
        (line,) = health.json()["stalls"]
        assert line.startswith("rank 1 hangs: step 0 has not returned for "), line
        assert "rank 1 hangs: step 0 has not returned for " in running.output
        loads = {load["rank"]: load for load in running.http.get("/loads").json()["ranks"]}
        assert loads[1]["hangs_s"] >= 1.0
        assert "hangs_s" not in loads[0]
        placed = {_ask(running).headers["x-data-parallel-rank"] for _ in range(12)}
        assert placed <= {"0", "2"}, "nothing new goes to a rank that hangs"
        (tmp_path / "go").touch()
        wait_until(lambda: running.health()["status"] == "ok", "the end of the hang")
        assert _ask(running, 1).headers["x-data-parallel-rank"] == "1"
        assert "rank 1 goes on" in running.output


def test_what_has_begun_stays_where_it_cannot_go_on_elsewhere(tmp_path: Path) -> None:
    with deployment(*_arguments(tmp_path, "Stubborn")) as running, ThreadPoolExecutor() as pool:
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with running.http.stream("POST", "/v1/completions", json=body, headers={"X-data-parallel-rank": "1"}) as begun:
            lines = begun.iter_lines()
            next(lines)
            waits = _hang(running, tmp_path, 1, pool)
            assert waits.result().status_code == 200, "without a token yet it goes elsewhere"
            (tmp_path / "go").touch()
            text = "".join(lines)
        assert text.endswith("data: [DONE]")
        assert "rank-lost" not in text


def test_a_hung_rank_is_ended_and_started_again(tmp_path: Path) -> None:
    with deployment(*_arguments(tmp_path, "Hanging", "--step-timeout", "2")) as running, ThreadPoolExecutor() as pool:
        before = running.pid_of("rank 1")
        answer = _hang(running, tmp_path, 1, pool)
        running.wait_line("rank 1 ended (its step 0 has not returned for 2", 20)
        running.wait_line("rank 1 is back", 40)
        assert answer.result().status_code == 200
        assert running.pid_of("rank 1") != before
        wait_until(lambda: _ask(running, 1).status_code == 200, "the next life")


def test_an_engine_that_says_that_it_gets_on_does_not_hang(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, "Hanging", "--engine-option", "progress=1", "--step-timeout", "2")
    with deployment(*arguments) as running, ThreadPoolExecutor() as pool:
        before = running.pid_of("rank 1")
        answer = _hang(running, tmp_path, 1, pool)
        # One that is ended meanwhile shows that the time has passed.
        (tmp_path / "quiet-2").touch()
        other = _hang(running, tmp_path, 2, pool)
        running.wait_line("rank 2 ended (its step")
        assert "rank 1 hangs" not in running.output
        (tmp_path / "go").touch()
        assert answer.result().status_code == other.result().status_code == 200
        assert running.pid_of("rank 1") == before
