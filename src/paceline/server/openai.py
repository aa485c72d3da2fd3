"""The OpenAI API's requests: their fields, and the checks that name the field that is wrong.

Types are checked by the decoder, ranges here. What a field means follows the OpenAI API reference, and for
the fields it does not have (`top_k`, `min_p`, `ignore_eos`, …) vLLM's sampling parameters. A field that would
change the answer and that we cannot honour is refused, never ignored; unknown fields are ignored, as both do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from paceline.core.requests import SamplingParams
from paceline.server.errors import ApiError, bad

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16

T = TypeVar("T")


class StreamOptions(Struct):
    include_usage: bool | None = None


class ResponseFormat(Struct):
    type: str = "text"


class GenerationRequest(Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    user: str | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatMessage(Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | UnsetType = UNSET


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool = True


class BodyDecoder(Generic[T]):
    """JSON bodies of one kind of request. `decode` raises ApiError naming the field."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            text = str(error)
            found = re.search(r" - at `(key in )?\$\.?(.*?)`", text)
            missing = re.search(r"missing required field `(\w+)`", text)
            names = [found.group(2) if found else "", missing.group(1) if missing else ""]
            param = ".".join(name for name in names if name)
            reason = re.sub(r" - at `.*`$", "", text)
            raise ApiError(400, f"{param or 'body'}: {reason}", param=param or None, code="invalid_type") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def sampling_params(
    request: GenerationRequest, *, max_tokens: int, logprobs: int | None, vocabulary_size: int
) -> SamplingParams:
    """The checked sampling parameters of a request. Raises ApiError naming the field."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_in_range("temperature", request.temperature, 1.0, 0.0, 2.0),
        top_p=_top_p(request.top_p),
        top_k=_top_k(request.top_k),
        min_p=_in_range("min_p", request.min_p, 0.0, 0.0, 1.0),
        seed=None if request.seed is None else request.seed % 2**32,
        frequency_penalty=_in_range("frequency_penalty", request.frequency_penalty, 0.0, -2.0, 2.0),
        presence_penalty=_in_range("presence_penalty", request.presence_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=_repetition_penalty(request.repetition_penalty),
        logit_bias=_logit_bias(request.logit_bias, vocabulary_size),
        stop=_stop(request.stop),
        stop_token_ids=_token_ids("stop_token_ids", request.stop_token_ids or [], vocabulary_size),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        skip_special_tokens=request.skip_special_tokens,
    )


def choices_of(request: GenerationRequest) -> int:
    """The checked `n`."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise bad("n", f"must be 1 to {MAX_CHOICES}, not {n}")
    return n


def check_supported(request: GenerationRequest) -> None:
    """Refuse what would change the answer and is not here."""
    if request.response_format is not None and request.response_format.type != "text":
        raise bad("response_format", f"{request.response_format.type!r} is not supported, only 'text'", "unsupported")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options", "is only allowed with stream")
    if not -(2**31) <= request.priority < 2**31:
        raise bad("priority", "must be a 32-bit number")
    if isinstance(request, CompletionRequest):
        if request.suffix:
            raise bad("suffix", "is not supported", "unsupported")
        if request.best_of is not None and request.best_of != choices_of(request):
            raise bad("best_of", "other than n is not supported", "unsupported")
        if request.echo and request.logprobs is not None:
            raise bad("echo", "together with logprobs is not supported", "unsupported")
    if isinstance(request, ChatCompletionRequest):
        if request.tools:
            raise bad("tools", "is not supported", "unsupported")
        if request.max_tokens is not None and request.max_completion_tokens is not None \
                and request.max_tokens != request.max_completion_tokens:  # fmt: skip
            raise bad("max_tokens", "contradicts max_completion_tokens")


def completion_logprobs(request: CompletionRequest) -> int | None:
    """How many alternatives a completion asks for, or None for no logprobs."""
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise bad("logprobs", f"must be 0 to {MAX_LOGPROBS}, not {request.logprobs}")
    return request.logprobs


def chat_logprobs(request: ChatCompletionRequest) -> int | None:
    """Likewise for a chat completion."""
    top = request.top_logprobs
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise bad("top_logprobs", f"must be 0 to {MAX_LOGPROBS}, not {top}")
    if top and not request.logprobs:
        raise bad("top_logprobs", "needs logprobs to be true")
    return (top or 0) if request.logprobs else None


def max_tokens_of(
    param: str, asked: int | None, default: int | None, prompt_tokens: int, limit: int, prompt_param: str
) -> int:
    """The checked number of tokens to make. `limit`: tokens of prompt and answer together."""
    left = limit - prompt_tokens
    if left < 1:
        raise ApiError(
            400,
            f"the prompt is {prompt_tokens} tokens long; prompt and answer together may have {limit}",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked < 1:
        raise bad(param, f"must be at least 1, not {asked}")
    if asked > left:
        text = f"{asked} is too large: the prompt has {prompt_tokens} tokens of {limit} for prompt and answer together"
        raise bad(param, text, "context_length_exceeded")
    return asked


def token_prompts(prompt: Sequence[Any], vocabulary_size: int) -> list[str | list[int]]:
    """A `prompt` that is a list, as prompts of text or token ids. Raises ApiError."""
    if not prompt:
        raise bad("prompt", "must not be empty")
    if all(isinstance(part, int) for part in prompt):
        return [_token_ids("prompt", list(prompt), vocabulary_size)]
    prompts: list[str | list[int]] = []
    for place, part in enumerate(prompt):
        if not part:
            raise bad(f"prompt[{place}]", "must not be empty")
        if isinstance(part, int) or type(part) is not type(prompt[0]):
            raise bad(f"prompt[{place}]", "prompts must be all text, or all token ids")
        prompts.append(part if isinstance(part, str) else _token_ids(f"prompt[{place}]", part, vocabulary_size))
    return prompts


def _in_range(param: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise bad(param, f"must be {low:g} to {high:g}, not {value:g}")
    return value


def _top_p(value: float | None) -> float:
    if value is not None and not 0.0 < value <= 1.0:
        raise bad("top_p", f"must be more than 0 and at most 1, not {value:g}")
    return 1.0 if value is None else value


def _top_k(value: int | None) -> int:
    if value is None or value in (0, -1):
        return 0
    if not 1 <= value < 2**31:
        raise bad("top_k", f"must be at least 1, or 0 or -1 for all, not {value}")
    return value


def _repetition_penalty(value: float | None) -> float:
    if value is not None and not (value > 0.0 and math.isfinite(value)):
        raise bad("repetition_penalty", f"must be more than 0, not {value:g}")
    return 1.0 if value is None else value


def _logit_bias(biases: dict[str, float] | None, vocabulary_size: int) -> dict[int, float]:
    checked: dict[int, float] = {}
    for text, bias in (biases or {}).items():
        if not re.fullmatch(r"\d{1,10}", text) or int(text) >= vocabulary_size:
            raise bad("logit_bias", f"{text!r} is no token id of this model (0 to {vocabulary_size - 1})")
        if not -100.0 <= bias <= 100.0:
            raise bad("logit_bias", f"the bias of token {text} must be -100 to 100, not {bias:g}")
        checked[int(text)] = bias
    return checked


def _stop(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"at most {MAX_STOPS} stop strings, not {len(stops)}")
    for text in stops:
        if not 1 <= len(text) <= 4096:
            raise bad("stop", "a stop string must have 1 to 4096 characters")
    return stops


def _token_ids(param: str, ids: list[int], vocabulary_size: int) -> list[int]:
    for token_id in ids:
        if not 0 <= token_id < vocabulary_size:
            raise bad(param, f"{token_id} is no token id of this model (0 to {vocabulary_size - 1})")
    return ids
