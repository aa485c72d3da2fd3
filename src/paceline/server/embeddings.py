"""`POST /v1/embeddings`: texts or token ids as vectors of length 1, by a deployment with `--task embed`.

Each input is a request to the ranks. A vector is worded when it comes, since many of them at once would hold up all
else.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from paceline.server.fields import NULL, TokenId, only
from paceline.server.formats import CompletionFormat, Entry


class EmbeddingsRequest(Struct, kw_only=True):
    """`input`: text, texts, token ids, or lists of token ids. `dimensions`: the first so many of the model's."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, description="-1 is the model's limit")] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    user: str | None = None
    request_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    # What would change an answer.
    messages: Annotated[Raw, only(None)] = NULL


class EmbeddingsFormat(CompletionFormat):
    """How `/v1/embeddings` words its response."""

    prefix = "embd-"
    object_name = "list"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        asked: EmbeddingsRequest = given[-1]
        self._dimensions, self._base64 = asked.dimensions, asked.encoding_format == "base64"

    def vector(self, data: bytes) -> Raw:
        values = array("f", data)
        if self._dimensions is not None and self._dimensions < len(values):
            values = unit(values[: self._dimensions])
        if self._base64:
            return Raw(msgspec.json.encode(base64.b64encode(values.tobytes()).decode()))
        return Raw(msgspec.json.encode(values.tolist()))

    def entry(self, index: int, text: Any, logprobs: Any, finish_reason: str | None) -> Entry:
        return {"object": "embedding", "index": index}

    def body(self, choices: list[Entry], total: Entry) -> bytes:
        kept = {name: self._whole[name] for name in ("id", "object", "created", "model")}
        for choice in choices:
            choice.pop("stop_reason", None)
        return msgspec.json.encode(kept | {"data": choices, "usage": total})

    def usage(self, made: int, cached: int) -> Entry:
        prompt = self.wording.prompt_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0}


def unit(values: Sequence[float]) -> array[float]:
    """The vector of length 1 in this direction."""
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return array("f", (value / length for value in values))
