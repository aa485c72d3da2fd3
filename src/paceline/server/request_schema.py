"""The JSON schemas of request bodies: made from the request types, with the ranges that `openai.py` checks beyond them.

What depends on the model (token ids, lengths), and on two fields together, no schema says.
"""

from __future__ import annotations

from typing import Any

import msgspec

from paceline.server.openai import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS, ChatCompletionRequest, CompletionRequest

Schema = dict[str, Any]
_STOP: Schema = {"minLength": 1, "maxLength": 4096}
_PENALTY: Schema = {"minimum": -2, "maximum": 2}
_TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_LOGPROBS: Schema = {"minimum": 0, "maximum": MAX_LOGPROBS}

# By field; a keyword says nothing of values that are not of its type, null among them.
_RANGES: dict[str, Schema] = {
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "temperature": {"minimum": 0, "maximum": 2},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repetition_penalty": {"exclusiveMinimum": 0},
    "logit_bias": {
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "stop": {**_STOP, "maxItems": MAX_STOPS, "items": {"type": "string", **_STOP}},
    "stop_token_ids": {"items": {"type": "integer", "minimum": 0}},
    "priority": {"minimum": -(2**31), "maximum": 2**31 - 1},
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "best_of": {"minimum": 1, "maximum": MAX_CHOICES, "description": "as n"},
    "suffix": {"maxLength": 0, "description": "not supported"},
    "tools": {"maxItems": 0, "description": "not supported"},
    "messages": {"minItems": 1},
}

_PROMPT: Schema = {
    "description": "text, texts, token ids, or lists of token ids",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {**_TOKEN_IDS, "minItems": 1},
        {"type": "array", "minItems": 1, "items": {**_TOKEN_IDS, "minItems": 1}},
    ],
}

_CONTENT: list[Schema] = [
    {"type": "string"},
    {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        },
    },
]
_NAME: Schema = {"type": "string"}
_MESSAGE: Schema = {
    "description": "text, or parts of text; only the assistant's may be left out",
    "anyOf": [
        {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"type": "string"}, "content": {"anyOf": _CONTENT}, "name": _NAME},
        },
        {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"const": "assistant"}, "content": {"anyOf": [*_CONTENT, {"type": "null"}]}, "name": _NAME,
            },
        },
    ],
}  # fmt: skip


def request_schemas() -> tuple[Schema, Schema, dict[str, Schema]]:
    """What refers to the schemas of a completion and of a chat completion, and the components that they refer to."""
    (completion, chat), components = msgspec.json.schema_components(
        [CompletionRequest, ChatCompletionRequest], ref_template="#/components/schemas/{name}"
    )
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        fields = components[name]["properties"]
        for field in fields.keys() & _RANGES.keys():
            fields[field] |= _RANGES[field]
    components["CompletionRequest"]["properties"]["prompt"] = _PROMPT
    components["CompletionRequest"]["required"] = ["prompt"]
    components["ResponseFormat"]["properties"]["type"] = {"const": "text"}
    return completion, chat, {**components, "ChatMessage": _MESSAGE}
