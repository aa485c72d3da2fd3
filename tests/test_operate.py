"""`paceline loads`: a table, JSON, and errors that are one clear line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paceline.control import Control
from paceline.operate import loads_app as app
from tests.serving import Command, Deployment, wait_until
from tests.test_control import answer, free_url, refusal, serving


def load(rank: int, **given: float) -> dict[str, float]:
    made = dict.fromkeys(
        ("waiting", "running", "prefill_tokens", "kv_used", "kv_total", "prefill_rate", "decode_rate", "finished",
         "in_flight"), 0
    )  # fmt: skip
    return {"rank": rank, "slots": 16} | made | given


LOADS = {
    "ranks": [
        load(0, waiting=2, running=16, prefill_tokens=12_000, kv_used=50, kv_total=200, decode_rate=1234.5),
        load(7, running=1, in_flight=3, finished=1_000_000, prefill_quota=2_048),
    ]
}


def loads(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


def test_a_table() -> None:
    with serving(answer(200, LOADS)) as server:
        done = loads("--url", server.url)
        assert server.asked == ["GET /loads HTTP/1.1"]
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1] == ["0", "2", "16/16", "12,000", "0", "25%", "1,234", "0"]
    assert lines[2] == ["7", "0", "1/16", "0", "3", "2,048", "1,000,000"]
    assert lines[3][:4] == ["all", "2", "17/32", "12,000"]
    assert len(lines) == 4


def test_what_waits_before_all_ranks_stands_below() -> None:
    with serving(answer(200, LOADS | {"queued": 1234})) as server:
        done = loads("--url", server.url)
    assert done.stdout.splitlines()[-1].strip() == "1,234 wait for any rank"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"missing": [3, 4]}, "missing: rank 3, 4"),
        ({"suspension": {"number": 1, "waiting_for": []}}, "paused"),
        ({"suspension": {"number": 1, "waiting_for": [2]}}, "pausing: rank 2 still computes"),
        ({"suspension": {"number": 2, "waiting_for": []}, "status": "ok"}, ""),
        ({"status": "draining"}, "draining"),
        ({"status": "rank 1 holds the group up"}, "rank 1 holds the group up"),
    ],
)
def test_what_is_not_as_it_should_be_stands_below(said: dict[str, object], line: str) -> None:
    with serving(answer(200, LOADS | said)) as server:
        done = loads("--url", server.url)
    below = [text.strip() for text in done.stdout.splitlines()[4:] if text.strip()]
    assert below == [line] * bool(line)


def test_how_much_of_prompts_was_there_and_what_ranks_hold_stands_below() -> None:
    ranks = [
        load(0, prompt_tokens=1000, cached_tokens=840, held_tokens=12_800),
        load(1, prompt_tokens=400),
        load(2, held_tokens=128),
    ]
    with serving(answer(200, {"ranks": ranks})) as server:
        done = loads("--url", server.url)
    assert "of prompts' tokens were there: rank 0 84%, rank 1 0%" in done.stdout
    assert "that ranks hold: rank 0 12,800, rank 2 128" in done.stdout


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_nothing_is_cut_where_it_is_narrow(columns: str) -> None:
    with serving(answer(200, LOADS)) as server:
        done = CliRunner().invoke(app, ["--url", server.url], env={"COLUMNS": columns})
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


def test_json_is_what_the_server_says() -> None:
    with serving(answer(200, LOADS)) as server:
        assert json.loads(loads("--url", server.url, "--json").stdout) == LOADS


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_watching_goes_on_until_the_server_has_gone(arguments: list[str]) -> None:
    later = {"ranks": [load(0, waiting=4321)]}
    with serving(answer(200, LOADS), answer(200, later), refusal(500, "no more")) as server:
        done = loads("--url", server.url, "--watch", "--interval", "0.05", *arguments)
        assert len(server.asked) == 3
    assert done.exit_code == 1
    assert "4,321" in done.stdout or '"waiting": 4321' in done.stdout
    assert done.stderr == "paceline: error: no more\n"


@pytest.mark.parametrize(
    "said",
    [answer(200, {}), answer(200, {"ranks": [{"rank": 0}]}), answer(200, {"ranks": 1}), answer(404, b"x"), b"SSH\r\n"],
)  # fmt: skip
def test_what_is_no_paceline_server_is_one_line(said: bytes) -> None:
    with serving(said) as server:
        done = loads("--url", server.url)
    assert done.exit_code == 1
    assert done.stderr.startswith("paceline: error: ")
    assert len(done.stderr.splitlines()) == 1


def test_nobody_there_is_one_line() -> None:
    url = free_url()
    done = loads("--url", url)
    assert done.exit_code == 1
    assert done.stderr == f"paceline: error: no answer from {url}: [Errno 111] Connection refused\n"


@pytest.mark.slow
def test_a_running_deployment_pushes_its_loads_to_whoever_watches(timed_server: Deployment) -> None:
    pushed = Control(timed_server.url).watch_loads(0.05)
    assert next(pushed)["status"] == "ok"
    command = Command("loads", "--watch", "--json", "--interval", "0.05", "--url", timed_server.url)
    try:
        command.wait_line('"ranks"')
        body = {"prompt": "hello", "max_tokens": 30}
        before = finished(Control(timed_server.url).loads())
        assert timed_server.http.post("/v1/completions", json=body).status_code == 200
        assert any(finished(said) > before for said in pushed)
        wait_until(lambda: finished(json.loads(command.lines[-1])) > before, "the command prints it too")
    finally:
        command.close()
    answer = timed_server.http.get("/loads?stream=maybe")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


def finished(said: dict[str, Any]) -> int:
    return sum(load["finished"] for load in said["ranks"])


@pytest.mark.slow
def test_of_a_running_deployment(timed_server: Deployment) -> None:
    command = Command("loads", "--url", timed_server.url)
    try:
        assert command.wait_end() == 0
        assert [line.split()[0] for line in command.lines] == ["rank", "0", "1", "2", "3", "all"]
    finally:
        command.close()
