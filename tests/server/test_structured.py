"""The fields that say an answer's form: one of them, checked, by name."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from starlette.datastructures import Headers

from paceline.core.requests import StructuredOutput
from paceline.engines.base import EngineSettings
from paceline.engines.timed import ByteTokenizer
from paceline.server.errors import ApiError
from paceline.server.fields import ChatCompletionRequest, CompletionRequest, Decoder
from paceline.server.requests import Models, Preparer, check_supported
from paceline.server.structured import MOST_FORCED_CALLS, MOST_OF_A_FORM, check_tools, structured_output

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA | {"additionalProperties": False}, separators=(",", ":"))
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
JSON, ANY = StructuredOutput("json", TEXT), StructuredOutput("json", '{"type":"object"}')
ASKED: list[tuple[dict[str, Any], StructuredOutput | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        JSON,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, JSON),
    ({"structured_outputs": {"json": TEXT}}, JSON),
    ({"structured_outputs": {"json_object": True}}, ANY),
    ({"structured_outputs": {"regex": "a+"}}, StructuredOutput("regex", "a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput("choice", '["a","b"]')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput("grammar", 'start: "a"')),
    ({"guided_json": SCHEMA}, JSON),
    ({"guided_regex": "a+"}, StructuredOutput("regex", "a+")),
    ({"guided_choice": ["a", "b"]}, StructuredOutput("choice", '["a","b"]')),
    ({"guided_grammar": 'root ::= "a"'}, StructuredOutput("grammar", 'root ::= "a"')),
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objec"}}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ({"guided_regex": "a" * (MOST_OF_A_FORM + 1)}, "guided_regex"),
    ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
]


def decoded(fields: dict[str, Any]) -> CompletionRequest:
    return Decoder(CompletionRequest).decode(msgspec.json.encode({"prompt": "a", **fields}))


@pytest.mark.parametrize(("fields", "form"), ASKED, ids=lambda value: str(value)[:40])
def test_every_way_of_asking_is_one_form(fields: dict[str, Any], form: StructuredOutput | None) -> None:
    assert structured_output(decoded(fields)) == form


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        structured_output(decoded(fields))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(("fields", "form"), ASKED, ids=lambda value: str(value)[:40])
def test_an_engine_without_it_refuses_by_name(fields: dict[str, Any], form: StructuredOutput | None) -> None:
    tokenizer = ByteTokenizer(EngineSettings(max_model_len=100))
    able = Models(["timed"], tokenizer, 100, frozenset({"structured_outputs"}))
    check_supported(decoded(fields), able)
    unable = msgspec.structs.replace(able, supports=frozenset())
    if form is None:
        check_supported(decoded(fields), unable)
        return
    with pytest.raises(ApiError) as caught:
        check_supported(decoded(fields), unable)
    assert caught.value.param == next(iter(fields))


# Tools --------------------------------------------------------------------------------------------

PLACE = {"type": "object", "properties": {"at": {"$ref": "#/$defs/spot"}}, "$defs": {"spot": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "now"}}


def asked(**fields: Any) -> ChatCompletionRequest:
    body = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, **fields}
    return Decoder(ChatCompletionRequest, strict=True).decode(msgspec.json.encode(body))


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_calls_that_need_not_be_have_no_form(choice: str | None) -> None:
    assert structured_output(asked(tool_choice=choice)) is None


@pytest.mark.parametrize(
    ("fields", "names", "most"),
    [
        ({"tool_choice": "required"}, ["weather", "now"], MOST_FORCED_CALLS),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["weather", "now"], 1),
        ({"tool_choice": NAMED}, ["now"], 1),
    ],
)
def test_calls_that_must_be_are_a_form(fields: dict[str, Any], names: list[str], most: int) -> None:
    form = structured_output(asked(**fields))
    assert form is not None
    schema = json.loads(form.text)
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == names
    assert (schema["minItems"], schema["maxItems"]) == (1, most)
    if len(names) == 2:
        assert schema["$defs"]["p0"]["properties"]["at"]["$ref"] == "#/$defs/p0/$defs/spot"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required", "tools": []},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
    ],
)
def test_a_choice_that_cannot_be_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        check_tools(asked(**fields), {"structured_outputs"})
    assert caught.value.param == "tool_choice"


def test_an_engine_without_forms_takes_no_choice_that_forces() -> None:
    check_tools(asked(tool_choice="auto"), set())
    with pytest.raises(ApiError, match="not supported by this engine"):
        check_tools(asked(tool_choice="required"), set())


def test_a_tool_whose_schema_is_none_is_told_where_it_matters() -> None:
    wrong = [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": {"type": "objec"}}}}}]
    assert structured_output(asked(tools=wrong)) is None
    with pytest.raises(ApiError, match="objec"):
        structured_output(asked(tools=wrong, tool_choice="required"))


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "properties": {"type": "object"}}}


def schema_of(schema: Any, **fields: Any) -> Any:
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, **fields}
    form = structured_output(Decoder(ChatCompletionRequest).decode(json.dumps(HELLO | asked).encode()))
    assert form is not None
    return json.loads(form.text)


def test_an_object_has_no_properties_but_those_that_are_named() -> None:
    assert schema_of(PERSON) == PERSON | {"additionalProperties": False}
    assert schema_of({"anyOf": [PERSON], "$defs": {"p": PERSON}}) == {
        "anyOf": [PERSON | {"additionalProperties": False}], "$defs": {"p": PERSON | {"additionalProperties": False}}
    }  # fmt: skip
    text = structured_output(Decoder(ChatCompletionRequest).decode(
        json.dumps(HELLO | {"guided_json": json.dumps(PERSON)}).encode()))  # fmt: skip
    assert text is not None
    assert json.loads(text.text)["additionalProperties"] is False


@pytest.mark.parametrize(
    "schema",
    [
        PERSON | {"additionalProperties": {"type": "integer"}},
        {"allOf": [PERSON, {"type": "object", "properties": {"age": {}}}]},
        {"$defs": {"p": PERSON}, "type": "object", "properties": {"a": {}}, "$ref": "#/$defs/p"},
        {"type": "object"},
        {"enum": [{"properties": {}}], "default": PERSON},
        {"patternProperties": {"^a": {}}, "properties": {"b": {}}},
    ],
)
def test_a_schema_that_says_what_else_there_may_be_stays(schema: Any) -> None:
    assert schema_of(schema) == schema


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_a_body_however_deep_is_prepared_or_an_error(depth: int) -> None:
    deep = '{"properties":{"a":' * depth + "{}" + "}}" * depth
    tools = f'"tools":[{{"function":{{"name":"f","parameters":{deep}}}}}]'
    tokenizer = ByteTokenizer(EngineSettings())
    preparer = Preparer(Models(["timed"], tokenizer, 65536, frozenset({"structured_outputs"})))
    for fields in (f'"guided_json":{deep}', f'{tools},"tool_choice":"required"', tools, f'"documents":[{deep}]',
                   f'"chat_template_kwargs":{{"a":{deep}}},"n":1.0'):  # fmt: skip
        body = f"{json.dumps(HELLO)[:-1]},{fields}}}".encode()
        try:
            asyncio.run(preparer.apart(ChatCompletionRequest, body, Headers({}), "1"))
        except ApiError as error:
            assert error.status == 400
