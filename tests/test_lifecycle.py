"""Start, failure to start, and end: what a user sees, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.pace import stretched
from tests.serving import Command, Deployment, command, deployment, is_alive, process_name, wait_until

pytestmark = pytest.mark.slow

TIMED = ("--engine", "timed", "--engine-option", "step_ms=10")


def fails(running: Command, text: str, status: int = 1) -> None:
    """The command ends with one clear line, a non-zero status, no traceback and no orphan."""
    children = running.children()
    assert running.wait_end() == status, running.output
    assert "Traceback" not in running.output
    errors = [line for line in running.lines if line.startswith("paceline: error: ")]
    assert len(errors) == 1, running.output
    assert text in errors[0]
    wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")


def test_startup_shows_who_is_ready() -> None:
    with deployment(*TIMED, "-dp", "3") as running:
        for name in ("rank 0", "rank 1", "rank 2", "front-end 0"):
            assert f"{name}: ready\n" in running.output
        assert "Traceback" not in running.output


def test_rank_that_takes_too_long_is_named() -> None:
    with command("serve", *TIMED, "--port", "0", "-dp", "2", "--engine-option", "load_ms=60000",
                 "--startup-timeout", "2") as running:  # fmt: skip
        fails(running, "not ready within --startup-timeout of 2 s: rank 0 (starting")
        assert "rank 1 (starting" in running.output


def test_a_rank_of_another_node_is_waited_for_without_end() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = ("serve", *TIMED, "--port", "0", "-dp", "3", "-dpp", port)
    with command(*own, "-dpl", "2", "--startup-timeout", "3", "--min-ready-ranks", "3") as leading:
        leading.wait_line("front-end 0 still waits for rank 2 of another node", 60.0)
        with command(*own, "-dpl", "1", "--data-parallel-start-rank", "2", "--headless"):
            leading.connect()
            assert leading.health()["ready"] == [0, 1, 2]


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with command("serve", *TIMED, "--port", str(port)) as running:
            fails(running, f"cannot listen on 127.0.0.1:{port}: Address already in use")


def test_port_of_another_paceline_is_in_use() -> None:
    with deployment(*TIMED) as first:
        port = first.url.rsplit(":", 1)[1]
        with command("serve", *TIMED, "--port", port) as second:
            fails(second, "Address already in use")
        assert first.health()["status"] == "ok"


def test_model_that_is_none(tmp_path: Path) -> None:
    with command("serve", "--model", str(tmp_path / "model.gguf"), "--port", "0") as running:
        fails(running, "model.gguf: there is no such model file")


def test_a_process_killed_while_it_loads_is_started_again() -> None:
    names = ("rank 1", "front-end 0", "coordinator")
    with command("serve", *TIMED, "--port", "0", "--engine-option", "load_ms=1000") as running:
        for name in names:
            os.kill(wait_until(lambda name=name: lives(running, name), name)[0], signal.SIGKILL)
        running.wait_line("serves on http")
        for name in names:
            assert f"{name} ended (killed by SIGKILL" in running.output


def test_a_process_killed_with_each_start_ends_all() -> None:
    flags = ("--engine-option", "load_ms=60000", "--max-rank-restarts", "1")
    killed: list[int] = []
    with command("serve", *TIMED, "--port", "0", *flags) as running:
        for _ in range(2):
            killed.extend(wait_until(lambda: [pid for pid in lives(running, "rank 1") if pid not in killed], "rank 1"))
            os.kill(killed[-1], signal.SIGKILL)
        fails(running, "once too often (--max-rank-restarts)")
        assert "rank 1 ended before it was ready (killed by SIGKILL" in running.output


def lives(running: Command, name: str) -> list[int]:
    return [pid for pid in running.children() if process_name(pid) == f"pl:{name}"]


def test_engine_that_cannot_be() -> None:
    with command("serve", "--port", "0", "--engine", "timed", "--engine-option", "speed=1") as running:
        fails(running, "--engine-option speed: unknown")


def test_flag_out_of_range() -> None:
    with command("serve", "-dp", "0") as running:
        fails(running, "--data-parallel-size", status=2)


def test_sigterm_drains() -> None:
    with deployment(*TIMED, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        client = running.openai
        streams = [client.completions.create(model="timed", prompt="a", max_tokens=200, stream=True) for _ in range(8)]
        # More than one token may come in the first piece.
        begun = [next(iter(stream)).choices[0].text for stream in streams]
        children = running.children()
        texts = [pool.submit(lambda stream: "".join(c.choices[0].text for c in stream), stream) for stream in streams]
        running.signal(signal.SIGTERM)

        def refused() -> Any:
            response = running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            return response if response.status_code == 503 else None

        response = wait_until(refused, "new requests are refused")
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "shutting_down"
        assert running.http.get("/health").status_code == 503
        expected = "".join(f" {index}" for index in range(200))
        assert [first + text.result(stretched(60)) for first, text in zip(begun, texts, strict=True)] == [expected] * 8
        assert running.wait_end() == 0
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")


def test_drain_timeout_ends_what_still_runs() -> None:
    with deployment(*TIMED, "--drain-timeout", "0.5") as running:
        stream = running.openai.completions.create(model="timed", prompt="a", max_tokens=30000, stream=True)
        next(iter(stream))
        children = running.children()
        running.signal(signal.SIGTERM)
        running.wait_end(20)
        assert "had not finished after 0.5 s" in running.output
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")
        stream.close()


def test_second_signal_ends_at_once() -> None:
    with deployment(*TIMED, "--drain-timeout", "600") as running:
        stream = running.openai.completions.create(model="timed", prompt="a", max_tokens=30000, stream=True)
        next(iter(stream))
        children = running.children()
        running.signal(signal.SIGINT)
        running.wait_line("draining")
        running.signal(signal.SIGINT)
        assert running.wait_end(10) != 0
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")
        stream.close()


def test_signal_during_start_ends_cleanly() -> None:
    with command("serve", *TIMED, "--port", "0", "--engine-option", "load_ms=60000") as running:
        running.wait_line("rank 1: starting")
        children = running.children()
        running.signal(signal.SIGTERM)
        assert running.wait_end(20) != 0
        assert "Traceback" not in running.output
        wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended")


@pytest.fixture
def running() -> Iterator[Deployment]:
    with deployment(*TIMED, "-asc", "2") as started:
        yield started


def test_children_end_with_their_killed_parent(running: Deployment) -> None:
    children = running.children()
    assert len(children) >= 5
    running.signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in children), "children ended", 2.0)


@pytest.mark.parametrize("host", ["localhost", "::1", "[::1]"])
def test_a_host_may_be_a_name_or_an_address_of_either_kind(host: str) -> None:
    with deployment("--engine", "timed", "-dp", "1", "--host", host) as running:
        assert running.http.get("/health").status_code == 200
