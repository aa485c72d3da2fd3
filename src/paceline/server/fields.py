"""What clients of the OpenAI API ask: the fields of both kinds of request, and their ranges.

A field's type states its range. The decoder holds it, the error is made from it, and so is the OpenAPI document.

What a field means follows the OpenAI API reference, and for the fields it does not have (`top_k`, `min_p`,
`ignore_eos`, …) vLLM's request classes, of which every field is here. Nothing that would change the answer is ignored:
what we cannot honour is refused by name, unless it says what is the case anyway, and so is a name that nobody knows.
What changes no answer (`metadata`, `service_tier`, …) is taken and not looked at: as what it is written in, since even
to make objects of millions of lists would hold up all else.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta, Raw, Struct

from paceline.server.errors import ApiError, bad

T = TypeVar("T")

MOST_BIASES = 16_384
"""Each is looked at for every token of the answer."""

Choices = Annotated[int, Meta(ge=1, le=1024)]
Tokens = Annotated[int, Meta(ge=1, lt=2**53)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
StopString = Annotated[str, Meta(min_length=1, max_length=4096)]
Biases = Annotated[
    dict[str, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=MOST_BIASES, extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
]
Choice = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=4096)]
# The vocabulary bounds it from above.
TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0})]
NULL: Any = msgspec.field(default_factory=lambda: Raw(b"null"))
MOST_OF_A_DEFAULT = 64
"""Bytes that the default of a field that is not supported may be written in."""
NOT_SUPPORTED = "not supported: only its default is taken"


def only(default: Any) -> Meta:
    """Of a field that is refused by name, unless it has its default or is null."""
    return Meta(
        description=NOT_SUPPORTED, extra_json_schema={"enum": [default, None] if default is not None else [None]}
    )


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Meta(description="only false")] = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct, forbid_unknown_fields=True):
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's. `grammar` in Lark's notation or llama.cpp's (GBNF)."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationRequest(Struct, kw_only=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=2**53)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31, description="0 and -1 are all")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(description="-1 is a random one")] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: Biases | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, description="-1 is the model's limit")] | None = None
    truncation_side: Annotated[str, Meta(extra_json_schema={"enum": ["left", "right"]})] | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_weight_versions: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    request_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None
    user: str | None = None
    # What changes no answer.
    session_id: str | None = None
    metadata: Raw = NULL
    service_tier: Raw = NULL
    safety_identifier: Raw = NULL
    prompt_cache_key: str | None = None
    prompt_cache_retention: Raw = NULL
    # What would change one.
    guided_decoding_backend: Annotated[Raw, only(None)] = NULL
    guided_whitespace_pattern: Annotated[Raw, only(None)] = NULL
    use_beam_search: Annotated[Raw, only(False)] = NULL
    length_penalty: Annotated[Raw, only(1.0)] = NULL
    early_stopping: Annotated[Raw, only(False)] = NULL
    spaces_between_special_tokens: Annotated[Raw, only(True)] = NULL
    watermarking: Annotated[Raw, only(None)] = NULL
    thinking_token_budget: Annotated[Raw, only(None)] = NULL
    logprob_token_ids: Annotated[Raw, only(None)] = NULL
    routed_experts_prompt_start: Annotated[Raw, only(0)] = NULL
    return_token_offsets: Annotated[Raw, only(None)] = NULL
    mm_payload: Annotated[Raw, only(None)] = NULL
    return_mm_kwargs: Annotated[Raw, only(None)] = NULL
    cache_salt: Annotated[Raw, only(None)] = NULL
    kv_transfer_params: Annotated[Raw, only(None)] = NULL
    ec_transfer_params: Annotated[Raw, only(None)] = NULL
    vllm_xargs: Annotated[Raw, only(None)] = NULL
    repetition_detection: Annotated[Raw, only(None)] = NULL
    stream_interval: Annotated[Raw, only(1)] = NULL
    logits_processors: Annotated[Raw, only(None)] = NULL


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(description="as n")] | None = None
    suffix: Annotated[str, Meta(description=NOT_SUPPORTED, extra_json_schema={"maxLength": 0})] | None = None
    parse_special: Annotated[bool, Meta(description="whether control tokens in the prompt's text are such")] = True
    prompt_embeds: Annotated[Raw, only(None)] = NULL


class Function(Struct):
    """What a tool does. `parameters`: the JSON schema of its arguments."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Struct):
    name: str


class NamedTool(Struct):
    function: NamedFunction
    type: Literal["function"] = "function"


class CalledFunction(Struct):
    """`arguments`: a text that holds a JSON object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Struct):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Meta(description="needs --trust-request-chat-template")] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Annotated[str, Meta(description="where the chat template knows it")] | None = None
    # What would change an answer.
    echo: Annotated[Raw, only(False)] = NULL
    store: Annotated[Raw, only(False)] = NULL
    modalities: Annotated[Raw, only(["text"])] = NULL
    audio: Annotated[Raw, only(None)] = NULL
    prediction: Annotated[Raw, only(None)] = NULL
    web_search_options: Annotated[Raw, only(None)] = NULL
    functions: Annotated[Raw, only(None)] = NULL
    function_call: Annotated[Raw, only(None)] = NULL
    verbosity: Annotated[Raw, only("medium")] = NULL
    media_io_kwargs: Annotated[Raw, only(None)] = NULL
    mm_processor_kwargs: Annotated[Raw, only(None)] = NULL
    return_prompt_text: Annotated[Raw, only(None)] = NULL


def as_chat(fields: dict[str, Any]) -> ChatCompletionRequest:
    """A chat of another API's request. Raises ApiError naming the chat's field."""
    try:
        return msgspec.convert(fields, ChatCompletionRequest)
    except msgspec.ValidationError as error:
        raise named(str(error)) from None


@functools.cache
def _unsupported_fields(kind: type[Struct]) -> dict[str, Any]:
    """The fields of a kind of request that have no effect here, with what is taken all the same."""
    hints = get_type_hints(kind, include_extras=True)
    metas = {name: part for name, hint in hints.items() for part in get_args(hint) if isinstance(part, Meta)}
    schemas = {name: meta.extra_json_schema or {} for name, meta in metas.items() if meta.description == NOT_SUPPORTED}
    return {name: schema["enum"][0] for name, schema in schemas.items() if "enum" in schema}


def refuse_unsupported(request: Struct) -> None:
    """Refuse by name what would change the answer and is not here. Raises ApiError."""
    for name, default in _unsupported_fields(type(request)).items():
        value = bytes(getattr(request, name))
        if len(value) > MOST_OF_A_DEFAULT or msgspec.json.decode(value) not in (default, None):
            raise bad(name, "is not supported", "unsupported")


OVERLONG = "context_length_exceeded"

# Decoding -----------------------------------------------------------------------------------------

BOUNDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


class Decoder(Generic[T]):
    """Requests of one kind, from JSON or from a query. Raises ApiError naming the field.

    `strict`: a name that the kind does not have is an error.
    """

    def __init__(self, kind: type[T], *, strict: bool = False) -> None:
        if strict:
            kind = type(kind.__name__, (kind,), {}, forbid_unknown_fields=True)
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def decode(self, body: bytes) -> T:
        try:
            try:
                return self._decoder.decode(body)
            except msgspec.ValidationError as error:
                if "got `float`" not in str(error):
                    raise
                # Some clients write whole numbers as 2.0.
                return self._decoder.decode(msgspec.json.encode(_with_whole_numbers(msgspec.json.decode(body))))
        except msgspec.ValidationError as error:
            raise named(str(error)) from None
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            said = "it holds half of a surrogate pair" if b"\\ud" in body.lower() else error
            raise ApiError(400, f"the body is not valid JSON: {said}", code="invalid_json") from None

    def convert(self, query: dict[str, str]) -> T:
        try:
            return msgspec.convert(query, self._kind, strict=False)
        except msgspec.ValidationError as error:
            raise named(str(error)) from None


UNBOUNDED = {"prompt", "messages", "input", "instructions", "system", "tools", "documents", "chat_template",
             "chat_template_kwargs"}  # fmt: skip
"""Fields that may be long. All others are bounded by what they can hold of use."""
MOST_OF_A_FIELD = 1 << 20


def bound(body: bytes, most_tokens: int, most_prompts: int) -> None:
    """Refuse what is too much of anything before objects are made of it: that holds up all threads. Raises ApiError."""
    parts = Decoder(dict[str, Raw]).decode(body)
    for name, part in parts.items():
        if name not in UNBOUNDED and len(part) > MOST_OF_A_FIELD:
            raise bad(name, f"is larger than {MOST_OF_A_FIELD} bytes")
    for name in ("prompt", "input"):
        prompt = bytes(parts.get(name, b""))
        if prompt.startswith(b"[") and b'"' not in prompt:
            lists = prompt.count(b"[")
            if lists > most_prompts + 1:
                raise bad(name, f"must be at most {most_prompts} prompts")
            if lists == 1 and (commas := prompt.count(b",")) >= most_tokens:
                raise overlong(f"{commas + 1}", most_tokens, name)
    for name in ("messages", "input"):
        messages = bytes(parts.get(name, b""))
        if messages.startswith(b"[") and messages.count(b"{") > most_tokens:
            found = len(Decoder(list[Raw]).decode(messages))
            if found > most_tokens:
                raise overlong(f"at least {found}", most_tokens, name)


def too_deep() -> ApiError:
    """The error for lists in lists, or objects in objects, beyond what can be read."""
    return ApiError(400, "the body is nested too deeply", code="invalid_json")


def overlong(tokens: str, limit: int, param: str) -> ApiError:
    """The error for a prompt that does not fit. Frameworks look for either of its phrases."""
    text = (
        f"This model's maximum context length is {limit} tokens. However, the prompt is too long: "
        f"it has {tokens} tokens, and the answer needs some, too"
    )
    return ApiError(400, f"{param}: {text}", param=param, code=OVERLONG)


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_with_whole_numbers(inner) for inner in value]
    return {key: _with_whole_numbers(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def named(said: str) -> ApiError:
    """The error for what msgspec says: a value of another type than its field's, or out of the range that it states."""
    where = re.search(r" - at (?:`key` in )?`\$\.?(.*?)`", said)
    field = re.search(r"(?:missing required|contains unknown) field `(.*?)`", said)
    param = ".".join(one.group(1) for one in (where, field) if one and one.group(1))
    if field and "unknown" in said:
        text = f"{param}: is no field of this request (--allow-unknown-fields lets it pass)"
        return ApiError(400, text, param=param, code="unknown_field")
    if bound := re.match(r"Expected `\w+` (of length )?([<>]=?) (\S+)", said):
        length, sign, value = bound.groups()
        text = f"{'its length ' if length else ''}must be {BOUNDS[sign]} {value.removesuffix('.0')}"
        return bad(re.split(r"[.\[]", param)[0], text)
    reason = re.sub(r" - at .*$", "", said)
    return ApiError(400, f"{param or 'body'}: {reason}", param=param or None, code="invalid_type")
