"""`X-Paceline-Routing`, sessions and `--routing` against running deployments."""

from __future__ import annotations

import json

import pytest

from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
ASK = {"X-Paceline-Routing": "1"}


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


def test_others_are_not(timed_server: Deployment) -> None:
    request = {"prompt": "hello", "max_tokens": 2}
    for given in ({}, {"X-Paceline-Routing": "0"}):
        assert "x-paceline-routing" not in timed_server.http.post(COMPLETIONS, json=request, headers=given).headers


def test_a_named_rank_is_not_the_policys(timed_server: Deployment) -> None:
    request = {"prompt": "hello", "max_tokens": 2, "n": 7}
    response = timed_server.http.post(COMPLETIONS, json=request, headers=ASK | {"X-data-parallel-rank": "3"})
    decisions = json.loads(response.headers["x-paceline-routing"])
    assert [(one["policy"], one["rank"]) for one in decisions] == [("named", 3)] * 4
    # What was believed counts the copies before, which are on their way.
    believed = [one["believed"]["in_flight"] for one in decisions]
    assert believed == list(range(believed[0], believed[0] + 4))


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
