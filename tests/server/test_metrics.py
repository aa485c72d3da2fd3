"""What Prometheus is told: of all front-ends together, also where one of them is killed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from paceline.core.frontend.events import RefusalReason
from tests.serving import Deployment, deployment, process_name, wait_until

pytestmark = pytest.mark.slow

FLAGS = ("--engine", "timed", "-dp", "2", "-asc", "2", "--engine-option", "step_ms=2")
HEARTBEAT_S = 4.0
REQUESTS, TOKENS, PROMPT = 24, 5, "hello"


def figures(running: Deployment) -> dict[str, float]:
    """Every figure, added up over its labels."""
    found: dict[str, float] = {}
    answer = running.http.get("/metrics")
    assert answer.status_code == 200
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def by_label(running: Deployment, name: str, label: str) -> dict[str, float]:
    """One figure's values by one of its labels, added up over the others."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(running.http.get("/metrics").text):
        for sample in (sample for sample in family.samples if sample.name == name):
            found[sample.labels[label]] = found.get(sample.labels[label], 0.0) + sample.value
    return found


def ask(running: Deployment) -> None:
    """Each over a connection of its own, so that both front-ends get some."""
    said: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS}
    headers = {"connection": "close"}
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(running.http.post, "/v1/completions", json=said, headers=headers) for _ in range(REQUESTS)
        ]
    assert all(answer.result().status_code == 200 for answer in answers)


def settled(running: Deployment, requests: int) -> dict[str, float]:
    """The figures once all front-ends have put theirs down."""
    tokens = "vllm:generation_tokens_total"
    wait_until(lambda: figures(running).get(tokens, 0) >= requests * TOKENS, "all tokens are counted")
    return figures(running)


def test_all_front_ends_are_added_up_and_nothing_is_counted_twice() -> None:
    with deployment(*FLAGS) as running:
        ask(running)
        found = settled(running, REQUESTS)
        assert found["vllm:prompt_tokens_total"] == REQUESTS * len(PROMPT)
        assert found["vllm:generation_tokens_total"] == REQUESTS * TOKENS
        assert found["vllm:request_success_total"] == REQUESTS
        for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert found[f"vllm:{histogram}_seconds_count"] == REQUESTS
        # Where a front-end is behind, tokens of two steps come at once: that is one gap.
        assert 0 < found["vllm:inter_token_latency_seconds_count"] <= REQUESTS * (TOKENS - 1)
        assert (found["paceline_ranks_ready"], found["paceline_ranks_missing"]) == (2, 0)
        front_ends = [pid for pid in running.children() if "front-end" in process_name(pid)]
        os.kill(front_ends[0], signal.SIGKILL)
        wait_until(lambda: _asks(running), "the others serve")
        after = settled(running, REQUESTS)["vllm:request_success_total"]
        ask(running)
        grown = settled(running, 2 * REQUESTS)
        assert grown["vllm:request_success_total"] >= after + REQUESTS, "counters grow on"
        age, stopped = "paceline_view_age_seconds", running.pid_of("coordinator")
        wait_until(lambda: figures(running)[age] < HEARTBEAT_S, "the coordinator is heard")
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: figures(running)[age] > 1.5 * HEARTBEAT_S, "it is not")
        os.kill(stopped, signal.SIGCONT)
        wait_until(lambda: figures(running)[age] < HEARTBEAT_S, "it is again")


def complete(running: Deployment, tenant: str, tokens: int = TOKENS) -> int:
    headers = {"connection": "close", "x-tenant": tenant}
    body = {"prompt": PROMPT, "max_tokens": tokens}
    return int(running.http.post("/v1/completions", json=body, headers=headers).status_code)


def test_who_waits_how_long_it_was_paused_and_why_what_had_to_move_or_be_started_again() -> None:
    with deployment(*FLAGS, "--tenant-weight", "quiet=1") as running:
        wait_until(lambda: sum(by_label(running, "paceline_credits", "engine").values()) > 0, "there are credits")
        assert by_label(running, "paceline_weights_info", "version") == {"": 1}
        assert running.http.post("/pause?mode=keep").status_code == 200
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(complete, running, tenant) for tenant in "aaaaabb"]
            tenants = {"quiet": 0, "a": 5, "b": 2}
            wait_until(lambda: by_label(running, "paceline_tenant_queue_length", "tenant") == tenants, "all wait")
            assert figures(running)["paceline_queue_length"] == 7
            assert running.http.post("/resume").status_code == 200
            assert {answer.result() for answer in answers} == {200}
        paused = "paceline_pause_seconds_count"
        wait_until(lambda: figures(running)[paused] == 1, "the pause is counted")
        # Both front-ends have seen it: whichever is asked, it is one.
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: figures(running)[paused], range(8))) == {1}
            answers = [pool.submit(complete, running, "a", 1000) for _ in range(8)]
            wait_until(
                lambda: all(load["running"] for load in running.http.get("/loads").json()["ranks"]),
                "both ranks have some",
            )
            os.kill(running.pid_of("rank 0"), signal.SIGKILL)
            assert {answer.result() for answer in answers} == {200}
        moved = by_label(running, "paceline_requests_moved_total", "cause")
        assert moved["disconnected"] > 0
        assert sum(moved.values()) == moved["disconnected"]
        wait_until(lambda: by_label(running, "paceline_restarts_total", "cause")["SIGKILL"] == 1, "it is counted")
        assert by_label(running, "paceline_restarts_total", "process") == {"rank": 1, "front-end": 0, "coordinator": 0}


def _asks(running: Deployment) -> bool:
    try:
        return bool(running.http.get("/health").status_code == 200)
    except Exception:
        return False


def test_what_can_be_refused_is_counted_from_nought(timed_server: Deployment) -> None:
    """Where a counter begins with its first one, no rate sees that."""
    found = timed_server.http.get("/metrics").text
    for reason in get_args(RefusalReason):
        assert f'paceline_requests_refused_total{{reason="{reason}"}}' in found
    assert "paceline_requests_moved_total{" in found


def test_what_is_refused_and_who_is_missing_is_shown(timed_server: Deployment) -> None:
    before = figures(timed_server)
    assert (
        timed_server.http.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"X-data-parallel-rank": "9"}
        ).status_code
        == 400
    )
    refused = "paceline_requests_refused_total"
    wait_until(lambda: figures(timed_server).get(refused, 0) == before.get(refused, 0) + 1, "the refusal is counted")
    found = figures(timed_server)
    assert (found["paceline_paused"], found["paceline_queue_length"]) == (0, 0)
    assert found["vllm:num_requests_running"] >= 0
