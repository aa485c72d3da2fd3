"""The HTTP side against a running deployment: every answer and every refusal, as a client sees it."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from paceline import __version__
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


def events_of(response: Any) -> list[Any]:
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block[6:]) for block in blocks[:-1]]


def test_completion(timed_server: Deployment) -> None:
    response = timed_server.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 3})
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "timed"
    assert body["choices"] == [{"index": 0, "text": " 0 1 2", "logprobs": None, "finish_reason": "length"}]
    counted = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert body["usage"] == counted | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert response.headers["x-data-parallel-rank"] in {"0", "1", "2", "3"}


def test_completion_stream_with_usage(timed_server: Deployment) -> None:
    request = {"prompt": "hello", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    response = timed_server.http.post(COMPLETIONS, json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-data-parallel-rank"] in {"0", "1", "2", "3"}
    *chunks, last = events_of(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " 0 1 2"
    # Two tokens may come in one event.
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 8


def test_stream_without_usage_says_none(timed_server: Deployment) -> None:
    response = timed_server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "stream": True})
    assert all("usage" not in chunk for chunk in events_of(response))


def test_chat_and_its_stream_agree(timed_server: Deployment) -> None:
    whole = timed_server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 4}).json()
    stream = timed_server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 4, "stream": True})
    chunks = events_of(stream)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] == " 0 1 2 3"
    assert whole["choices"][0]["message"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_chat_defaults_to_all_that_is_left(timed_server: Deployment) -> None:
    messages = [{"role": "user", "content": "x" * 4050}]
    body = timed_server.http.post(CHAT, json={"messages": messages}).json()
    assert body["usage"]["total_tokens"] == 4096


def test_n_and_list_prompts(timed_server: Deployment) -> None:
    body = timed_server.http.post(COMPLETIONS, json={"prompt": ["a", "bc"], "n": 2, "max_tokens": 2}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in body["choices"]} == {" 0 1"}
    counted = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert body["usage"] == counted | {"prompt_tokens_details": {"cached_tokens": 0}}
    stream = timed_server.http.post(COMPLETIONS, json={"prompt": "a", "n": 3, "max_tokens": 2, "stream": True})
    texts: dict[int, str] = {}
    for chunk in events_of(stream):
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: " 0 1", 1: " 0 1", 2: " 0 1"}


def test_token_prompts_and_echo(timed_server: Deployment) -> None:
    body = timed_server.http.post(COMPLETIONS, json={"prompt": [104, 105], "max_tokens": 1, "echo": True}).json()
    assert body["choices"][0]["text"] == "hi 0"
    body = timed_server.http.post(COMPLETIONS, json={"prompt": [[104], [105, 105]], "max_tokens": 1}).json()
    assert body["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_header_chooses_the_rank(timed_server: Deployment, rank: int) -> None:
    headers = {"X-data-parallel-rank": str(rank)}
    for stream in (False, True):
        request = {"prompt": "a", "max_tokens": 1, "stream": stream}
        response = timed_server.http.post(COMPLETIONS, json=request, headers=headers)
        assert response.headers["x-data-parallel-rank"] == str(rank)


@pytest.mark.parametrize("rank", ["4", "-1", "one", "", "99999999999999999999"])
def test_unknown_rank(timed_server: Deployment, rank: str) -> None:
    response = timed_server.http.post(
        COMPLETIONS, json={"prompt": "a", "max_tokens": 1}, headers={"X-data-parallel-rank": rank}
    )
    assert error_of(response, 400)["param"] == "X-data-parallel-rank"


BAD_FIELDS: dict[str, list[Any]] = {
    "prompt": ["", [], None, 7, [1, 256], "x" * 5000],
    "prompt[1]": [["a", ""], ["a", 1]],
    "max_tokens": [-1, 0, "many", 1.5, 4096, 10**400],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [0, 1.1],
    "top_k": [-2],
    "min_p": [2],
    "n": [0, 2000],
    "seed": ["x"],
    "frequency_penalty": [3],
    "presence_penalty": [-3],
    "repetition_penalty": [0],
    "logit_bias": [{"256": 1}, {"-1": 1}, {"a": 1}, {"1": 101}, [1]],
    "stop": [1, ["a"] * 17, [""]],
    "stop[0]": [[1]],
    "stop_token_ids": [[999]],
    "logprobs": [21, -1],
    "stream": ["yes"],
    "stream_options": [{"include_usage": True}],
    "best_of": [3],
    "suffix": ["x"],
    "response_format": [{"type": "json_object"}],
    "priority": [2**40],
}
BAD_CHATS: dict[str, list[Any]] = {
    "messages": [[], "hello", [{"role": "user", "content": "x" * 5000}]],
    "messages[0].role": [[{"content": "a"}]],
    "messages[0].content": [[{"role": "user"}]],
    "messages[0].content[0]": [[{"role": "user", "content": [{"type": "image_url"}]}]],
    "max_completion_tokens": [-1],
    "top_logprobs": [2, 21],
    "tools[0].function": [[{"name": "a"}]],
}
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ({"prompt": "a", "max_tokns": 3}, "max_tokns"),
    ({"prompt": "a", "min_tokens": 3}, "min_tokens"),
    ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
    ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
]
BAD = [
    *BOTH,
    *(({"prompt": "a", "max_tokens": 1, param.split("[")[0]: value}, param) for param, values in BAD_FIELDS.items()
      for value in values),
    *(({"messages": HELLO, param.split("[")[0]: value}, param) for param, values in BAD_CHATS.items()
      for value in values),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[-40:])
def test_bad_field_is_named(timed_server: Deployment, fields: dict[str, Any], param: str) -> None:
    path = CHAT if "messages" in fields else COMPLETIONS
    error = error_of(timed_server.http.post(path, json=fields), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param.split("[")[0] in error["message"] or error["code"] == "context_length_exceeded"


def test_context_length_has_the_code_that_clients_look_for(timed_server: Deployment) -> None:
    response = timed_server.http.post(COMPLETIONS, json={"prompt": "x" * 5000})
    assert error_of(response, 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"", b"nope", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 5000, b'{"prompt": "\xff"}']
)
def test_body_that_is_no_request(timed_server: Deployment, body: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        error_of(timed_server.http.post(path, content=body), 400)


def test_unknown_model(timed_server: Deployment) -> None:
    response = timed_server.http.post(COMPLETIONS, json={"prompt": "a", "model": "gpt-9"})
    error = error_of(response, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_unknown_path_and_method(timed_server: Deployment) -> None:
    error_of(timed_server.http.get("/v1/nothing"), 404)
    error_of(timed_server.http.get(COMPLETIONS), 405)


def test_large_body_is_413_with_and_without_its_length(timed_server: Deployment) -> None:
    body = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    assert error_of(timed_server.http.post(COMPLETIONS, content=body), 413)["code"] == "body_too_large"

    def chunks() -> Any:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    assert error_of(timed_server.http.post(COMPLETIONS, content=chunks()), 413)["code"] == "body_too_large"
    assert timed_server.http.get("/health").status_code == 200


def test_request_id_is_echoed(timed_server: Deployment) -> None:
    headers = {"X-Request-Id": "my-id-1"}
    for stream in (False, True):
        request = {"prompt": "a", "max_tokens": 1, "stream": stream}
        response = timed_server.http.post(COMPLETIONS, json=request, headers=headers)
        assert response.headers["x-request-id"] == "my-id-1"
    assert timed_server.http.post(COMPLETIONS, json={}, headers=headers).headers["x-request-id"] == "my-id-1"
    assert timed_server.http.get("/health", headers=headers).headers["x-request-id"] == "my-id-1"
    assert timed_server.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).headers["x-request-id"]


def test_models_version_health(timed_server: Deployment) -> None:
    (model,) = timed_server.http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("timed", 4096)
    assert timed_server.http.get("/version").json() == {"version": __version__}
    health = timed_server.health()
    assert health["status"] == "ok"
    assert health["ready"] == [0, 1, 2, 3]


def test_openapi_names_every_field(timed_server: Deployment) -> None:
    document = timed_server.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    assert {"prompt", "temperature", "logit_bias", "stop", "seed"} <= set(schemas["CompletionRequest"]["properties"])
    assert "messages" in schemas["ChatCompletionRequest"]["required"]
    for path, methods in document["paths"].items():
        for method in methods:
            response = timed_server.http.request(method, path)
            assert response.status_code != 404 or response.json()["error"]["param"] in ("response_id", "request_id")


def test_a_body_that_is_packed_is_refused_by_name(timed_server: Deployment) -> None:
    packed = gzip.compress(json.dumps({"prompt": "a", "max_tokens": 1}).encode())
    response = timed_server.http.post(COMPLETIONS, content=packed, headers={"content-encoding": "gzip"})
    assert error_of(response, 415)["param"] == "content-encoding"
    plain = {"content": b'{"prompt": "a", "max_tokens": 1}', "headers": {"content-encoding": "identity"}}
    assert timed_server.http.post(COMPLETIONS, **plain).status_code == 200


def test_what_streams_hide_is_not_asked_for(timed_server: Deployment) -> None:
    asked: dict[str, Any] = {"prompt": "a", "max_tokens": 1, "stream": True}
    for value, status in ((False, 200), (True, 400)):
        body = asked | {"stream_options": {"include_obfuscation": value}}
        assert timed_server.http.post(COMPLETIONS, json=body).status_code == status


def test_a_refusal_in_the_history_is_a_text(timed_server: Deployment) -> None:
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    asked = {"messages": [*HELLO, said, *HELLO], "max_tokens": 1}
    text = asked | {"messages": [*HELLO, {"role": "assistant", "content": "no"}, *HELLO]}
    one, other = (timed_server.http.post(CHAT, json=body).json()["usage"] for body in (asked, text))
    assert one == other


# X-Paceline-Routing, sessions and --routing ---------------------------------------------------------

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
