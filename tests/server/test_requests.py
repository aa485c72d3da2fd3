"""Fields and their checks, without a server."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from starlette.datastructures import Headers

from paceline.engines.base import EngineSettings
from paceline.engines.timed import ByteTokenizer
from paceline.server.errors import ApiError
from paceline.server.fields import (
    NOT_SUPPORTED,
    ChatCompletionRequest,
    CompletionRequest,
    Decoder,
    refuse_unsupported,
)
from paceline.server.openapi import openapi_document
from paceline.server.prompts import max_tokens_of, token_prompts
from paceline.server.requests import (
    Models,
    asks_why,
    sampling_params,
    session_of,
)

MODELS = Models(["timed"], ByteTokenizer(EngineSettings(max_model_len=100)), 100)
decode = Decoder(CompletionRequest).decode
decode_chat = Decoder(ChatCompletionRequest).decode


def params(**fields: Any) -> Any:
    return sampling_params(decode(msgspec.json.encode(fields)), None, MODELS)


def test_defaults_are_those_of_the_api() -> None:
    made = params()
    assert (made.temperature, made.top_p, made.top_k, made.min_p, made.seed) == (1.0, 1.0, 0, 0.0, None)
    assert (made.frequency_penalty, made.presence_penalty, made.repetition_penalty) == (0.0, 0.0, 1.0)


def test_nulls_are_defaults() -> None:
    request = decode(b'{"prompt": "a", "temperature": null, "stop": null, "n": null, "logit_bias": null}')
    assert sampling_params(request, None, MODELS).temperature == 1.0


def test_values_are_taken_over() -> None:
    made = params(temperature=0, stop="x", logit_bias={"7": -100}, top_k=-1, seed=-2, stop_token_ids=[3])
    assert (made.temperature, made.stop, made.logit_bias, made.top_k) == (0, ["x"], {7: -100.0}, 0)
    assert (made.seed, made.stop_token_ids) == (2**32 - 2, [3])


@given(st.integers().filter(lambda seed: seed != -1))
def test_any_seed_is_a_seed(seed: int) -> None:
    assert 0 <= params(seed=seed).seed < 2**32


def test_seed_minus_one_is_a_random_one() -> None:
    assert params(seed=-1).seed is None


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
    ("n", 10**400, "must be at most 1024"),
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
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 1024}
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def test_unknown_fields_are_refused_by_name_unless_told_otherwise() -> None:
    body = b'{"prompt": "a", "max_tokns": 3}'
    assert decode(body).prompt == "a"
    with pytest.raises(ApiError) as caught:
        Decoder(CompletionRequest, strict=True).decode(body)
    assert caught.value.body["error"]["param"] == "max_tokns"


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_what_is_not_here_is_refused_by_name_and_its_default_is_not(kind: Any) -> None:
    schema = openapi_document()["components"]["schemas"][kind.__name__]["properties"]
    fields = {
        name: one["enum"] for name, one in schema.items() if one.get("description") == NOT_SUPPORTED and "enum" in one
    }
    assert len(fields) > 15
    base = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "a"}]}
    for name, values in fields.items():
        for value in values:
            refuse_unsupported(Decoder(kind, strict=True).decode(msgspec.json.encode(base | {name: value})))
        with pytest.raises(ApiError) as caught:
            refuse_unsupported(Decoder(kind, strict=True).decode(msgspec.json.encode(base | {name: "other"})))
        assert caught.value.body["error"]["param"] == name


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert decode(b'{"prompt": "a", "max_tokens": 2.0}').max_tokens == 2
    with pytest.raises(ApiError, match="max_tokens"):
        decode(b'{"prompt": "a", "max_tokens": 2.5}')


@pytest.mark.parametrize("body", [b'{"prompt": "\\ud83d"}', b'{"prompt": "a", "user": "\\uDFFF x"}'])
def test_half_a_surrogate_pair_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="surrogate") as caught:
        decode(body)
    assert caught.value.status == 400


def test_bad_words_are_what_they_are_and_what_stands_behind_a_blank() -> None:
    assert params(bad_words=["ab"]).bad_words == [[97, 98], [32, 97, 98]]


def test_a_digit_is_an_ascii_digit() -> None:
    with pytest.raises(ApiError, match="logit_bias"):
        params(logit_bias={"\u0661": 1})


def test_what_the_model_recommends_is_the_default() -> None:
    models = msgspec.structs.replace(MODELS, defaults={"temperature": 0.2, "top_k": 40})
    made = sampling_params(decode(b'{"prompt": "a"}'), None, models)
    assert (made.temperature, made.top_k) == (0.2, 40)
    asked = sampling_params(decode(b'{"prompt": "a", "temperature": 1, "top_k": 0}'), None, models)
    assert (asked.temperature, asked.top_k) == (1, 0)


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


SUPPORTED = msgspec.structs.replace(MODELS, names=["timed", "tuned"], adapters=frozenset({"tuned"}))


def test_an_adapter_is_a_model_s_name() -> None:
    assert sampling_params(decode(b'{"model": "tuned"}'), None, SUPPORTED).adapter == "tuned"
    assert sampling_params(decode(b'{"model": "timed"}'), None, SUPPORTED).adapter == ""
    assert sampling_params(decode(b"{}"), None, SUPPORTED).adapter == ""
