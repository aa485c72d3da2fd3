"""Anthropic's messages and OpenAI's responses: as chats, and their words, without a server."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from starlette.datastructures import Headers

from paceline.core.frontend.events import Placed
from paceline.core.requests import Output
from paceline.engines.base import EngineSettings
from paceline.engines.timed import ByteTokenizer
from paceline.server.errors import ApiError
from paceline.server.fields import ChatCompletionRequest
from paceline.server.messages import CountRequest, MessagesRequest
from paceline.server.openai_responses import ResponsesRequest
from paceline.server.requests import Models, Preparer
from paceline.server.responses import CutOff, Response, Submitted, Write

MODELS = Models(["timed"], ByteTokenizer(EngineSettings(max_model_len=4000)), 4000, reasoning_parser="think")
USER = [{"role": "user", "content": "hi"}]
CALLED = '<think>Hm.</think>So:<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
ANTHROPIC = {"max_tokens": 200, "messages": USER, "tools": [{"name": "now", "input_schema": {"type": "object"}}]}
OPENAI = {"input": "hi", "tools": [{"type": "function", "name": "now", "parameters": {"type": "object"}}]}


def answer(kind: Any, body: dict[str, Any], text: str, reason: Any = "stop", cuts: int = 7) -> list[Any]:
    """What a client is sent where the ranks make this text: the events of a stream, or the one body."""
    prepared = Preparer(MODELS).at_once(kind, json.dumps(body).encode(), Headers({}), "1")
    assert prepared is not None
    made = Response(prepared.form, "id", [""], stream=prepared.stream)
    writes = [made.handle(Submitted(0)), made.handle(Placed(0, 1))]
    pieces = [text[begin : begin + cuts] for begin in range(0, len(text), cuts)]
    writes += [made.handle(Output(0, [1], piece)) for piece in pieces]
    writes.append(made.handle(Output(0, [2], "", reason)))
    data = b"".join(write.data for write in writes if isinstance(write, Write))
    if not prepared.stream:
        return [json.loads(data)]
    events = [event.split("\ndata: ") for event in data.decode().split("\n\n") if event]
    found = [json.loads(event) for _, event in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [event["type"] for event in found]
    return found


# Anthropic's --------------------------------------------------------------------------------------


def test_a_message_has_its_blocks() -> None:
    (message,) = answer(MessagesRequest, ANTHROPIC, CALLED)
    thinking, text, use = message["content"]
    assert (thinking["thinking"], text["text"]) == ("Hm.", "So:")
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "now", {"a": 1})
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("cuts", [1, 7, 500])
def test_a_streamed_message_opens_fills_and_closes_each_block(cuts: int) -> None:
    events = answer(MessagesRequest, ANTHROPIC | {"stream": True}, CALLED, cuts=cuts)
    shape = [event["type"] for event in events if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert shape == ["message_start", *block * 3, "message_delta", "message_stop"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("text", "") for delta in deltas) == "So:"
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"a": 1}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_blocks_become_messages_of_a_chat() -> None:
    content = [
        {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "21"}]},
        {"type": "text", "text": "so?"},
    ]
    use = {"type": "tool_use", "id": "x", "name": "now", "input": {"a": 1}}
    messages = [*USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": content}]
    request = msgspec.convert(ANTHROPIC | {"messages": messages, "system": "short"}, MessagesRequest)
    chat = request.chat()
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "tool", "user"]
    (call,) = chat.messages[2].tool_calls or []
    assert (call.id, call.function.arguments) == ("x", {"a": 1})
    assert (chat.messages[3].content, chat.messages[3].tool_call_id) == ("21", "x")


def test_a_budget_for_thought_is_refused_where_there_is_any() -> None:
    body = json.dumps(ANTHROPIC | {"thinking": {"type": "enabled", "budget_tokens": 100}}).encode()
    with pytest.raises(ApiError, match=r"thinking.budget_tokens"):
        Preparer(MODELS).at_once(MessagesRequest, body, Headers({}), "1")
    silent = msgspec.structs.replace(MODELS, reasoning_parser="none")
    assert Preparer(silent).at_once(MessagesRequest, body, Headers({}), "1")
    for thinking in ({"type": "enabled", "budget_tokens": 200}, {"type": "adaptive"}, {"type": "disabled"}):
        changed = json.dumps(ANTHROPIC | {"thinking": thinking}).encode()
        assert Preparer(MODELS).at_once(MessagesRequest, changed, Headers({}), "1")


def test_a_last_message_of_the_assistant_begins_the_answer() -> None:
    begun = [*USER, {"role": "assistant", "content": "It is "}]
    assert msgspec.convert(ANTHROPIC | {"messages": begun}, MessagesRequest).chat().continue_final_message
    blank = [*USER, {"role": "assistant", "content": " "}]
    for messages in (USER, blank, [*begun, *USER]):
        assert not msgspec.convert(ANTHROPIC | {"messages": messages}, MessagesRequest).chat().continue_final_message


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (MessagesRequest, ANTHROPIC | {"output_config": {"effort": "low"}}),
        (ResponsesRequest, {"input": "hi", "reasoning": {"effort": "low"}}),
        (ChatCompletionRequest, {"messages": USER, "reasoning_effort": "low"}),
    ],
)
def test_an_effort_is_the_template_s_or_refused(kind: Any, asked: dict[str, Any]) -> None:
    body = json.dumps(asked).encode()
    with pytest.raises(ApiError, match="reasoning_effort: is not known"):
        Preparer(MODELS).at_once(kind, body, Headers({}), "1")
    tokenizer = ByteTokenizer(EngineSettings(max_model_len=4000))
    tokenizer.chat_template = "{{ reasoning_effort }}"
    assert Preparer(msgspec.structs.replace(MODELS, tokenizer=tokenizer)).at_once(kind, body, Headers({}), "1")


# OpenAI's -----------------------------------------------------------------------------------------


def test_a_response_has_its_items() -> None:
    (response,) = answer(ResponsesRequest, OPENAI, CALLED)
    reasoning, message, call = response["output"]
    assert reasoning["content"][0]["text"] == "Hm."
    assert message["content"][0]["text"] == "So:"
    assert (call["name"], json.loads(call["arguments"])) == ("now", {"a": 1})
    assert response["status"] == "completed"


@pytest.mark.parametrize("cuts", [1, 7, 500])
def test_a_streamed_response_ends_with_the_whole(cuts: int) -> None:
    events = answer(ResponsesRequest, OPENAI | {"stream": True}, CALLED, "length", cuts)
    (whole,) = answer(ResponsesRequest, OPENAI, CALLED, "length")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.incomplete"
    for one in (whole, events[-1]["response"]):
        for item in one["output"]:
            item.pop("call_id", None)
    assert events[-1]["response"]["output"] == whole["output"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in whole["output"]]


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ],
)
def test_what_would_change_a_response_is_refused_by_name(field: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        Preparer(MODELS).at_once(ResponsesRequest, json.dumps(OPENAI | field).encode(), Headers({}), "1")
    assert caught.value.param == param
    for passes in ({"include": ["reasoning.encrypted_content"]}, {"reasoning": {}}, {"reasoning": {"effort": None}}):
        body = json.dumps(OPENAI | passes).encode()
        assert Preparer(MODELS).at_once(ResponsesRequest, body, Headers({}), "1")


# Both ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "body"), [(MessagesRequest, ANTHROPIC), (ResponsesRequest, OPENAI)])
def test_a_stream_that_is_cut_off_says_so_in_its_own_words(kind: Any, body: dict[str, Any]) -> None:
    prepared = Preparer(MODELS).at_once(kind, json.dumps(body | {"stream": True}).encode(), Headers({}), "1")
    assert prepared is not None
    made = Response(prepared.form, "id", [""], stream=True)
    made.handle(Submitted(0))
    made.handle(Placed(0, 1))
    made.handle(Output(0, [1], "a"))
    last = made.handle(CutOff())
    assert isinstance(last, Write)
    assert last.last
    said = json.loads(last.data.decode().split("\ndata: ")[1])
    assert said["type"] in ("error", "response.failed")


blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_result", "tool_use", "thinking", "image", "function_call", "reasoning"])},
    optional={name: st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.none(), max_size=2)
              for name in ("text", "content", "id", "name", "input", "tool_use_id", "output", "call_id", "role")},
)  # fmt: skip


@given(st.lists(blocks, min_size=1, max_size=3))
def test_any_blocks_are_a_chat_or_an_error_that_names_a_field(content: list[Any]) -> None:
    for kind, body in (
        (CountRequest, {"messages": [{"role": "user", "content": content}]}),
        (CountRequest, {"messages": USER, "system": content}),
        (ResponsesRequest, {"input": content}),
    ):
        try:
            msgspec.convert(body, kind).chat()
        except ApiError as error:
            assert error.status == 400
            assert error.param
