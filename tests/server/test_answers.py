"""Bodies and stream events, from outputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from paceline.core.requests import Output, PositionLogprobs, TokenLogprob
from paceline.server.answers import ChatDialect, CompletionDialect, StreamedChoice, WholeChoice, usage


def completion(null_usage: bool = False) -> CompletionDialect:
    return CompletionDialect("cmpl-1", "m", 5, null_usage)


def chat() -> ChatDialect:
    return ChatDialect("chatcmpl-1", "m", 5, False)


def parse(data: bytes) -> Any:
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    return json.loads(data[6:])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_spliced_event_is_the_encoded_one(text: str) -> None:
    for dialect in (completion(), completion(True), chat()):
        data = StreamedChoice(dialect, 3).events(Output(1, [7], text))
        assert data == dialect.chunk(3, text, None, None, None)


def test_text_that_is_held_back_makes_no_event() -> None:
    choice = StreamedChoice(completion(), 0)
    assert choice.events(Output(1, [7], "")) == b""
    assert parse(choice.events(Output(1, [8], "ab")))["choices"][0]["text"] == "ab"
    assert choice.tokens == 2


def test_last_event_has_the_reason() -> None:
    body = parse(StreamedChoice(completion(), 0).events(Output(1, [7], "x", "stop", stop_reason="END")))
    assert body["choices"] == [
        {"index": 0, "text": "x", "logprobs": None, "finish_reason": "stop", "stop_reason": "END"}
    ]
    body = parse(StreamedChoice(chat(), 0).events(Output(1, [7], "", "length")))
    assert body["choices"][0]["delta"] == {}
    assert body["choices"][0]["finish_reason"] == "length"


def position(text: str, logprob: float) -> PositionLogprobs:
    chosen = TokenLogprob(1, text.encode(), logprob)
    return PositionLogprobs(chosen, [chosen, TokenLogprob(2, b"\xe2", float("-inf"))])


def test_logprobs_of_tokens_whose_text_is_held_back_come_with_the_text() -> None:
    choice = StreamedChoice(completion(), 0)
    assert choice.events(Output(1, [7], "", logprobs=[position("a", -1.0)])) == b""
    logprobs = parse(choice.events(Output(1, [8], "ab", logprobs=[position("b", -2.0)])))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["token_logprobs"] == [-1.0, -2.0]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["top_logprobs"][0] == {"a": -1.0, "\N{REPLACEMENT CHARACTER}": -9999.0}


def test_chat_logprobs_have_bytes() -> None:
    body = parse(StreamedChoice(chat(), 0).events(Output(1, [7], "a", logprobs=[position("a", -1.0)])))
    (entry,) = body["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "a"
    assert entry["top_logprobs"][1] == {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -9999.0, "bytes": [0xE2]}


@pytest.mark.parametrize("dialect", [completion(), chat()])
def test_whole_answer_gathers_all_outputs(dialect: Any) -> None:
    choice = WholeChoice(dialect, 1, "echo ")
    for output in (Output(1, [1], "a"), Output(1, [2, 3], "b"), Output(1, [4], "", "stop")):
        choice.add(output)
    body = json.loads(dialect.body([choice.entry()], usage(3, choice.tokens)))
    (entry,) = body["choices"]
    assert (entry.get("text") or entry["message"]["content"]) == "echo ab"
    assert entry["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
