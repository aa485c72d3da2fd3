"""The document at `/openapi.json`, made from the request types themselves.

What depends on the model (token ids, lengths), and on two fields together, no schema says.
"""

from __future__ import annotations

from typing import Any

import msgspec

from paceline import __version__
from paceline.server.control import PauseQuery, ResumeQuery, ReviveQuery, RpcRequest, ScaleRequest, SleepQuery
from paceline.server.embeddings import EmbeddingsRequest
from paceline.server.feeds import LoadsQuery
from paceline.server.fields import ChatCompletionRequest, CompletionRequest
from paceline.server.messages import CountRequest, MessagesRequest
from paceline.server.openai_responses import ResponsesRequest
from paceline.server.timelines import RequestsQuery
from paceline.server.tokenize import DetokenizeRequest, TokenizeRequest

Schema = dict[str, Any]


# Schemas ------------------------------------------------------------------------------------------


def _type(name: str | list[str], **more: Any) -> Schema:
    return {"type": name} | more


def _object(required: str = "", **properties: Schema) -> Schema:
    return _type("object", **({"required": required.split()} if required else {}), properties=properties)


def _list(items: Schema, **more: Any) -> Schema:
    return _type("array", items=items, **more)


_TEXT = _type("string")
_MAYBE_TEXT = _type(["string", "null"])
_ERROR = _object(
    "error",
    error=_object("message type", message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT),
)
_SOME_TEXT = _type("string", minLength=1)
_SOME_IDS = _list(_type("integer", minimum=0), minItems=1)
_PROMPT = {
    "description": "text, texts, token ids, or lists of token ids",
    "anyOf": [_SOME_TEXT, _list(_SOME_TEXT, minItems=1), _SOME_IDS, _list(_SOME_IDS, minItems=1)],
}
_CONTENT = [_TEXT, _list(_object("type text", type={"const": "text"}, text=_TEXT))]
_MESSAGE = {
    "description": "text, or parts of text; only the assistant's may be left out",
    "anyOf": [
        _object("role content", role=_TEXT, content={"anyOf": _CONTENT}, name=_TEXT),
        _object("role", role={"const": "assistant"}, content={"anyOf": [*_CONTENT, _type("null")]}, name=_TEXT),
    ],
}


def _components() -> dict[str, Schema]:
    """The schemas of request bodies, by name. Some types say less than is checked."""
    types = [
        CompletionRequest, ChatCompletionRequest, EmbeddingsRequest, ResponsesRequest, MessagesRequest, CountRequest,
        ScaleRequest, RpcRequest, TokenizeRequest, DetokenizeRequest,
    ]  # fmt: skip
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    completion = components["CompletionRequest"]
    completion["properties"]["prompt"] = _PROMPT
    completion["required"] = ["prompt"]
    components["EmbeddingsRequest"]["properties"]["input"] = _PROMPT
    return components | {"ChatMessage": _MESSAGE, "Error": _ERROR}


# Parameters ---------------------------------------------------------------------------------------


def _parameter(where: str, name: str, description: str, schema: Schema) -> Schema:
    return {"name": name, "in": where, "required": False, "description": description, "schema": schema}


def _query(kind: type) -> list[Schema]:
    """The parameters of a query, from its type."""
    properties = msgspec.json.schema_components([kind])[1][kind.__name__]["properties"]
    return [_parameter("query", name, schema.pop("description"), schema) for name, schema in properties.items()]


_REQUEST_ID = _parameter("header", "X-Request-Id", "comes back in the answer's header of this name", _TEXT)
_WHY = "1 asks for the response header of this name: what the choice of the rank was based on"
_SESSION = "the session's key: its requests go to one rank; without it `session_id`, `prompt_cache_key` or `user`"
_TENANT = "whose it is: tenants share the queue by --tenant-weight; with several API keys each key is one instead"
_DEADLINE = "milliseconds: 429 at once, or while it waits, where the answer could not be there by then"
_RESPONSE_ID = {"name": "response_id", "in": "path", "required": True, "schema": _TEXT}
_REQUEST_NAME = {"name": "request_id", "in": "path", "required": True, "schema": _TEXT}
_GENERATION_HEADERS = [
    _parameter("header", "X-data-parallel-rank", "the rank that shall serve the request", _type("integer", minimum=0)),
    _parameter("header", "X-Session-Id", _SESSION, _TEXT),
    _parameter("header", "X-Tenant", _TENANT, _TEXT),
    _parameter("header", "X-Request-Deadline-Ms", _DEADLINE, _type("integer", minimum=1)),
    _parameter("header", "X-Paceline-Routing", _WHY, _type("string", enum=["1", "true"])),
    _REQUEST_ID,
]


# Answers ------------------------------------------------------------------------------------------

_FAILURES = {
    400: "a field is wrong; `param` names it",
    404: "no such model",
    409: "a later call asked for the contrary, or the deployment is being scaled already",
    413: "the body is larger than --max-body-bytes",
    429: "too many requests wait; see Retry-After",
    500: "the rank failed",
    503: "draining, suspended, or no rank is ready; see Retry-After",
    504: "not done in the time given; names the ranks that it waits for",
}
_RETRY = {"Retry-After": {"schema": _TEXT, "description": "seconds"}}
_OK = {"description": "OK", "content": {"application/json": {"schema": _type("object")}}}
_PLAIN = {"description": "OK", "content": {"text/plain": {"schema": _TEXT}}}
_GENERATED = {
    "description": "the answer; with `stream`, server-sent events that end with `[DONE]`",
    "headers": {
        "X-data-parallel-rank": {"schema": _TEXT, "description": "the rank that served it"},
        "X-Paceline-Routing": {"schema": _TEXT, "description": "a JSON array, where asked for"},
    },
    "content": {"application/json": {"schema": _type("object")}, "text/event-stream": {}},
}


def _failure(status: int) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    headers = {"headers": _RETRY} if status in (429, 503) else {}
    return {"description": _FAILURES[status], **headers, "content": content}


def _operation(
    summary: str, *failures: int, ok: Schema = _OK, parameters: list[Schema] | None = None, body: str = "",
    down: str = "",
) -> Schema:  # fmt: skip
    """One method of one path. `body`: a component; `down`: what an answer 503 of `ok`'s kind says."""
    operation = {
        "summary": summary,
        "parameters": [_REQUEST_ID] if parameters is None else parameters,
        "responses": {"200": ok} | {str(status): _failure(status) for status in failures},
    }
    if body:
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if down:
        operation["responses"]["503"] = ok | {"description": down}  # type: ignore[index]
    return operation


def _generation(summary: str, body: str) -> Schema:
    failures = (400, 404, 413, 429, 500, 503)
    return {"post": _operation(summary, *failures, ok=_GENERATED, parameters=_GENERATION_HEADERS, body=body)}


def _control(summary: str, query: type, *failures: int) -> Schema:
    return {"post": _operation(summary, 400, 409, 504, *failures, parameters=[*_query(query), _REQUEST_ID])}


def openapi_document() -> Schema:
    """The OpenAPI 3.1 document of this server."""
    down = "draining, or no rank is ready, or one holds the group up; `status` says which"
    scale = "Have more ranks or fewer while requests are served"
    rpc = "Have the workers of all ranks, or of those that are named, do something"
    is_scaling = _operation("Whether ranks come or go, and which are waited for")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paceline", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/v1/completions": _generation("Complete one or more prompts", "CompletionRequest"),
            "/v1/chat/completions": _generation("Answer a conversation", "ChatCompletionRequest"),
            "/v1/embeddings": _generation("Texts as vectors (--task embed)", "EmbeddingsRequest"),
            "/tokenize": {"post": _operation("The tokens of a text", 400, 404, 413, body="TokenizeRequest")},
            "/detokenize": {"post": _operation("The text of tokens", 400, 404, 413, body="DetokenizeRequest")},
            "/tokenizer_info": {"get": _operation("The special tokens, and the chat template")},
            "/livez": {"get": _operation("Whether the process turns")},
            "/readyz": {"get": _operation("Whether new requests are served", down="not now; `status` says why")},
            "/startupz": {"get": _operation("Whether it has started")},
            "/load": {"get": _operation("Requests of this front-end that are not answered yet")},
            "/server_info": {"get": _operation("What is served, and what its engine supports")},
            "/v1/responses": _generation("Answer items, in OpenAI's newer API", "ResponsesRequest"),
            "/v1/responses/{response_id}": {
                "get": _operation("A response that is kept", 400, 404, parameters=[_RESPONSE_ID]),
                "delete": _operation("Keep a response no more", 404, parameters=[_RESPONSE_ID]),
            },
            "/v1/messages": _generation("Answer messages, in Anthropic's API", "MessagesRequest"),
            "/v1/messages/count_tokens": {
                "post": _operation("The tokens of a prompt of messages", 400, 404, 413, body="CountRequest")
            },
            "/v1/models": {"get": _operation("The model that is served")},
            "/health": {"get": _operation("Whether requests are served", down=down)},
            "/loads": {
                "get": _operation(
                    "Every rank's load, as this front-end believes it", 400, parameters=_query(LoadsQuery)
                )
            },
            "/requests": {"get": _operation("Where requests' time went", 400, parameters=_query(RequestsQuery))},
            "/requests/{request_id}": {"get": _operation("One's timeline", 404, parameters=[_REQUEST_NAME])},
            "/metrics": {"get": _operation("Figures for Prometheus, of the whole deployment", ok=_PLAIN)},
            "/pause": _control("Suspend all ranks, and wait until none computes", PauseQuery),
            "/revive": _control("Start ranks again that ended too often, and wait until they serve", ReviveQuery),
            "/resume": _control("Let all ranks go on, and wait until all do", ResumeQuery),
            "/sleep": _control("Suspend all ranks, and have their engines give memory back", SleepQuery, 500, 503),
            "/wake_up": {"post": _operation("Have the engines take it again, and all go on", 500, 503, 504)},
            "/is_sleeping": {"get": _operation("Whether each rank's engine has given memory back", 500, 503, 504)},
            "/reset_prefix_cache": {"post": _operation("Have the engines forget what they cache", 500, 503, 504)},
            "/collective_rpc": {"post": _operation(rpc, 400, 413, 500, 503, 504, body="RpcRequest")},
            "/is_paused": {"get": _operation("Whether all ranks are suspended")},
            "/scale_elastic_ep": {"post": _operation(scale, 400, 409, 413, 500, 504, body="ScaleRequest")},
            "/is_scaling_elastic_ep": {"get": is_scaling, "post": is_scaling},
            "/version": {"get": _operation("The version of this server")},
        },
        "components": {"schemas": _components()},
    }
