"""Prompts: what does not fit is known before it is read, and nobody's stream waits for what is long."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from starlette.datastructures import Headers

from paceline.engines.base import EngineSettings
from paceline.engines.timed import ByteTokenizer
from paceline.server.errors import ApiError
from paceline.server.fields import ChatCompletionRequest, CompletionRequest, Decoder, bound
from paceline.server.prompts import MOST_CHOICES, PIECE, Cancelled, PromptMaker
from paceline.server.requests import BOUND_BYTES, Models, prepare
from tests.pace import stretched
from tests.serving import Deployment

LIMIT = 1000


class Counting(ByteTokenizer):
    """Keeps how much it was asked to read."""

    def __init__(self, limit: int) -> None:
        super().__init__(EngineSettings(max_model_len=limit))
        self.read = 0

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        self.read += len(text)
        return super().encode(text)


def chat(**fields: Any) -> ChatCompletionRequest:
    return Decoder(ChatCompletionRequest).decode(msgspec.json.encode(fields))


def completion(**fields: Any) -> CompletionRequest:
    return Decoder(CompletionRequest).decode(msgspec.json.encode(fields))


def refusal(work: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value


@pytest.mark.parametrize("size", [PIECE + 1, 12_000_000])
def test_a_text_that_cannot_fit_is_not_read(size: int) -> None:
    tokenizer = Counting(LIMIT)
    said = [{"role": "user", "content": "x" * size}]
    for ask in (
        lambda: PromptMaker(tokenizer, LIMIT).completion(completion(prompt="x" * size)),
        lambda: PromptMaker(tokenizer, LIMIT).chat(chat(messages=said)),
    ):
        error = refusal(ask)
        assert error.body["error"]["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 1000 tokens" in str(error)
        assert "prompt is too long" in str(error)
    assert tokenizer.read == 0


def test_a_long_text_is_given_up_once_it_is_known_not_to_fit() -> None:
    tokenizer = Counting(2 * PIECE)
    tokenizer.longest_piece = 100
    error = refusal(lambda: PromptMaker(tokenizer, 2 * PIECE).completion(completion(prompt="x" * (50 * PIECE))))
    assert "more than" in str(error)
    assert tokenizer.read <= 4 * PIECE


def test_a_prompt_that_nobody_waits_for_is_given_up() -> None:
    gone = threading.Event()
    gone.set()
    limit = 10 * PIECE
    maker = PromptMaker(Counting(limit), limit, gone)
    for ask in (
        lambda: maker.completion(completion(prompt=["a", "b"])),
        lambda: maker.tokens("x" * (3 * PIECE), limit, "prompt"),
        lambda: maker.chat(chat(messages=[{"role": "user", "content": "a"}])),
    ):
        with pytest.raises(Cancelled):
            ask()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt":[' + b"[1]," * 100_000 + b"[1]]}", "prompt"),
        (b'{"prompt":[' + b"1," * 400_000 + b"1]}", "prompt"),
        (b'{"messages":[' + b'{"role":"user"},' * 100_000 + b"{}]}", "messages"),
        (b'{"input":[' + b"1," * 400_000 + b"1]}", "input"),
        (b'{"input":[' + b'{"role":"user"},' * 100_000 + b"{}]}", "input"),
        (b'{"input":"a","metadata":{' + b",".join(b'"%d":1' % n for n in range(200_000)) + b"}}", "metadata"),
        (b'{"prompt":"a","stop":[' + b'"x",' * 400_000 + b'"x"]}', "stop"),
        (b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % n for n in range(200_000)) + b"}}", "logit_bias"),
    ],
    ids=["lists", "ids", "messages", "inputs", "items", "metadata", "stops", "biases"],
)
def test_millions_of_anything_are_refused_before_objects_are_made_of_them(body: bytes, param: str) -> None:
    assert len(body) > BOUND_BYTES
    error = refusal(lambda: bound(body, LIMIT, MOST_CHOICES))
    assert (error.status, error.body["error"]["param"]) == (400, param)


def test_arguments_of_calls_that_cannot_fit_are_not_read() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": json.dumps({"a": "x" * 1000 * LIMIT})}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    request = Decoder(ChatCompletionRequest).decode(json.dumps({"messages": messages}).encode())
    maker = PromptMaker(ByteTokenizer(EngineSettings(max_model_len=LIMIT)), LIMIT)
    error = refusal(lambda: maker.chat(request))
    assert error.body["error"]["code"] == "context_length_exceeded"
    assert "at least" in str(error)


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 30), ({"max_tokens": 60}, 60), ({"max_completion_tokens": 7}, 7)]
)
def test_a_chat_that_names_no_bound_has_what_the_model_recommends(fields: dict[str, Any], expected: int) -> None:
    models = Models(["m"], Counting(LIMIT), LIMIT, defaults={"temperature": 0.5, "top_k": 3, "max_tokens": 30})
    request = chat(messages=[{"role": "user", "content": "a"}], **fields)
    made = prepare(request, Headers(), models, "id")
    assert made.parts[0].params.max_tokens == expected


def test_what_is_long_and_fits_is_let_through() -> None:
    text = json.dumps("[1],{" * 100_000)
    for body in (f'{{"prompt": {text}}}', f'{{"messages": [{{"role": "user", "content": {text}}}]}}'):
        bound(body.encode(), LIMIT, MOST_CHOICES)
    bound(b'{"prompt": [' + b"[1,2,3]," * 4000 + b"[1]]}", LIMIT, MOST_CHOICES)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"truncate_prompt_tokens": 3}, b"llo"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, b"hel"),
        ({"truncate_prompt_tokens": -1}, b"hello"),
        ({"truncate_prompt_tokens": 9}, b"hello"),
    ],
)
def test_a_prompt_may_be_cut(fields: dict[str, Any], ids: bytes) -> None:
    (prompt,) = PromptMaker(Counting(LIMIT), LIMIT).completion(completion(prompt="hello", **fields))
    assert bytes(prompt.token_ids) == ids


def test_a_text_that_is_to_be_cut_may_have_any_length() -> None:
    made = PromptMaker(Counting(LIMIT), LIMIT)
    (prompt,) = made.completion(completion(prompt="x" * (3 * PIECE), truncate_prompt_tokens=-1, max_tokens=1))
    assert len(prompt.token_ids) == LIMIT - 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_text_that_is_to_be_cut_no_more_is_read_than_is_kept(side: str) -> None:
    text = "".join(f"{number:08x}" for number in range(500_000))
    fields = {"truncate_prompt_tokens": LIMIT - 1, "truncation_side": side, "max_tokens": 1}
    said = [{"role": "user", "content": "a"}, {"role": "user", "content": text}, {"role": "user", "content": "b"}]
    for way in ("completion", "chat"):
        tokenizer = Counting(LIMIT)
        maker = PromptMaker(tokenizer, LIMIT)
        if way == "completion":
            (prompt,) = maker.completion(completion(prompt=text, **fields))
            whole = text
        else:
            prompt = maker.chat(chat(messages=said, **fields))
            whole = f"User: a\nUser: {text}\nUser: b\nAssistant:"
        kept = whole[: LIMIT - 1] if side == "right" else whole[1 - LIMIT :]
        assert bytes(prompt.token_ids).decode() == kept
        assert tokenizer.read <= 4 * PIECE


def test_the_smaller_of_both_limits_counts() -> None:
    made = PromptMaker(Counting(LIMIT), LIMIT)
    said = [{"role": "user", "content": "a"}]
    for limits in ({"max_tokens": 3, "max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 3}):
        assert made.chat(chat(messages=said, **limits)).max_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": LIMIT}, "truncate_prompt_tokens"),
        ({"prompt": ["a"] * 5, "n": 1000}, "prompt"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], param: str) -> None:
    everything = frozenset({"min_tokens", "prompt_logprobs"})
    models = Models(["m"], Counting(LIMIT), LIMIT, everything)
    error = refusal(lambda: prepare(completion(**{"prompt": "a"} | fields), Headers(), models, "id"))
    assert error.body["error"]["param"] == param


def test_nothing_is_made_with_echo_alone() -> None:
    models = Models(["m"], Counting(LIMIT), LIMIT, frozenset({"prompt_logprobs"}))
    made = prepare(completion(prompt="ab", echo=True, logprobs=1, max_tokens=0), Headers(), models, "id")
    (part,) = made.parts
    assert (part.params.max_tokens, part.params.prompt_logprobs, part.opening_text) == (1, 1, "ab")
    assert made.form.wording.none_made


# A deployment -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_others_are_answered_while_a_long_body_is_read(llama_server: Deployment) -> None:
    text = "hello, world and some more text. "
    bodies = [
        {"prompt": text * 30_000},
        {"prompt": text * 360_000},
        {"messages": [{"role": "user", "content": "a"}] * 12_000},
        {"prompt": [1] * 3_000_000},
    ]
    over = threading.Event()

    def longest_gap() -> float:
        longest = 0.0
        while not over.is_set():
            begun = time.monotonic()
            assert llama_server.http.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - begun)
        return longest

    with ThreadPoolExecutor(1) as pool:
        gap = pool.submit(longest_gap)
        for body in bodies:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            answer = llama_server.http.post(path, json=body)
            assert answer.status_code == 400, answer.text[:200]
            assert answer.json()["error"]["code"] == "context_length_exceeded"
        over.set()
        # It was 20 s for the second.
        assert gap.result() < stretched(2.0)


@pytest.mark.slow
def test_a_batch_of_more_than_may_wait_is_served_piece_by_piece(timed_server: Deployment) -> None:
    answer = timed_server.http.post("/v1/completions", json={"prompt": ["a"] * 1500, "max_tokens": 1, "n": 2})
    assert answer.status_code == 200, answer.text[:200]
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(3000))


@pytest.mark.slow
def test_tokens_of_a_text_and_back(llama_server: Deployment) -> None:
    http = llama_server.http
    made = http.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True}).json()
    assert (made["count"], made["max_model_len"], len(made["token_strs"])) == (len(made["tokens"]), 2048, made["count"])
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": "hello world"}
    said = {"messages": [{"role": "user", "content": "<end_of_turn>"}]}
    tokens = http.post("/tokenize", json=said).json()["tokens"]
    assert tokens.count(106) == 1, "what a message brings along is text"
    for wrong in ({}, {"prompt": "a", "messages": []}, {"prompt": "a", "modell": 1}, {"prompt": "a", "model": "x"}):
        assert http.post("/tokenize", json=wrong).status_code in (400, 404)
    assert http.post("/detokenize", json={"tokens": [10**7]}).status_code == 400


@pytest.mark.slow
def test_probes_and_what_is_served(timed_server: Deployment) -> None:
    http = timed_server.http
    for path in ("/livez", "/readyz", "/startupz", "/ping"):
        assert http.get(path).status_code == 200
    assert http.get("/load").json() == {"server_load": 0}
    assert http.get("/server_info").json()["models"] == ["timed"]
    assert http.get("/v1/models/timed").json()["id"] == "timed"
    assert http.get("/v1/models/other").status_code == 404
