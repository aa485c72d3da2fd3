"""What clients of the OpenAI API ask: the fields, their ranges, and what goes to the ranks.

A field's type states its range. The decoder holds it, the error is made from it, and so is the OpenAPI document. What
depends on the model (token ids, lengths) and on two fields together is checked here.

What a field means follows the OpenAI API reference, and for the fields it does not have (`top_k`, `min_p`,
`ignore_eos`, …) vLLM's sampling parameters. A field that would change the answer and that we cannot honour is refused,
never ignored; unknown fields are ignored, as both do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.datastructures import Headers

from paceline.core.requests import SamplingParams
from paceline.engines.base import Tokenizer
from paceline.server.errors import ApiError, bad
from paceline.server.responses import RANK_HEADER, ChatFormat, CompletionFormat

DEFAULT_COMPLETION_TOKENS = 16
MAX_SESSION_CHARACTERS = 512
"""What of a session's key is looked at."""

T = TypeVar("T")

Prompt = tuple[list[int], int, str]
"""Token ids, the tokens that may be made, and the text that the answer begins with (`echo`)."""


# Types --------------------------------------------------------------------------------------------

Choices = Annotated[int, Meta(ge=1, le=128)]
Tokens = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
StopString = Annotated[str, Meta(min_length=1, max_length=4096)]
Biases = Annotated[
    dict[str, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
]
# The vocabulary bounds it from above.
TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]


class StreamOptions(Struct):
    include_usage: bool | None = None


class ResponseFormat(Struct):
    type: Annotated[str, Meta(extra_json_schema={"const": "text"})] = "text"


class GenerationRequest(Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31, description="0 and -1 are all")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: int | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: Biases | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    user: str | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(description="as n")] | None = None
    suffix: Annotated[str, Meta(description="not supported", extra_json_schema={"maxLength": 0})] | None = None


class ChatMessage(Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | UnsetType = UNSET


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Any], Meta(description="not supported", extra_json_schema={"maxItems": 0})] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool = True


# Decoding -----------------------------------------------------------------------------------------


BOUNDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


class Decoder(Generic[T]):
    """Requests of one kind, from JSON or from a query. Raises ApiError naming the field."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise named(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None

    def convert(self, query: dict[str, str]) -> T:
        try:
            return msgspec.convert(query, self._kind, strict=False)
        except msgspec.ValidationError as error:
            raise named(str(error)) from None


def named(said: str) -> ApiError:
    """The error for what msgspec says: a value of another type than its field's, or out of the range that it states."""
    where = re.search(r" - at (?:`key` in )?`\$\.?(.*?)`", said)
    field = re.search(r"(?:missing required|contains unknown) field `(.*?)`", said)
    param = ".".join(one.group(1) for one in (where, field) if one and one.group(1))
    if bound := re.match(r"Expected `\w+` (of length )?([<>]=?) (\S+)", said):
        length, sign, value = bound.groups()
        text = f"{'its length ' if length else ''}must be {BOUNDS[sign]} {value.removesuffix('.0')}"
        return bad(re.split(r"[.\[]", param)[0], text)
    reason = re.sub(r" - at .*$", "", said)
    return ApiError(400, f"{param or 'body'}: {reason}", param=param or None, code="invalid_type")


# What goes to the ranks ---------------------------------------------------------------------------


class Models(Struct):
    """What this front-end serves: the model's name, its tokenizer, and tokens of prompt and answer together."""

    name: str
    tokenizer: Tokenizer
    limit: int


class Part(Struct):
    """One choice of an answer, which is a request of its own to the ranks."""

    prompt_token_ids: list[int]
    params: SamplingParams
    opening_text: str


class Prepared(Struct):
    """A checked request for text. `rank`: the one that it names; `explain`: whether it asks why a rank was chosen."""

    parts: list[Part]
    form: CompletionFormat
    prompt_tokens: int
    stream: bool
    with_usage: bool
    rank: int | None
    priority: int
    session: str | None
    explain: bool


def prepare(request: GenerationRequest, headers: Headers, models: Models, identity: str) -> Prepared:
    """Check a request, whose answer gets this identity. Raises ApiError where a field or a header is wrong."""
    if request.model is not None and request.model != models.name:
        text = f"model: {request.model!r} is not served here, only {models.name!r}"
        raise ApiError(404, text, param="model", code="model_not_found")
    rank = rank_of(headers)
    check_supported(request)
    with_usage = bool(request.stream_options and request.stream_options.include_usage)
    form: type[CompletionFormat]
    if isinstance(request, CompletionRequest):
        logprobs, prompts, form = request.logprobs, completion_prompts(request, models), CompletionFormat
    else:
        assert isinstance(request, ChatCompletionRequest)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompts, form = [chat_prompt(request, models)], ChatFormat
    params = sampling_params(request, logprobs, models.tokenizer.vocabulary_size)
    parts: list[Part] = []
    prompt_tokens = 0
    for token_ids, max_tokens, opening_text in prompts:
        prompt_tokens += len(token_ids)
        for copy in range(request.n or 1):
            # Copies of one prompt with one seed would be one answer n times over.
            seed = None if params.seed is None else (params.seed + copy) % 2**32
            part_params = msgspec.structs.replace(params, max_tokens=max_tokens, seed=seed)
            parts.append(Part(token_ids, part_params, opening_text))
    worded = form(identity, models.name, int(time.time()), with_usage)
    session = session_of(headers, request.user)
    asked = (bool(request.stream), with_usage, rank, request.priority, session, asks_why(headers))
    return Prepared(parts, worded, prompt_tokens, *asked)


def check_supported(request: GenerationRequest) -> None:
    """Refuse what would change the answer and is not here."""
    if request.response_format is not None and request.response_format.type != "text":
        raise bad("response_format", f"{request.response_format.type!r} is not supported, only 'text'", "unsupported")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options", "is only allowed with stream")
    if isinstance(request, CompletionRequest):
        if request.suffix:
            raise bad("suffix", "is not supported", "unsupported")
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise bad("best_of", "other than n is not supported", "unsupported")
        if request.echo and request.logprobs is not None:
            raise bad("echo", "together with logprobs is not supported", "unsupported")
    if isinstance(request, ChatCompletionRequest):
        if request.tools:
            raise bad("tools", "is not supported", "unsupported")
        if None not in (request.max_tokens, request.max_completion_tokens) \
                and request.max_tokens != request.max_completion_tokens:  # fmt: skip
            raise bad("max_tokens", "contradicts max_completion_tokens")
        if request.top_logprobs and not request.logprobs:
            raise bad("top_logprobs", "needs logprobs to be true")


AS_THEY_ARE = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def sampling_params(request: GenerationRequest, logprobs: int | None, vocabulary_size: int) -> SamplingParams:
    """The sampling parameters of a request, `max_tokens` still open. Raises ApiError naming the field."""
    given = {name: value for name in AS_THEY_ARE if (value := getattr(request, name)) is not None}
    return SamplingParams(
        max_tokens=1,
        top_k=max(0, request.top_k or 0),
        seed=None if request.seed is None else request.seed % 2**32,
        logit_bias=_logit_bias(request.logit_bias or {}, vocabulary_size),
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        stop_token_ids=_token_ids("stop_token_ids", request.stop_token_ids or [], vocabulary_size),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        skip_special_tokens=request.skip_special_tokens,
        **given,
    )


def _logit_bias(biases: dict[str, float], vocabulary_size: int) -> dict[int, float]:
    for text in biases:
        if not re.fullmatch(r"\d{1,10}", text) or int(text) >= vocabulary_size:
            raise bad("logit_bias", f"{text!r} is no token id of this model (0 to {vocabulary_size - 1})")
    return {int(text): bias for text, bias in biases.items()}


def _token_ids(param: str, ids: list[int], vocabulary_size: int) -> list[int]:
    for token_id in ids:
        if not 0 <= token_id < vocabulary_size:
            raise bad(param, f"{token_id} is no token id of this model (0 to {vocabulary_size - 1})")
    return ids


# Prompts ------------------------------------------------------------------------------------------


def completion_prompts(request: CompletionRequest, models: Models) -> list[Prompt]:
    """The checked prompts of a completion. Raises ApiError."""
    given = request.prompt
    if given is None or given == "":
        raise bad("prompt", "must not be empty" if given == "" else "is required")
    tokenizer = models.tokenizer
    parts = [given] if isinstance(given, str) else token_prompts(given, tokenizer.vocabulary_size)
    prompts: list[Prompt] = []
    for part in parts:
        ids = tokenizer.encode(part) if isinstance(part, str) else part
        default = DEFAULT_COMPLETION_TOKENS
        tokens = max_tokens_of("max_tokens", request.max_tokens, default, len(ids), models.limit, "prompt")
        echo = (part if isinstance(part, str) else tokenizer.decode(part)) if request.echo else ""
        prompts.append((ids, tokens, echo))
    return prompts


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


def chat_prompt(request: ChatCompletionRequest, models: Models) -> Prompt:
    """The checked prompt of a chat completion. Raises ApiError."""
    conversation = [_plain(place, message) for place, message in enumerate(request.messages)]
    try:
        text = models.tokenizer.apply_chat_template(conversation, add_generation_prompt=request.add_generation_prompt)
    except ValueError as error:
        raise bad("messages", str(error)) from None
    ids = models.tokenizer.encode(text, add_special=False, parse_special=True)
    asked, param = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    return ids, max_tokens_of(param, asked, None, len(ids), models.limit, "messages"), ""


def _plain(place: int, message: ChatMessage) -> dict[str, Any]:
    """A message with its content as text; parts of text are joined, other parts refused."""
    content = message.content
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad(f"messages[{place}].content[{number}]", "only parts of type 'text' are supported")
            texts.append(part["text"])
        content = "\n".join(texts)
    if content is None:
        if message.role != "assistant":
            raise bad(f"messages[{place}].content", "is required")
        content = ""
    return {"role": message.role, "content": content}


def max_tokens_of(
    param: str, asked: int | None, default: int | None, prompt_tokens: int, limit: int, prompt_param: str
) -> int:
    """The checked number of tokens to make. `limit`: tokens of prompt and answer together."""
    left = limit - prompt_tokens
    code = "context_length_exceeded"
    if left < 1:
        text = f"the prompt is {prompt_tokens} tokens long; prompt and answer together may have {limit}"
        raise ApiError(400, text, param=prompt_param, code=code)
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        text = f"{asked} is too large: the prompt has {prompt_tokens} tokens of {limit} for prompt and answer together"
        raise bad(param, text, code)
    return asked


# Headers ------------------------------------------------------------------------------------------


def rank_of(headers: Headers) -> int | None:
    """The rank that a client names. Raises ApiError."""
    text = headers.get(RANK_HEADER.decode())
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        text = f"X-data-parallel-rank: {text[:40]!r} is no rank number"
        raise ApiError(400, text, param="X-data-parallel-rank", code="unknown_rank")
    return int(text)


def session_of(headers: Headers, user: str | None) -> str | None:
    """The session's key: the header, else the body's `user`; None where neither is there or both are empty."""
    key = headers.get("x-session-id") or user
    return key[:MAX_SESSION_CHARACTERS] if key else None


def asks_why(headers: Headers) -> bool:
    """Whether the client wants to be told what the choice of its rank was based on."""
    return headers.get("x-paceline-routing", "").strip().lower() in {"1", "true"}
