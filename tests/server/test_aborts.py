"""A client that goes away: its request is aborted at the rank at once and its KV is free again."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow


def loads(running: Deployment) -> list[dict[str, Any]]:
    return list(running.http.get("/loads").json()["ranks"])


def waiting(running: Deployment) -> int:
    """Requests that wait, at a rank or before all of them."""
    said = running.http.get("/loads").json()
    return int(said["queued"]) + sum(load["waiting"] for load in said["ranks"])


def kv_used(running: Deployment) -> int:
    return sum(load["kv_used"] for load in loads(running))


def request_bytes(stream: bool) -> bytes:
    body = b'{"prompt": "abc", "max_tokens": 100000, "stream": %s}' % (b"true" if stream else b"false")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    return head + body


@pytest.fixture(scope="module")
def slow_server() -> Any:
    with deployment("--engine", "timed", "-dp", "2", "--max-model-len", "200000", "--max-num-seqs", "2",
                    "--engine-option", "step_ms=20") as running:  # fmt: skip
        yield running


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_kv(slow_server: Deployment, stream: bool) -> None:
    host, port = slow_server.url.removeprefix("http://").split(":")
    finished = sum(load["finished"] for load in loads(slow_server))
    with socket.create_connection((host, int(port))) as client:
        client.sendall(request_bytes(stream))
        wait_until(lambda: kv_used(slow_server) > 5, "the request holds KV")
    # Its end would be 100,000 steps of 20 ms away.
    wait_until(lambda: kv_used(slow_server) == 0, "the KV is free again", 5.0)
    assert sum(load["finished"] for load in loads(slow_server)) == finished + 1
    assert sum(load["in_flight"] for load in loads(slow_server)) == 0


@pytest.fixture(scope="module", params=["broker", "arrival"])
def full_server(request: Any) -> Any:
    with deployment("--engine", "timed", "-dp", "2", "--max-model-len", "200000", "--max-num-seqs", "2",
                    "--engine-option", "step_ms=20", "--bind", request.param) as running:  # fmt: skip
        yield running


def test_request_that_waits_can_be_aborted(full_server: Deployment) -> None:
    host, port = full_server.url.removeprefix("http://").split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(6)]
    for client in clients:
        client.sendall(request_bytes(True))
    wait_until(lambda: waiting(full_server) == 2, "two of six wait")
    for client in clients:
        client.close()
    wait_until(lambda: kv_used(full_server) == 0, "nothing runs", 5.0)
    wait_until(lambda: waiting(full_server) == 0, "nothing waits", 5.0)


def test_stop_of_one_stream_leaves_the_others(slow_server: Deployment) -> None:
    client = slow_server.openai
    kept = client.completions.create(model="timed", prompt="a", max_tokens=60, stream=True)
    dropped = client.completions.create(model="timed", prompt="a", max_tokens=100000, stream=True)
    next(iter(dropped))
    dropped.close()
    assert "".join(chunk.choices[0].text for chunk in kept) == "".join(f" {index}" for index in range(60))


@pytest.mark.parametrize("bind", ["broker", "arrival"])
def test_more_waiting_than_allowed_is_429(bind: str) -> None:
    with deployment("--engine", "timed", "-dp", "2", "--max-num-seqs", "1", "--max-waiting", "3",
                    "--engine-option", "step_ms=20", "--bind", bind) as running:  # fmt: skip
        host, port = running.url.removeprefix("http://").split(":")
        holders = [socket.create_connection((host, int(port))) for _ in range(5)]
        for holder in holders:
            holder.sendall(request_bytes(True).replace(b"100000", b"5000  "))
        wait_until(lambda: running.health()["waiting"] == 3, "three wait")
        response = running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "overloaded"
        for holder in holders:
            holder.close()

        def served() -> bool:
            answer = running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            return bool(answer.status_code == 200)

        wait_until(served, "room again")
