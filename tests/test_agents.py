"""Agents against the real thing: the official clients with tools and forms, and the default model over two ranks.

The model is too weak to choose a tool well, so that grammars force it, and what is looked at is the shape.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
WEATHER = {
    "type": "object", "required": ["city", "unit"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
}  # fmt: skip
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather now.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 120}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=130)
    mood: Literal["good", "bad"]


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment("--max-model-len", "2048") as running:
        yield running


@pytest.fixture
def client(server: Deployment) -> openai.OpenAI:
    return server.openai


# OpenAI's: chats ----------------------------------------------------------------------------------


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(tools=TOOLS, tool_choice=NAMED, **CHAT).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
    assert choice.message.content is None


def test_calls_that_are_required_come_streamed_as_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, **CHAT}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    (one,), (other,) = whole.message.tool_calls or [], streamed.message.tool_calls or []
    assert one.function.name == other.function.name
    assert one.function.arguments == other.function.arguments
    assert streamed.finish_reason == "tool_calls"
    pieces = [chunk.choices[0].delta.tool_calls for chunk in client.chat.completions.create(stream=True, **asked)]
    assert sum(piece is not None for piece in pieces) > 3, "the arguments come as they are written"


def test_what_a_tool_said_goes_back_to_the_model(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(tools=TOOLS, tool_choice=NAMED, **CHAT).choices[0].message
    (call,) = message.tool_calls or []
    back: Any = [*ASKED, message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    plain = client.chat.completions.create(**CHAT).usage
    answer = client.chat.completions.create(tools=TOOLS, **CHAT | {"messages": back, "max_tokens": 8})
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert plain is not None
    assert answer.usage.prompt_tokens > plain.prompt_tokens + 60, "tools, calls and results are in the prompt"


def test_an_answer_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(response_format=Person, **CHAT).choices[0].message.parsed
    assert isinstance(parsed, Person)
    whole = client.chat.completions.create(response_format={"type": "json_object"}, **CHAT).choices[0]
    assert whole.finish_reason == "length" or isinstance(json.loads(whole.message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_grammar": 'root ::= "a" ("b" | "c")'}, "ab|ac"),
    ],
)
def test_vllm_s_fields(client: openai.OpenAI, form: dict[str, Any], expected: str) -> None:
    answer = client.completions.create(model=MODEL, prompt="The answer:", extra_body=form, max_tokens=20)
    assert re.fullmatch(expected, answer.choices[0].text)
    assert answer.choices[0].finish_reason == "stop"


def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI) -> None:
    for wrong, param in (
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(extra_body=wrong, **CHAT)
        assert caught.value.param == param


def test_an_object_ends_with_the_properties_that_were_named(client: openai.OpenAI) -> None:
    """A schema that says nothing of others lets a weak model write more and more of them."""
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    choice = client.chat.completions.create(response_format=form, **CHAT).choices[0]
    assert set(json.loads(choice.message.content or "")) == {"name"}
    assert choice.finish_reason == "stop"


def test_who_tokenizes_by_the_server_is_told_what_it_needs(server: Deployment) -> None:
    about = server.http.get("/tokenizer_info").json()
    assert (about["bos_token"], about["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "<|im_start|>" in about["chat_template"]


# OpenAI's: responses ------------------------------------------------------------------------------

FUNCTION: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
RESPOND: dict[str, Any] = {"model": MODEL, "input": ASKED, "temperature": 0, "max_output_tokens": 60, "store": False}


def test_a_response_streamed_is_the_one_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(instructions="Be short.", **RESPOND)
    assert whole.output_text
    assert whole.usage is not None
    with client.responses.stream(instructions="Be short.", **RESPOND) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert streamed.output_text == whole.output_text
    assert (streamed.status, streamed.usage) == (whole.status, whole.usage)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"


def test_a_response_calls_a_tool_and_gets_what_came_of_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "get_weather"}, **RESPOND}
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["unit"] in ("celsius", "fahrenheit")
    with client.responses.stream(**asked) as stream:
        (other,) = stream.get_final_response().output
    assert other.type == "function_call"
    assert other.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    back = client.responses.create(tools=[FUNCTION], **RESPOND | {"input": [*ASKED, call.model_dump(), result]})
    assert back.output_text


def test_a_response_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    assert isinstance(client.responses.parse(text_format=Person, **RESPOND).output_parsed, Person)


def test_a_response_goes_on_from_another(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = RESPOND | {"max_output_tokens": 8, "store": True}
    first = client.responses.create(instructions="Be short.", **asked)
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(**asked | {"input": "And in Rome?", "previous_response_id": first.id})
    said = {"role": "assistant", "content": first.output_text}
    whole: Any = [*ASKED, said, {"role": "user", "content": "And in Rome?"}]
    assert second.output_text == client.responses.create(**asked | {"input": whole}).output_text
    assert second.previous_response_id == first.id
    item: Any = {"type": "item_reference", "id": first.output[0].id}
    assert client.responses.create(**asked | {"input": [ASKED[0], item, whole[2]]}).output_text == second.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked | {"previous_response_id": first.id})
    assert caught.value.param == "previous_response_id"


# Anthropic's --------------------------------------------------------------------------------------

USE: Any = [{"name": "get_weather", "description": "The weather now.", "input_schema": WEATHER}]
MESSAGE: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "messages": ASKED, "extra_body": {"temperature": 0}}


@pytest.fixture
def claude(server: Deployment) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=stretched(60)) as made:
        yield made


def test_a_message_streamed_is_the_one_whole(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(system="Be short.", **MESSAGE)
    assert whole.type == "message"
    assert whole.stop_reason in ("end_turn", "max_tokens")
    # What another request has left in the cache is counted apart, as with Anthropic.
    assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) > 10
    with claude.messages.stream(system=[{"type": "text", "text": "Be short."}], **MESSAGE) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
    counted = claude.messages.count_tokens(model=MODEL, messages=ASKED, system="Be short.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_a_message_goes_on_with_what_the_assistant_began(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    begun: Any = [*ASKED, {"role": "assistant", "content": "The weather in Paris"}]
    answer = claude.messages.create(**MESSAGE | {"messages": begun, "max_tokens": 12}).content[0]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    chat = client.chat.completions.create(extra_body=going_on, **CHAT | {"messages": begun, "max_tokens": 12})
    assert answer.type == "text"
    assert answer.text == chat.choices[0].message.content


def test_a_message_stops_at_a_sequence(claude: anthropic.Anthropic) -> None:
    text = claude.messages.create(**MESSAGE).content[0]
    assert text.type == "text"
    word = text.text.split()[3]
    stopped = claude.messages.create(stop_sequences=[word], **MESSAGE)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_a_tool_is_used_and_its_result_goes_back(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"tools": USE, "tool_choice": {"type": "tool", "name": "get_weather"}, **MESSAGE}
    whole = claude.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    (use,) = whole.content
    assert use.type == "tool_use"
    assert use.name == "get_weather"
    assert set(use.input) == {"city", "unit"}  # type: ignore[call-overload]
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].input == use.input  # type: ignore[union-attr]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}
    back: Any = [*ASKED, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(tools=USE, **MESSAGE | {"messages": back, "max_tokens": 8})
    assert answer.content[0].type == "text"


def test_errors_are_anthropic_s(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**MESSAGE | {"max_tokens": 0})
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**MESSAGE | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(**MESSAGE | {"messages": [{"role": "user", "content": "word " * 5000}]})


# A rank dies --------------------------------------------------------------------------------------

LONG: dict[str, Any] = {
    "type": "array", "minItems": 12, "maxItems": 12, "items": {
        "type": "object", "required": ["name", "age"], "additionalProperties": False,
        "properties": {"name": {"type": "string", "minLength": 3, "maxLength": 12}, "age": {"enum": [1, 20, 300]}},
    },
}  # fmt: skip


def test_an_answer_of_a_form_goes_on_where_its_rank_dies(server: Deployment, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Persons:", "seed": 3, "temperature": 0.8, "max_tokens": 600,
                             "extra_body": {"guided_json": LONG}}  # fmt: skip
    whole = client.completions.create(**asked).choices[0].text
    raw = client.completions.with_raw_response.create(stream=True, **asked)
    stream = iter(raw.parse())
    text = "".join(next(stream).choices[0].text for _ in range(20))
    os.kill(server.pid_of(f"rank {raw.headers['x-data-parallel-rank']}"), signal.SIGKILL)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    assert len(json.loads(text)) == 12
