"""Fields and their checks, without a server."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from starlette.datastructures import Headers

from paceline.server.errors import ApiError
from paceline.server.openapi import openapi_document
from paceline.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    Decoder,
    asks_why,
    max_tokens_of,
    sampling_params,
    session_of,
    token_prompts,
)

decode = Decoder(CompletionRequest).decode
decode_chat = Decoder(ChatCompletionRequest).decode


def params(**fields: Any) -> Any:
    return sampling_params(decode(msgspec.json.encode(fields)), logprobs=None, vocabulary_size=100)


def test_defaults_are_those_of_the_api() -> None:
    made = params()
    assert (made.temperature, made.top_p, made.top_k, made.min_p, made.seed) == (1.0, 1.0, 0, 0.0, None)
    assert (made.frequency_penalty, made.presence_penalty, made.repetition_penalty) == (0.0, 0.0, 1.0)


def test_nulls_are_defaults() -> None:
    request = decode(b'{"prompt": "a", "temperature": null, "stop": null, "n": null, "logit_bias": null}')
    assert sampling_params(request, logprobs=None, vocabulary_size=9).temperature == 1.0


def test_values_are_taken_over() -> None:
    made = params(temperature=0, stop="x", logit_bias={"7": -100}, top_k=-1, seed=-1, stop_token_ids=[3])
    assert (made.temperature, made.stop, made.logit_bias, made.top_k) == (0, ["x"], {7: -100.0}, 0)
    assert (made.seed, made.stop_token_ids) == (2**32 - 1, [3])


@given(st.integers())
def test_any_seed_is_a_seed(seed: int) -> None:
    assert 0 <= params(seed=seed).seed < 2**32


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_an_error_in_shape(body: bytes) -> None:
    for one in (decode, decode_chat):
        try:
            one(body)
        except ApiError as error:
            assert error.status == 400
            assert set(error.body["error"]) == {"message", "type", "param", "code"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(list(CompletionRequest.__struct_fields__)), json_values))
def test_any_json_is_a_request_or_names_a_field(fields: dict[str, Any]) -> None:
    try:
        decode(msgspec.json.encode(fields))
    except ApiError as error:
        assert error.param in fields or (error.param or "").split("[")[0].split(".")[0] in fields


RANGES = [
    ("n", 0, "must be at least 1"),
    ("n", 10**400, "must be at most 128"),
    ("temperature", 2.5, "must be at most 2"),
    ("top_p", 0, "must be more than 0"),
    ("top_k", -2, "must be at least -1"),
    ("priority", 2**40, "must be at most 2147483647"),
    ("logit_bias", {"1": 1, "2": 101}, "must be at most 100"),
    ("stop", "", "its length must be at least 1"),
    ("stop", ["a", ""], "its length must be at least 1"),
    ("stop", ["a"] * 17, "its length must be at most 16"),
]


@pytest.mark.parametrize(("field", "value", "text"), RANGES, ids=lambda value: str(value)[:20])
def test_a_value_out_of_its_type_s_range_is_told_the_bound(field: str, value: object, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(msgspec.json.encode({"prompt": "a", field: value}))
    assert (str(caught.value), caught.value.param) == (f"{field}: {text}", field)
    assert caught.value.body["error"]["code"] == "invalid_value"


def test_the_document_says_the_same_ranges() -> None:
    fields = openapi_document()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def test_unknown_fields_are_ignored() -> None:
    assert decode(b'{"prompt": "a", "brand_new": [1, 2]}').prompt == "a"


@pytest.mark.parametrize(
    ("asked", "default", "expected"), [(None, None, 90), (None, 16, 16), (None, 200, 90), (1, 16, 1), (90, 16, 90)]
)
def test_max_tokens(asked: int | None, default: int | None, expected: int) -> None:
    assert max_tokens_of("max_tokens", asked, default, 10, 100, "prompt") == expected


@pytest.mark.parametrize(("asked", "prompt", "param"), [(91, 10, "max_tokens"), (1, 100, "prompt")])
def test_max_tokens_that_cannot_be(asked: int, prompt: int, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        max_tokens_of("max_tokens", asked, None, prompt, 100, "prompt")
    assert caught.value.param == param


def test_prompts_of_tokens() -> None:
    assert token_prompts([1, 2], 100) == [[1, 2]]
    assert token_prompts([[1], [2, 3]], 100) == [[1], [2, 3]]
    assert token_prompts(["a", "b"], 100) == ["a", "b"]
    for wrong in ([], ["a", 1], [[1], "a"], [[]], [100], [[-1]], [""]):
        with pytest.raises(ApiError):
            token_prompts(wrong, 100)


# Headers ------------------------------------------------------------------------------------------


def headers(**values: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in values.items()})


@pytest.mark.parametrize(("said", "asked"), [("1", True), ("true", True), ("0", False), ("", False), ("yes", False)])
def test_what_asks_why(said: str, asked: bool) -> None:
    assert asks_why(headers(x_paceline_routing=said)) == asked
    assert not asks_why(headers())


def test_the_session_is_the_headers_before_the_users() -> None:
    assert session_of(headers(x_session_id="a"), "b") == "a"
    assert session_of(headers(), "b") == "b"
    assert session_of(headers(x_session_id=""), "b") == "b"
    assert session_of(headers(), None) is None
    assert session_of(headers(), "") is None
    assert len(session_of(headers(), "x" * 100_000) or "") == 512
