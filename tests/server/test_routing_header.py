"""`X-Paceline-Routing`, sessions and `--routing` against running deployments, and the header's bounds."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from starlette.datastructures import Headers

from paceline.core.routing.policy import Belief, Decision
from paceline.server.routing_header import MAX_VALUE_BYTES, asked_for, routing_value, session_of
from tests.serving import Deployment, deployment, wait_until

COMPLETIONS = "/v1/completions"
ASK = {"X-Paceline-Routing": "1"}


def headers(**values: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in values.items()})


@pytest.mark.parametrize(("said", "asked"), [("1", True), ("true", True), ("0", False), ("", False), ("yes", False)])
def test_what_asks(said: str, asked: bool) -> None:
    assert asked_for(headers(x_paceline_routing=said)) == asked
    assert not asked_for(headers())


def test_the_session_is_the_headers_before_the_users() -> None:
    assert session_of(headers(x_session_id="a"), "b") == "a"
    assert session_of(headers(), "b") == "b"
    assert session_of(headers(x_session_id=""), "b") == "b"
    assert session_of(headers(), None) is None
    assert session_of(headers(), "") is None
    assert len(session_of(headers(), "x" * 100_000) or "") == 512


@pytest.mark.parametrize("text", ["least-load", "x" * 100_000, "\u00fc\n\r\x00" * 1000])
@pytest.mark.parametrize("number", [1, 2**53])
def test_the_value_is_short_and_one_line_whatever_it_tells(text: str, number: int) -> None:
    belief = Belief(number, number, number, number)
    decision = Decision(text, number, number, number, belief, [belief] * 3, text)
    value = routing_value([decision] * 200)
    assert len(value) <= MAX_VALUE_BYTES
    assert value.isascii()
    assert b"\n" not in value
    assert b"\r" not in value
    assert 1 <= len(msgspec.json.decode(value, type=list[Any])) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_asks_is_told(timed_server: Deployment, stream: bool) -> None:
    request = {"prompt": "hello", "max_tokens": 2, "stream": stream}
    response = timed_server.http.post(COMPLETIONS, json=request, headers=ASK)
    (decision,) = json.loads(response.headers["x-paceline-routing"])
    # Whether it had room in advance, or asked for it because it has only just begun.
    assert decision["policy"] in ("least-load", "broker")
    assert str(decision["rank"]) == response.headers["x-data-parallel-rank"]
    assert (decision["prompt_tokens"], decision["ranks"]) == (5, 4)
    assert decision["believed"]["rank"] == decision["rank"]
    assert len({decision["rank"], *(one["rank"] for one in decision["alternatives"])}) == 4
    assert set(decision["believed"]) == {"rank", "requests", "prefill_tokens", "in_flight"}


@pytest.mark.slow
def test_others_are_not(timed_server: Deployment) -> None:
    request = {"prompt": "hello", "max_tokens": 2}
    for given in ({}, {"X-Paceline-Routing": "0"}):
        assert "x-paceline-routing" not in timed_server.http.post(COMPLETIONS, json=request, headers=given).headers


@pytest.mark.slow
def test_a_named_rank_is_not_the_policys(timed_server: Deployment) -> None:
    request = {"prompt": "hello", "max_tokens": 2, "n": 7}
    response = timed_server.http.post(COMPLETIONS, json=request, headers=ASK | {"X-data-parallel-rank": "3"})
    decisions = json.loads(response.headers["x-paceline-routing"])
    assert [(one["policy"], one["rank"]) for one in decisions] == [("named", 3)] * 4
    # What was believed counts the copies before, which are on their way.
    believed = [one["believed"]["in_flight"] for one in decisions]
    assert believed == list(range(believed[0], believed[0] + 4))


@pytest.mark.slow
def test_a_session_stays_at_its_rank() -> None:
    with deployment("--engine", "timed", "-dp", "4", "-asc", "2", "--routing", "session") as running:

        def idle() -> bool:
            ranks = running.http.get("/loads").json()["ranks"]
            return not any(rank["waiting"] or rank["running"] for rank in ranks)

        def rank_of(session: str | None, user: str | None = None) -> str:
            given = {"X-Session-Id": session} if session is not None else {}
            request = {"prompt": "hello", "max_tokens": 1, "user": user}
            # Answered requests count until the next view: too many in a moment, and a rank passes for overloaded.
            wait_until(idle, "nothing is in flight")
            return str(running.http.post(COMPLETIONS, json=request, headers=given).headers["x-data-parallel-rank"])

        homes = {f"s{number}": rank_of(f"s{number}") for number in range(24)}
        assert len(set(homes.values())) == 4
        assert all(rank_of(session) == home for session, home in homes.items())
        assert all(rank_of(None, user=session) == home for session, home in homes.items())
        response = running.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 1, "user": "s1"}, headers=ASK)
        (decision,) = json.loads(response.headers["x-paceline-routing"])
        assert (decision["policy"], decision["reason"]) == ("session", "the session's rank")
