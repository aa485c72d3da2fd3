"""The document at `/openapi.json`, made from the request types themselves."""

from __future__ import annotations

from typing import Any

from paceline import __version__
from paceline.server.request_schema import request_schemas
from paceline.server.scale import DRAIN_TIMEOUT_S, LONGEST_TIMEOUT_S, STARTUP_TIMEOUT_S

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_RANK_HEADER = {
    "name": "X-data-parallel-rank",
    "in": "header",
    "required": False,
    "description": "the rank that shall serve the request",
    "schema": {"type": "integer", "minimum": 0},
}

_SESSION_HEADER = {
    "name": "X-Session-Id",
    "in": "header",
    "required": False,
    "description": "the session's key for --routing session; without it, `user` is",
    "schema": {"type": "string"},
}

_ROUTING_HEADER = {
    "name": "X-Paceline-Routing",
    "in": "header",
    "required": False,
    "description": "1 asks for the response header of this name: what the choice of the rank was based on",
    "schema": {"type": "string", "enum": ["1", "true"]},
}

_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "comes back in the answer's header of this name",
    "schema": {"type": "string"},
}

_RETRY = {"Retry-After": {"schema": {"type": "string"}, "description": "seconds"}}

_FAILURES = {
    "400": "a field is wrong; `param` names it",
    "404": "no such model",
    "409": "a later call asked for the contrary, or the deployment is being scaled already",
    "413": "the body is larger than --max-body-bytes",
    "429": "too many requests wait; see Retry-After",
    "500": "the rank failed",
    "503": "draining, suspended, or no rank is ready; see Retry-After",
    "504": "not done in the time given; names the ranks that it waits for",
}

_GENERATION_FAILURES = ("400", "404", "413", "429", "500", "503")

_MODE = {
    "name": "mode",
    "in": "query",
    "required": False,
    "description": "what becomes of requests: kept as they are, waited for, or aborted",
    "schema": {"type": "string", "enum": ["keep", "wait", "abort"], "default": "abort"},
}

_TIMEOUT = {
    "name": "timeout",
    "in": "query",
    "required": False,
    "description": "seconds to wait; 60, or 600 with mode=wait, where it is left out",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
}


_SCALE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["new_data_parallel_size"],
    "properties": {
        "new_data_parallel_size": {
            "type": "integer",
            "minimum": 1,
            "description": "ranks that the deployment is to have, up to --max-data-parallel-size",
        },
        "drain_timeout": {
            "type": "number",
            "minimum": 0,
            "maximum": LONGEST_TIMEOUT_S,
            "default": DRAIN_TIMEOUT_S,
            "description": "seconds that ranks which leave get; what they have then goes on at others",
        },
        "startup_timeout": {
            "type": "number",
            "minimum": 0,
            "maximum": LONGEST_TIMEOUT_S,
            "default": STARTUP_TIMEOUT_S,
            "description": "seconds that new ranks get to load, or all is as it was",
        },
    },
}


def _failure(status: str) -> dict[str, Any]:
    return {
        "description": _FAILURES[status],
        **({"headers": _RETRY} if status in ("429", "503") else {}),
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


def _generation(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    answer = {
        "description": "the answer; with `stream`, server-sent events that end with `[DONE]`",
        "headers": {
            "X-data-parallel-rank": {"schema": {"type": "string"}, "description": "the rank that served it"},
            "X-Paceline-Routing": {"schema": {"type": "string"}, "description": "a JSON array, where asked for"},
        },
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
    return {
        "post": {
            "summary": summary,
            "parameters": [_RANK_HEADER, _SESSION_HEADER, _ROUTING_HEADER, _REQUEST_ID],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": answer} | {status: _failure(status) for status in _GENERATION_FAILURES},
        }
    }


def _plain(summary: str, *failures: str) -> dict[str, Any]:
    ok = {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "get": {
            "summary": summary,
            "parameters": [_REQUEST_ID],
            "responses": {"200": ok} | {status: _failure(status) for status in failures},
        }
    }


def _health() -> dict[str, Any]:
    entry = _plain("Whether requests are served")["get"]
    answer = entry["responses"]["200"]
    down = answer | {"description": "draining, or no rank is ready, or one holds the group up; `status` says which"}
    return {"get": entry | {"responses": {"200": answer, "503": down}}}


def _control(summary: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    entry = _plain(summary, "400", "409", "504")["get"]
    return {"post": entry | {"parameters": [*parameters, _REQUEST_ID]}}


def _scaling() -> dict[str, Any]:
    entry = _plain("Have more ranks or fewer while requests are served", "400", "409", "413", "500", "504")["get"]
    body = {"required": True, "content": {"application/json": {"schema": _SCALE}}}
    return {"post": entry | {"requestBody": body}}


def _is_scaling() -> dict[str, Any]:
    entry = _plain("Whether ranks come or go, and which are waited for")["get"]
    return {"get": entry, "post": entry}


def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of this server."""
    completion, chat, components = request_schemas()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paceline", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": {
            "/v1/completions": _generation("Complete one or more prompts", completion),
            "/v1/chat/completions": _generation("Answer a conversation", chat),
            "/v1/models": _plain("The model that is served"),
            "/health": _health(),
            "/loads": _plain("What every rank has queued, as this front-end believes it"),
            "/pause": _control("Suspend all ranks, and wait until none computes", _MODE, _TIMEOUT),
            "/resume": _control("Let all ranks go on, and wait until all do", _TIMEOUT),
            "/is_paused": _plain("Whether all ranks are suspended"),
            "/scale_elastic_ep": _scaling(),
            "/is_scaling_elastic_ep": _is_scaling(),
            "/version": _plain("The version of this server"),
        },
        "components": {"schemas": components | {"Error": _ERROR}},
    }
