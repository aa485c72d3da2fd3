"""What form an answer must have, as OpenAI's and vLLM's fields say it, and the tools that an answer may call.

`response_format`, `structured_outputs` and vLLM's older `guided_*` are ways to say one thing, so that of all of them
one may be there. It is checked here, before a rank has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import msgspec

from paceline.core.requests import StructuredOutput
from paceline.engines.grammars import check_form
from paceline.server.errors import bad
from paceline.server.fields import ChatCompletionRequest, GenerationRequest, NamedTool, ResponseFormat

MOST_OF_A_FORM = 65_536
"""Characters of a schema, an expression or a grammar, which a rank reads between two steps."""
ANY_OBJECT = '{"type":"object"}'


def structured_output(request: GenerationRequest) -> StructuredOutput | None:
    """The form that the request asks for. Raises ApiError naming the field."""
    found = _asked(request)
    if isinstance(request, ChatCompletionRequest) and (forced := forced_calls(request)) is not None:
        found.insert(0, ("tool_choice", forced))
    if len(found) > 1:
        raise bad(found[1][0], f"cannot be combined with {found[0][0]}")
    if not found:
        return None
    param, form = found[0]
    return checked(param, form)


def checked(param: str, form: StructuredOutput) -> StructuredOutput:
    """A form that is one. Raises ApiError naming the field."""
    if len(form.text) > MOST_OF_A_FORM:
        raise bad(param, f"is longer than {MOST_OF_A_FORM} characters")
    try:
        check_form(form)
    except ValueError as error:
        raise bad(param, str(error)) from None
    return form


def _asked(request: GenerationRequest) -> list[tuple[str, StructuredOutput]]:
    """Each form that the request asks for, with its field."""
    found = _of_format(request.response_format) if request.response_format is not None else []
    said = request.structured_outputs
    ways: dict[str, tuple[Any, Any, Any, Any]] = {
        "guided_": (request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar)
    }
    if said is not None:
        ways["structured_outputs."] = (said.json, said.regex, said.choice, said.grammar)
        if said.json_object:
            found.append(("structured_outputs.json_object", StructuredOutput("json", ANY_OBJECT)))
    for prefix, (schema, regex, choice, grammar) in ways.items():
        if schema is not None:
            found.append((prefix + "json", StructuredOutput("json", _schema(schema))))
        if regex is not None:
            found.append((prefix + "regex", StructuredOutput("regex", regex)))
        if choice is not None:
            found.append((prefix + "choice", StructuredOutput("choice", msgspec.json.encode(choice).decode())))
        if grammar is not None:
            found.append((prefix + "grammar", StructuredOutput("grammar", grammar)))
    return found


def _schema(schema: Any) -> str:
    """A JSON schema, which may be text already, as text, closed where it can be."""
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        schema = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        schema = schema if _composed(schema) else _closed(schema)
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()


MAPS = ("properties", "patternProperties", "$defs", "definitions")
"""Words of a schema under which each name has a schema; under `DATA` there is none."""
DATA = ("enum", "const", "default", "examples", "required")
BESIDE = {"$ref", "anyOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties"}


def _closed(schema: Any) -> Any:
    """With no properties but those that it names, unless it says something of others: as vLLM's default does, since a
    model would write more and more of them. What is made so is valid by the schema as it was.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for word, value in schema.items():
        if word in MAPS and isinstance(value, dict):
            made[word] = {name: _closed(one) for name, one in value.items()}
        else:
            made[word] = value if word in DATA else _closed(value)
    if isinstance(schema.get("properties"), dict) and "patternProperties" not in schema:
        made.setdefault("additionalProperties", False)
    return made


def _composed(schema: Any) -> bool:
    """Whether several parts of it may speak of one object, none of which names all its properties."""
    if isinstance(schema, list):
        return any(map(_composed, schema))
    if not isinstance(schema, dict):
        return False
    here = "allOf" in schema or ("properties" in schema and not BESIDE.isdisjoint(schema))
    return here or any(map(_composed, schema.values()))


def _of_format(asked: ResponseFormat) -> list[tuple[str, StructuredOutput]]:
    if asked.type == "text":
        return []
    if asked.type == "json_object":
        return [("response_format", StructuredOutput("json", ANY_OBJECT))]
    if asked.type != "json_schema":
        raise bad("response_format.type", "must be text, json_object or json_schema", "unsupported")
    if asked.json_schema is None:
        raise bad("response_format.json_schema", "is required")
    schema = asked.json_schema.schema
    return [("response_format.json_schema.schema", StructuredOutput("json", _schema({} if schema is None else schema)))]


# Tools --------------------------------------------------------------------------------------------

MOST_FORCED_CALLS = 16
"""A weak model would call until its answer is full."""


def check_tools(request: ChatCompletionRequest, supports: Collection[str]) -> None:
    """Raises ApiError where what is said of tools cannot be."""
    choice, names = request.tool_choice, [tool.function.name for tool in request.tools or []]
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise bad("tool_choice", "needs tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad("tool_choice", f"names {choice.function.name[:64]!r}, which is none of the tools")
    if "structured_outputs" not in supports:
        raise bad("tool_choice", "other than none and auto is not supported by this engine", "unsupported")


def forced_calls(request: ChatCompletionRequest) -> StructuredOutput | None:
    """The form of an answer that must be calls: a list of objects, each with a tool's name and its arguments."""
    choice, tools = request.tool_choice, request.tools or []
    if choice in (None, "none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name][:1]
    definitions, calls = {}, []
    for place, tool in enumerate(tools):
        parameters = tool.function.parameters or {"type": "object", "properties": {}}
        definitions[f"p{place}"] = {"type": "object", **_moved(parameters, f"#/$defs/p{place}")}
        properties = {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/p{place}"}}
        calls.append({
            "type": "object", "properties": properties, "required": ["name", "arguments"],
            "additionalProperties": False,
        })  # fmt: skip
    one = isinstance(choice, NamedTool) or request.parallel_tool_calls is False
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": definitions}
    return StructuredOutput("json", _schema(schema | {"maxItems": 1 if one else MOST_FORCED_CALLS}))


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another: what it says of itself is found there."""
    if isinstance(schema, dict):
        return {
            key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }  # fmt: skip
    return [_moved(value, root) for value in schema] if isinstance(schema, list) else schema
