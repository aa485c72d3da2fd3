"""Why a request was slow, asked at any front-end while its rank is killed; and what the log says of it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from paceline.control import Control, ControlError
from paceline.explain import text
from paceline.server.guard import Guard
from paceline.server.timelines import in_header, name_of
from paceline.settings import ServerConfig
from tests.serving import Deployment, deployment, process_name, wait_until

FLAGS = ("--engine", "timed", "-dp", "2", "-asc", "2", "--engine-option", "step_ms=20")
LOG = ("--access-log", "--log-slow", "0.5", "--log-level", "debug", "--log-format", "json")
NAME = "a/b c"


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment(*FLAGS, *LOG) as running:
        yield running


def asked(running: Deployment, name: str) -> list[dict[str, Any]]:
    """What each of the front-ends says: a connection of its own goes to any."""
    found = []
    for _ in range(12):
        said: Any = Control(running.url).requests(name)
        assert len(said) == 1
        found.append(said[0])
    return found


def lines(running: Deployment) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.output.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_request_is_told_of_by_every_front_end_and_its_move_when_its_rank_is_killed(server: Deployment) -> None:
    def complete() -> Any:
        body = {"prompt": "hello", "max_tokens": 100}
        return server.http.post("/v1/completions", json=body, headers={"x-request-id": NAME})

    def tokens() -> int:
        return int(Control(server.url).requests(NAME)[0]["choices"][0]["tokens"])  # type: ignore[index,call-overload]

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete)
        wait_until(lambda: _answered(tokens) > 5, "it has some tokens")
        (said,) = Control(server.url).requests(NAME)
        assert said["under_way"]
        rank = said["choices"][0]["ranks"][0]["rank"]  # type: ignore[index]
        os.kill(server.pid_of(f"rank {rank}"), signal.SIGKILL)
        assert answer.result().status_code == 200
    wait_until(lambda: not Control(server.url).requests(NAME)[0]["under_way"], "it has ended")
    for said in asked(server, NAME):
        choice = said["choices"][0]
        first, second = choice["ranks"]
        assert (first["rank"], second["rank"]) == (rank, 1 - rank)
        assert second["why"].startswith(f"rank {rank}: ")
        assert 0 < second["behind_tokens"] < 100
        assert (choice["tokens"], choice["finish_reason"], said["status"]) == (100, "length", 200)
        assert 0 <= said["read_s"] <= said["tokenized_s"] <= choice["submitted_s"] <= choice["placed_s"]
        assert choice["placed_s"] <= choice["first_token_s"] <= choice["ended_s"] <= said["seconds"]
        assert sum(choice["gaps"]["seconds"]) == pytest.approx(choice["ended_s"] - choice["first_token_s"], abs=0.001)
        assert choice["routing"]["rank"] == rank
        assert Control(server.url).requests(said["response_id"])[0]["id"] == NAME
        shown = text(said, 100)
        assert f"moved to rank {1 - rank} behind {second['behind_tokens']} tokens: {second['why']}" in shown
        assert all(len(line) <= 100 for line in shown.splitlines() if "█" in line)
    assert {process_name(pid) for pid in server.children()} >= {"pl:front-end 0", "pl:front-end 1"}


def _answered(ask: Any) -> int:
    try:
        return int(ask())
    except (ControlError, IndexError):
        return 0


@pytest.mark.slow
def test_its_id_is_in_every_line_of_the_log_about_it_at_every_process(server: Deployment) -> None:
    about = [line for line in lines(server) if line.get("request") == NAME]
    assert all(NAME in line["message"] for line in about)
    said = {line["process"].split()[0]: line["message"] for line in about}
    assert set(said) == {"front-end", "rank"}
    (slow,) = [line["message"] for line in about if line["message"].startswith("slow: ")]
    assert re.fullmatch(r"slow: request a/b c: [\d.]+ s: read .* to the first token .*, moved to rank \d .*", slow)
    (access,) = [line["message"] for line in about if '"POST /v1/completions HTTP/1.1" 200' in line["message"]]
    assert "5 prompt tokens, 100 made" in access
    assert any(f"go on at others: 1 ({NAME})" in line["message"] for line in lines(server))


@pytest.mark.slow
def test_the_newest_and_the_slowest_of_all_front_ends(server: Deployment) -> None:
    with ThreadPoolExecutor(4) as pool:
        for number in range(8):
            headers = {"x-request-id": f"quick-{number}", "connection": "close"}
            pool.submit(server.http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
    quick = {f"quick-{number}" for number in range(8)}
    wait_until(lambda: quick <= {one["id"] for one in _listed(server)}, "all are there")
    assert next(one["id"] for one in _listed(server, slowest=True)) == NAME
    assert server.http.get("/requests?limit=0").status_code == 400
    assert server.http.get("/requests/nobody").status_code == 404


def _listed(server: Deployment, **query: Any) -> list[dict[str, Any]]:
    return list(server.http.get("/requests", params=query).json()["requests"])


def test_timelines_are_behind_the_admins_door() -> None:
    scope = {"type": "http", "method": "GET", "headers": [], "server": ("h", 1), "client": ("10.0.0.7", 9)}
    for path in ("/requests", "/requests/abc"):
        refused = Guard(ServerConfig()).refusal(scope | {"path": path})
        assert refused is not None
        assert refused.status == 403


def test_the_page_is_shown_to_whoever_finds_the_door_and_asks_for_the_key_by_itself() -> None:
    scope = {"type": "http", "method": "GET", "headers": [], "server": ("h", 1), "client": ("10.0.0.7", 9)}
    locked = Guard(ServerConfig(admin_key="the-admins-key"))
    assert locked.refusal(scope | {"path": "/dashboard"}) is None
    assert locked.refusal(scope | {"path": "/dashboard", "method": "POST"}) is not None
    assert locked.refusal(scope | {"path": "/dashboard/events"}) is not None
    assert Guard(ServerConfig()).refusal(scope | {"path": "/dashboard"}) is not None
    other_port = Guard(ServerConfig(admin_key="the-admins-key", admin_port=2))
    assert other_port.refusal(scope | {"path": "/dashboard"}) is not None


def test_a_name_is_what_can_stand_in_a_line_of_a_log() -> None:
    assert name_of("a/b c?") == "a/b c?"
    assert name_of("a\nb\x00ü c") == "a%0Ab%00%C3%BC c"
    assert name_of(in_header("日本".encode().decode("latin-1"))) == name_of("日本") != name_of("中国")
    assert len(name_of("x" * 1000)) == 128
    assert name_of("x" * 1000) != name_of("x" * 999 + "y")
