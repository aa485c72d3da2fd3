"""More ranks and fewer, in real deployments under streams: no client sees an error, a gap or a repeated token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.pace import stretched
from tests.serving import Command, Deployment, command, deployment, is_alive, process_name, wait_until
from tests.streams import MOE, TIMED, streams

pytestmark = pytest.mark.slow

UNLOADABLE = ("--engine", "tests.late_engines:Unloadable", "--engine-option", "step_ms=10")
SLOW = ("--engine", "tests.late_engines:Slow", "--engine-option", "step_ms=10")


def scale(running: Deployment, size: int, **fields: Any) -> Any:
    """Ask for so many ranks; returns the HTTP answer."""
    return running.http.post("/scale_elastic_ep", json={"new_data_parallel_size": size, **fields})


def asks(count: int, ranks: int, tokens: int) -> list[dict[str, Any]]:
    """Requests whose texts do not depend on where they are served, in turn to each rank."""
    return [
        {"prompt": f"Hello {index}", "max_tokens": tokens, "seed": index, "temperature": index % 2,
         "extra_body": {"ignore_eos": True}, "extra_headers": {"X-data-parallel-rank": str(index % ranks)}}
        for index in range(count)
    ]  # fmt: skip


def ready(running: Deployment) -> list[int]:
    return list(running.health()["ready"])


@pytest.fixture(scope="module", params=[TIMED, MOE], ids=["independent", "lockstep"])
def two(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    """Two ranks; who has scaled it brings it back to two."""
    with deployment(*request.param, "-dp", "2", "-asc", "2") as running:
        yield running
        wait_until(lambda: ready(running) == [0, 1], "two are left")
        assert "Traceback" not in running.output


def test_up_and_down_under_streams(two: Deployment) -> None:
    """The new ranks serve; what the leaving ones have not ended goes on at the others; all texts are the same."""
    with streams(two, asks(6, 2, 200)) as before:
        expected = list(before.wait())
    with streams(two, asks(6, 2, 200)) as old:
        assert scale(two, 4).status_code == 200
        wait_until(lambda: ready(two) == [0, 1, 2, 3], "both front-ends have them")
        with streams(two, asks(8, 4, 200)) as new:
            answer = scale(two, 2, drain_timeout=0.2)
            assert answer.json()["size"] == 2
            assert old.wait() == expected
            assert list(new.wait())[:6] == expected
    assert sorted(name for name in names(two) if name.startswith("rank")) == ["rank 0", "rank 1"]
    assert two.health()["missing"] == []
    with streams(two, asks(6, 2, 200)) as after:
        assert after.wait() == expected


def names(running: Command) -> list[str]:
    return list(pids(running).values())


def pids(running: Command) -> dict[int, str]:
    return {pid: process_name(pid).removeprefix("pl:") for pid in running.children() if is_alive(pid)}


def test_ranks_that_leave_end_what_they_have(two: Deployment) -> None:
    assert scale(two, 3).status_code == 200
    wait_until(lambda: ready(two) == [0, 1, 2], "both front-ends have it")
    moved = two.health()["moved"]
    with streams(two, asks(6, 3, 100)) as read:
        assert scale(two, 1, drain_timeout=60).status_code == 200
        # The others' streams run on, or are over by now.
        assert read.wait()
    assert ready(two) == [0]
    assert two.health()["moved"] == moved
    assert scale(two, 2).json()["size"] == 2


def test_a_second_call_meanwhile_gets_409_and_bad_input_400() -> None:
    with deployment(*SLOW, "-dp", "2", "-asc", "2") as running:
        for body, field in BAD:
            answer = running.http.post("/scale_elastic_ep", content=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), body
        with ThreadPoolExecutor(1) as pool:
            first: Future[Any] = pool.submit(scale, running, 3, startup_timeout=3)
            wait_until(lambda: is_scaling(running)["is_scaling_elastic_ep"], "the first call has begun")
            assert is_scaling(running)["waiting_for"] == [2]
            second = scale(running, 4)
            assert (second.status_code, second.json()["error"]["code"]) == (409, "scaling")
            assert "from 2 to 3 ranks" in second.json()["error"]["message"]
            answer = first.result(stretched(60))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "rolled_back")
        assert "rank 2 had not loaded after 3 s" in answer.json()["error"]["message"]
        wait_until(lambda: "rank 2" not in names(running), "the new rank is gone")
        assert scale(running, 2).json()["size"] == 2


BAD = [
    (b"{", "body"),
    (b"[]", "body"),
    (b"{}", "new_data_parallel_size"),
    (b'{"new_data_parallel_size": 0}', "new_data_parallel_size"),
    (b'{"new_data_parallel_size": "4"}', "new_data_parallel_size"),
    (b'{"new_data_parallel_size": true}', "new_data_parallel_size"),
    (b'{"new_data_parallel_size": 17}', "new_data_parallel_size"),
    (b'{"new_data_parallel_size": 2, "drain_timeout": -1}', "drain_timeout"),
    (b'{"new_data_parallel_size": 2, "drain_timeout": "soon"}', "drain_timeout"),
    (b'{"new_data_parallel_size": 2, "startup_timeout": 1e99}', "startup_timeout"),
    (b'{"new_data_parallel_size": 2, "drain": 1}', "drain"),
]


def is_scaling(running: Deployment) -> dict[str, Any]:
    return dict(running.http.get("/is_scaling_elastic_ep").json())


def test_a_rank_that_cannot_load_takes_the_others_with_it_and_nothing_else() -> None:
    with deployment(*UNLOADABLE, "-dp", "2", "-asc", "2") as running:
        with streams(running, asks(4, 2, 300)) as read:
            answer = scale(running, 4)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "rolled_back")
            assert "there is no memory for this rank" in answer.json()["error"]["message"]
            assert read.wait() == ["".join(f" {index}" for index in range(300))] * 4
        assert running.health()["missing"] == []
        assert running.health()["moved"] == 0
        wait_until(lambda: {"rank 2", "rank 3"}.isdisjoint(names(running)), "the new ranks are gone")


def test_a_coordinator_that_dies_meanwhile_goes_on_with_it(two: Deployment) -> None:
    """Its next life hears from the node and the front-ends what is under way."""
    with ThreadPoolExecutor(1) as pool:
        with streams(two, asks(4, 2, 300)) as read:
            call = pool.submit(scale, two, 4)
            wait_until(lambda: "rank 2" in names(two), "the new ranks load")
            kill_coordinator(two)
            assert call.result(stretched(60)).json()["size"] == 4
            wait_until(lambda: ready(two) == [0, 1, 2, 3], "all are there")
            call = pool.submit(scale, two, 1, drain_timeout=1)
            wait_until(lambda: is_scaling(two)["target"] == 1, "ranks leave")
            kill_coordinator(two)
            assert call.result(stretched(60)).json()["size"] == 1
            assert len(read.wait()) == 4
        wait_until(lambda: ready(two) == [0] and not two.health()["missing"], "one is left")
        kill_coordinator(two)
        assert scale(two, 2).json()["size"] == 2


def kill_coordinator(running: Deployment) -> None:
    victim = running.pid_of("coordinator")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: any(name == "coordinator" and pid != victim for pid, name in pids(running).items()), "another")


def test_the_command_shows_what_is_waited_for_and_says_how_it_ended() -> None:
    with deployment(*TIMED, "-dp", "2") as running:
        with command("scale", "3", "--url", running.url) as up:
            assert up.wait_end() == 0
            assert "3 ranks, from 2, after " in up.output
        with streams(running, asks(3, 3, 300)) as read:
            with command("scale", "2", "--url", running.url) as down:
                down.wait_line("waiting for rank 2 (1 requests) to end")
                assert down.wait_end() == 0
                assert "2 ranks, from 3, after " in down.output
            assert len(read.wait()) == 3
        with command("scale", "0", "--url", running.url) as bad:
            assert bad.wait_end() == 1
            assert "new_data_parallel_size: must be at least 1" in bad.output
