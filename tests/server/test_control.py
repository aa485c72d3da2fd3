"""Suspending and resuming real deployments over HTTP and from the command line."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from paceline.control import Control, ControlError
from tests.pace import stretched
from tests.serving import Deployment, command, deployment, wait_until

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
STEP_MS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment("--engine", "timed", "-dp", "2", "--api-server-count", "2", "--max-model-len", "100000",
                    "--engine-option", f"step_ms={STEP_MS}") as running:  # fmt: skip
        wait_until(lambda: running.health()["ready"] == [0, 1], "both ranks are ready")
        yield running


@pytest.fixture(autouse=True)
def resumed(server: Deployment) -> Iterator[None]:
    """Whatever a test leaves behind, the next one begins with a deployment that runs."""
    yield
    Control(server.url).resume(30)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@contextlib.contextmanager
def stopped(server: Deployment, rank: int) -> Iterator[None]:
    """The rank's process does nothing in this block."""
    pid = server.pid_of(f"rank {rank}")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def post(server: Deployment, path: str, **query: object) -> Any:
    return server.http.post(path, params=query)


def done(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


def complete(server: Deployment, max_tokens: int = 3, rank: int | None = None) -> Any:
    headers = {} if rank is None else {"x-data-parallel-rank": str(rank)}
    return server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": max_tokens}, headers=headers)


def loads(server: Deployment) -> list[dict[str, Any]]:
    return list(server.http.get("/loads").json()["ranks"])


def running(server: Deployment) -> int:
    return sum(load["running"] for load in loads(server))


def state(server: Deployment) -> dict[str, Any]:
    return done(server.http.get("/is_paused"))


def in_flight(server: Deployment, background: ThreadPoolExecutor, max_tokens: int) -> list[Future[Any]]:
    """A long request at each rank, both of which run."""
    # What has just ended is in the loads until the next view.
    wait_until(lambda: running(server) == 0, "nothing runs from before")
    answers = [background.submit(complete, server, max_tokens, rank) for rank in (0, 1)]
    wait_until(lambda: running(server) == 2, "both requests run")
    return answers


def words(response: Any) -> int:
    return len(done(response)["choices"][0]["text"].split())


# The three modes ------------------------------------------------------------------------------


def test_what_is_asked_may_be_in_the_body(server: Deployment) -> None:
    def ask(path: str, body: bytes) -> Any:
        return server.http.post(path, content=body, headers={"Content-Type": "application/json"})

    assert done(ask("/pause", b'{"mode": "wait", "timeout": 30}'))["mode"] == "wait"
    assert done(ask("/resume", b" "))["mode"] is None
    # Where both name it, the query holds.
    assert done(ask("/pause?mode=keep", b'{"mode": "abort"}'))["mode"] == "keep"
    assert done(ask("/resume", b"{}"))["mode"] is None


@pytest.mark.parametrize("path", ["/pause", "/resume", "/revive", "/sleep"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"timeout": "\\ud800"}', "half of a surrogate pair"),
        (b'{"mod": "keep"}', "mod: is no field of this request"),
        (b"[1]", "body: Expected `object`, got `array`"),
        (b"keep", "the body is not valid JSON"),
    ],
)
def test_a_body_that_is_wrong_changes_nothing(server: Deployment, path: str, body: bytes, said: str) -> None:
    answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert said in error_of(answer, 400)["message"]
    assert not state(server)["is_paused"]


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_an_idle_deployment_is_paused_and_resumed(server: Deployment, mode: str) -> None:
    paused = done(post(server, "/pause", mode=mode))
    assert (paused["status"], paused["mode"], paused["waiting_for"]) == ("paused", mode, [])
    assert paused["suspension"] % 2 == 1
    # Any front-end is asked: the other hears of it a moment later.
    wait_until(lambda: state(server)["is_paused"], "it is known")
    resumed = done(post(server, "/resume"))
    assert (resumed["status"], resumed["mode"], resumed["suspension"]) == ("resumed", None, paused["suspension"] + 1)
    assert words(complete(server)) == 3


def test_a_pause_keeps_where_no_mode_is_named(server: Deployment) -> None:
    assert done(post(server, "/pause"))["mode"] == "keep"


def test_keep_lets_no_rank_compute_and_loses_no_token(server: Deployment, background: ThreadPoolExecutor) -> None:
    answers = in_flight(server, background, 400)
    done(post(server, "/pause", mode="keep"))
    # Each would make a hundred tokens in this time; what was on its way to the front-end arrives at first.
    wait_until(lambda: _stands_still(server, 0.5), "no rank makes a token", 5.0)
    assert not any(answer.done() for answer in answers)
    done(post(server, "/resume"))
    assert [words(answer.result(stretched(30))) for answer in answers] == [400, 400]


def kv_used(server: Deployment) -> list[int]:
    return [load["kv_used"] for load in loads(server)]


def _stands_still(server: Deployment, seconds: float) -> bool:
    before = kv_used(server)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: kv_used(server) != before, "a token is made", seconds)
        return False
    return sum(before) > 0


def test_wait_returns_once_all_that_ran_is_finished(server: Deployment, background: ThreadPoolExecutor) -> None:
    answers = in_flight(server, background, 150)
    assert done(post(server, "/pause", mode="wait"))["status"] == "paused"
    assert [words(answer.result(stretched(5))) for answer in answers] == [150, 150]
    wait_until(lambda: running(server) == 0, "nothing runs")


def test_abort_ends_what_runs(server: Deployment, background: ThreadPoolExecutor) -> None:
    answers = in_flight(server, background, 90_000)
    done(post(server, "/pause", mode="abort"))
    for answer in answers:
        choice = done(answer.result(stretched(5)))["choices"][0]
        assert choice["finish_reason"] == "abort"
    wait_until(lambda: sum(kv_used(server)) == 0, "their KV is free")


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_request_that_comes_meanwhile_waits(server: Deployment, background: ThreadPoolExecutor, mode: str) -> None:
    done(post(server, "/pause", mode=mode))
    answers = [background.submit(complete, server, 3, rank) for rank in (0, 1, None)]
    # Those that name a rank wait there, the other one before all ranks.
    wait_until(lambda: sum(load["waiting"] for load in loads(server)) == 2, "two wait at their ranks")
    wait_until(lambda: server.http.get("/loads").json()["queued"] == 1, "one waits before all ranks")
    assert not any(answer.done() for answer in answers)
    assert running(server) == 0
    done(post(server, "/resume"))
    assert [words(answer.result(stretched(10))) for answer in answers] == [3, 3, 3]


def test_a_request_that_comes_while_all_are_aborted_is_refused(server: Deployment) -> None:
    done(post(server, "/pause", mode="abort"))
    # A front-end that has not heard yet sends it, and the rank ends it.
    response = wait_until(lambda: _refused(complete(server)), "it is refused")
    assert error_of(response, 503)["code"] == "suspended"
    assert int(response.headers["retry-after"]) >= 1
    done(post(server, "/resume"))
    wait_until(lambda: complete(server).status_code == 200, "both front-ends know")


def _refused(response: Any) -> Any:
    return response if response.status_code != 200 else None


# Asking wrongly, twice, and crosswise ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["", "KEEP", "drain", "keep "])
def test_a_mode_that_is_none(server: Deployment, mode: str) -> None:
    error = error_of(post(server, "/pause", mode=mode), 400)
    assert error["param"] == "mode"
    assert "keep, wait or abort" in error["message"]
    assert not state(server)["is_paused"]


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", "", "1e9"])
@pytest.mark.parametrize("path", ["/pause", "/resume"])
def test_a_timeout_that_is_none(server: Deployment, path: str, timeout: str) -> None:
    assert error_of(post(server, path, timeout=timeout), 400)["param"] == "timeout"
    assert not state(server)["is_paused"]


@pytest.mark.parametrize("path", ["/pause", "/resume"])
def test_only_a_post_changes_anything(server: Deployment, path: str) -> None:
    assert server.http.get(path).status_code == 405


def test_twice_is_once(server: Deployment, background: ThreadPoolExecutor) -> None:
    asked: list[tuple[str, dict[str, str]]] = [("/pause", {"mode": "keep"}), ("/resume", {})]
    for path, query in asked:
        calls = [background.submit(post, server, path, **query) for _ in range(6)]
        numbers = {done(call.result(stretched(30)))["suspension"] for call in calls}
        assert len(numbers) == 1
        assert done(post(server, path, **query))["suspension"] in numbers


def test_a_rank_that_does_not_answer_is_named_and_goes_on_being_waited_for(server: Deployment) -> None:
    with stopped(server, 1):
        error = error_of(post(server, "/pause", mode="keep", timeout=0.5), 504)
        assert error["code"] == "timeout"
        assert "waiting for rank 1." in error["message"]
        now = state(server)
        assert (now["is_paused"], now["status"], now["waiting_for"]) == (False, "pausing", [1])
    wait_until(lambda: state(server)["is_paused"], "the rank has come back")
    assert done(post(server, "/pause", mode="keep"))["suspension"] == now["suspension"]


def test_a_resume_waits_for_all_too(server: Deployment) -> None:
    done(post(server, "/pause", mode="keep"))
    with stopped(server, 0):
        error = error_of(post(server, "/resume", timeout=0.5), 504)
        assert "resume is not done after 0.5 s; waiting for rank 0." in error["message"]
    assert done(post(server, "/resume"))["status"] == "resumed"


def test_a_pause_that_is_taken_back_is_a_conflict(server: Deployment, background: ThreadPoolExecutor) -> None:
    with stopped(server, 1):
        pausing = background.submit(post, server, "/pause", mode="keep", timeout=30)
        wait_until(lambda: state(server)["status"] == "pausing", "the pause is under way")
        error_of(post(server, "/resume", timeout=0.2), 504)
        error = error_of(pausing.result(stretched(10)), 409)
    assert error["code"] == "superseded"
    assert "resume" in error["message"]
    assert done(post(server, "/resume"))["status"] == "resumed"


def test_many_times_in_a_row_under_load(server: Deployment, background: ThreadPoolExecutor) -> None:
    answers = [background.submit(complete, server, 300, index % 2) for index in range(4)]
    control = Control(server.url)
    for round_ in range(40):
        with control.paused("keep", 10):
            assert round_ >= 0
    assert [words(answer.result(stretched(30))) for answer in answers] == [300] * 4


# From Python and the command line -------------------------------------------------------------


def test_the_commands(server: Deployment) -> None:
    with command("pause", "--url", server.url) as pausing:
        assert pausing.wait_end() == 0
        assert pausing.output.startswith("paused after ")
    wait_until(lambda: Control(server.url).is_paused(), "it is paused")
    with command("resume", "--url", server.url) as resuming:
        assert resuming.wait_end() == 0
        assert resuming.output.startswith("resumed after ")


def test_a_command_that_fails_says_why_in_one_line(server: Deployment) -> None:
    with stopped(server, 0), command("pause", "--url", server.url, "--timeout", "0.5") as pausing:
        assert pausing.wait_end() == 1
        assert pausing.output.startswith("paceline: error: pause is not done after 0.5 s; waiting for rank 0.")
        assert len(pausing.output.splitlines()) == 1


def test_control_says_what_was_wrong(server: Deployment) -> None:
    with pytest.raises(ControlError, match="mode: must be keep, wait or abort") as caught:
        Control(server.url).pause("drain")
    assert caught.value.status == 400


# Kills ----------------------------------------------------------------------------------------


def test_a_coordinator_that_is_killed_in_a_pause_forgets_nothing(server: Deployment) -> None:
    number = done(post(server, "/pause", mode="keep"))["suspension"]
    os.kill(server.pid_of("coordinator"), signal.SIGKILL)
    assert done(post(server, "/pause", mode="keep", timeout=30))["suspension"] == number
    assert done(post(server, "/resume", timeout=30))["suspension"] == number + 1
    wait_until(lambda: complete(server).status_code == 200, "it serves")


def test_an_engine_that_cannot_says_so_for_each_rank(server: Deployment) -> None:
    for path in ("/reset_prefix_cache", "/wake_up"):
        answer = server.http.post(path)
        assert answer.status_code == 500
        assert "rank 0: this engine has no" in answer.json()["error"]["message"]
        assert "rank 1: " in answer.json()["error"]["message"]
    assert (
        server.http.post("/collective_rpc", json={"method": "x", "ranks": [9]})
        .json()["error"]["message"]
        .endswith("rank 9: is not there")
    )
    assert server.http.post("/sleep?level=5").status_code == 400
    assert server.http.post("/sleep?mode=x").status_code == 400
    assert server.http.post("/sleep?level=0").json() == {"results": []}
    assert server.http.get("/is_paused").json()["is_paused"]
