"""What goes to the ranks for a request of a client: its checks, its sampling, its prompts.

What a field may be its type says (`fields.py`); what depends on the model (token ids, lengths, what the engine can) and
on two fields together is checked here.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct
from starlette.datastructures import Headers

from paceline.core.requests import SamplingParams
from paceline.engines.base import Tokenizer
from paceline.server.embeddings import EmbeddingsFormat, EmbeddingsRequest
from paceline.server.errors import ApiError, bad
from paceline.server.fields import (
    ChatCompletionRequest,
    CompletionRequest,
    Decoder,
    GenerationRequest,
    NamedTool,
    ResponseFormat,
    bound,
    refuse_unsupported,
    too_deep,
)
from paceline.server.formats import ChatFormat, CompletionFormat, Wording
from paceline.server.messages import MessagesFormat, MessagesRequest
from paceline.server.openai_responses import ResponsesFormat, ResponsesRequest
from paceline.server.prompts import MOST_CHOICES, Prompt, PromptMaker, token_ids
from paceline.server.responses import RANK_HEADER
from paceline.server.stored import ResponseStore
from paceline.server.structured import check_tools, forced_calls, structured_output
from paceline.server.tools import FORCED, PLAIN, Language, begins_in, language, needs_markers

MAX_SESSION_CHARACTERS = 512
"""What of a session's key is looked at."""
AT_ONCE_BYTES = 8192
"""Bodies up to this size are prepared on the event loop, in a few milliseconds; longer ones in a thread."""
FAR_BYTES = 96 * 1024
"""Bodies above this size are read in another process: of these a thread would hold up the event loop."""
TAIL = 8
"""Tokens of a prompt's end in which a template has opened the reasoning."""
BOUND_BYTES = 256 * 1024
"""Bodies above this size are bounded before they are decoded."""


Kind = type[GenerationRequest] | type[MessagesRequest] | type[ResponsesRequest] | type[EmbeddingsRequest]
FORMATS: dict[Kind, type[CompletionFormat]] = {
    CompletionRequest: CompletionFormat, ChatCompletionRequest: ChatFormat, MessagesRequest: MessagesFormat,
    ResponsesRequest: ResponsesFormat, EmbeddingsRequest: EmbeddingsFormat,
}  # fmt: skip
"""How each kind of request is answered."""


def format_of(kind: type[Struct]) -> type[CompletionFormat]:
    """That of a kind, or of the one that it is the strict form of."""
    return next(form for known, form in FORMATS.items() if issubclass(kind, known))


class Models(Struct):
    """What this front-end serves: names, a tokenizer, and tokens of prompt and answer together.

    `supports`: what the engine can of what not all can (`Engine.supports`). `defaults`: the sampling of a request that
    says nothing of it. `trust_chat_template`: whether a request may bring its own. `adapters`: those of the names that
    are the model's adapters. `tool_parser`, `reasoning_parser`: the languages of `tools.py` that the model speaks.
    `embedding_size`: numbers of an embedding, where it embeds and does not generate, else 0.
    """

    names: list[str]
    tokenizer: Tokenizer
    limit: int
    supports: frozenset[str] = frozenset()
    defaults: Mapping[str, float] = {}
    trust_chat_template: bool = False
    adapters: frozenset[str] = frozenset()
    tool_parser: str = "hermes"
    reasoning_parser: str = "none"
    embedding_size: int = 0

    @property
    def usual_tokens(self) -> int | None:
        """What a chat may make that does not say it, where the model's makers recommend a bound."""
        bound = self.defaults.get("max_tokens")
        return None if bound is None else max(1, int(bound))


class Part(Struct):
    """One choice of an answer, which is a request of its own to the ranks."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    opening_text: str


class Prepared(Struct):
    """A checked request for text. `rank`: the one that it names; `explain`: whether it asks why a rank was chosen."""

    parts: list[Part]
    form: CompletionFormat
    stream: bool
    rank: int | None
    priority: int
    session: str | None
    explain: bool


class Reader(Protocol):
    """Another process that reads bodies (`reading.py`)."""

    async def ask(self, job: str, *given: Any) -> Any: ...


class Preparer:
    """Prepares requests, so that nobody's stream waits for them: short ones at once, others in a thread, and long ones
    in another process, where there is one (`reader`).
    """

    def __init__(
        self, models: Models, store: ResponseStore | None = None, *, allow_unknown_fields: bool = False,
        reader: Reader | None = None,
    ) -> None:  # fmt: skip
        self.models = models
        self.store = store
        kinds: list[Kind] = [*FORMATS]
        self._decoders = {kind: Decoder(kind, strict=not allow_unknown_fields) for kind in kinds}
        self._threads = ThreadPoolExecutor(2, "prepare")
        self._reader = reader

    def at_once(self, kind: Kind, body: bytes, headers: Headers, identity: str) -> Prepared | None:
        """Check a request, whose answer gets this identity; None where it is long. Raises ApiError."""
        apart = len(body) > AT_ONCE_BYTES or self._recalls(kind, body)
        return None if apart else self._prepare(kind, body, headers, identity, None)

    async def apart(self, kind: Kind, body: bytes, headers: Headers, identity: str) -> Prepared:
        """The same elsewhere. Given up soon after it is cancelled."""
        weight = len(body) + self._recalls(kind, body)
        made: Prepared = await self.elsewhere(kind.__name__, self.job(kind), weight, body, headers, identity)
        return made

    async def elsewhere(self, name: str, job: Callable[..., Any], weight: int, *given: Any) -> Any:
        """What a job makes of what it is given and of an event, which says that nobody waits for it any more: in a
        thread, or where so many bytes are to be read in the other process, which knows the job by its name.
        """
        if self._reader is not None and weight > FAR_BYTES:
            return await self._reader.ask(name, *given)
        cancelled = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, partial(job, *given, cancelled))
        finally:
            cancelled.set()

    def job(self, kind: Kind) -> Callable[..., Prepared]:
        """What prepares requests of a kind."""
        return partial(self._prepare, kind)

    def _recalls(self, kind: Kind, body: bytes) -> int:
        """Bytes of what is kept that the request names: they are read with it. A long one goes far in any case."""
        if self.store is None or kind is not ResponsesRequest or len(body) > FAR_BYTES:
            return 0
        return self.store.named_bytes(body)

    def _prepare(
        self, kind: Kind, body: bytes, headers: Headers, identity: str,
        cancelled: threading.Event | None,
    ) -> Prepared:  # fmt: skip
        try:
            return self._checked(kind, body, headers, identity, cancelled)
        except RecursionError:
            raise too_deep() from None

    def _checked(
        self, kind: Kind, body: bytes, headers: Headers, identity: str,
        cancelled: threading.Event | None,
    ) -> Prepared:  # fmt: skip
        if len(body) > BOUND_BYTES:
            bound(body, self.models.limit, MOST_CHOICES)
        request: Any = self._decoders[kind].decode(body)
        if (kind is EmbeddingsRequest) is not bool(self.models.embedding_size):
            raise ApiError(400, NO_TASK[kind is EmbeddingsRequest], param="model", code="unsupported")
        if isinstance(request, EmbeddingsRequest):
            return prepare_embeddings(request, headers, self.models, identity, cancelled)
        if isinstance(request, GenerationRequest):
            return prepare(request, headers, self.models, identity, cancelled)
        refuse_unsupported(request)
        if isinstance(request, ResponsesRequest):
            request.recall(self.store)
        if isinstance(request, MessagesRequest):
            request.check(thinks=self.models.reasoning_parser != "none")
        return prepare(request.chat(), headers, self.models, identity, cancelled, request)


def prepare(
    request: GenerationRequest, headers: Headers, models: Models, identity: str,
    cancelled: threading.Event | None = None, asked: Struct | None = None,
) -> Prepared:  # fmt: skip
    """Check a request, whose answer gets this identity. Raises ApiError where a field or a header is wrong.

    `asked`: what the client wrote, where that is another API's request: the answer is in its words.
    """
    model = model_of(request.model, models)
    rank = rank_of(headers)
    check_supported(request, models)
    maker = PromptMaker(models.tokenizer, models.limit, cancelled, models.usual_tokens)
    form = format_of(type(asked or request))
    if isinstance(request, CompletionRequest):
        logprobs, prompts = request.logprobs, maker.completion(request)
    else:
        assert isinstance(request, ChatCompletionRequest)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompts = [maker.chat(request)]
    params = sampling_params(request, logprobs, models)
    reading, mode = reading_of(request, prompts[0].token_ids, params, models)
    if reading is not None and needs_markers(reading):
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    if form.reads and reading is None:
        reading = PLAIN
    parts = [part for prompt in prompts for part in _parts(request, prompt, params)]
    options = request.stream_options
    wording = Wording(
        prompt_token_ids=_written(prompts, request.n or 1) if request.return_token_ids else [],
        prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
        with_usage=bool(options and options.include_usage),
        usage_throughout=bool(options and options.continuous_usage_stats),
        with_token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        with_weight_versions=bool(request.return_weight_versions),
        none_made=request.max_tokens == 0,
        prompt_logprobs=request.prompt_logprobs is not None,
        reading=reading,
        mode=mode,
        most_calls=1 if getattr(request, "parallel_tool_calls", None) is False else 1024,
        named=isinstance(getattr(request, "tool_choice", None), NamedTool),
        with_reasoning=getattr(request, "include_reasoning", None) is not False,
        echo_logprobs=isinstance(request, CompletionRequest) and bool(request.echo) and logprobs is not None,
    )
    worded = form(request.request_id or identity, model, int(time.time()), wording, asked)
    session = session_of(headers, request.session_id or request.prompt_cache_key or request.user)
    return Prepared(parts, worded, bool(request.stream), rank, request.priority or 0, session, asks_why(headers))


def _written(prompts: list[Prompt], copies: int) -> list[Raw]:
    """The prompt's token ids of each choice, as JSON: written once, however many repeat them."""
    return [raw for prompt in prompts for raw in [Raw(msgspec.json.encode(prompt.token_ids))] * copies]


NO_TASK = {
    True: "model: this deployment generates and does not embed (--task embed)",
    False: "model: this deployment embeds and does not generate (--task generate)",
}


def prepare_embeddings(
    request: EmbeddingsRequest, headers: Headers, models: Models, identity: str,
    cancelled: threading.Event | None = None,
) -> Prepared:  # fmt: skip
    """Check a request for embeddings. Raises ApiError where a field or a header is wrong."""
    model, rank = model_of(request.model, models), rank_of(headers)
    refuse_unsupported(request)
    if request.dimensions is not None and request.dimensions > models.embedding_size:
        raise bad("dimensions", f"must be at most {models.embedding_size}, not {request.dimensions}")
    prompts = PromptMaker(models.tokenizer, models.limit, cancelled).embeddings(request)
    adapter = request.model or "" if request.model in models.adapters else ""
    parts = [Part(prompt.token_ids, SamplingParams(max_tokens=1, adapter=adapter), "") for prompt in prompts]
    wording = Wording(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
    form = EmbeddingsFormat(request.request_id or identity, model, int(time.time()), wording, request)
    session = session_of(headers, request.user)
    return Prepared(parts, form, False, rank, request.priority or 0, session, asks_why(headers))


def reading_of(
    request: GenerationRequest, prompt: list[int], params: SamplingParams, models: Models
) -> tuple[Language | None, str]:
    """The language in which an answer is read, None where it is text, and the mode that it begins in."""
    if not isinstance(request, ChatCompletionRequest):
        return None, "content"
    if params.structured_outputs is not None:
        return (FORCED if forced_calls(request) is not None else None), "content"
    tools = models.tool_parser if request.tools and request.tool_choice != "none" else None
    modes = language(tools, models.reasoning_parser)
    if modes is None or request.continue_final_message:
        return modes, "content"
    return modes, begins_in(modes, models.tokenizer.decode(prompt[-TAIL:]))


def model_of(named: str | None, models: Models) -> str:
    """The model's name that an answer has. Raises ApiError 404."""
    if named and named not in models.names:
        text = f"model: {named[:200]!r} is not served here, only {', '.join(map(repr, models.names))}"
        raise ApiError(404, text, param="model", code="model_not_found")
    return named or models.names[0]


def _parts(request: GenerationRequest, prompt: Prompt, params: SamplingParams) -> list[Part]:
    """The choices of one prompt. Copies with one seed would be one answer n times over."""
    made = []
    for copy in range(request.n or 1):
        seed = None if params.seed is None else (params.seed + copy) % 2**32
        tokens = max(1, prompt.max_tokens)
        own = msgspec.structs.replace(params, max_tokens=tokens, min_tokens=min(params.min_tokens, tokens), seed=seed)
        made.append(Part(prompt.token_ids, own, prompt.echo))
    return made


OF_THE_ENGINE = ("min_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs")
"""Fields that not every engine honours."""
FORMS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Fields for the form of an answer, which those have that support `structured_outputs`."""


def _asks_a_form(value: object) -> bool:
    return value is not None and not (isinstance(value, ResponseFormat) and value.type == "text")


def check_supported(request: GenerationRequest, models: Models) -> None:
    """Refuse what would change the answer and is not here, and fields that contradict each other. Raises ApiError."""
    refuse_unsupported(request)
    for name in OF_THE_ENGINE:
        if name not in models.supports and getattr(request, name) not in (None, 0, []):
            raise bad(name, "is not supported by this engine", "unsupported")
    for name in FORMS:
        if "structured_outputs" not in models.supports and _asks_a_form(getattr(request, name)):
            raise bad(name, "is not supported by this engine", "unsupported")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options", "is only allowed with stream")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise bad("stream_options.include_obfuscation", "is not supported", "unsupported")
    if request.truncation_side not in (None, "left", "right"):
        raise bad("truncation_side", f"must be left or right, not {request.truncation_side[:40]!r}")
    if request.prompt_logprobs is not None and request.stream:
        raise bad("prompt_logprobs", "is not available with stream")
    if request.max_tokens is not None and (request.min_tokens or 0) > request.max_tokens:
        raise bad("min_tokens", f"must be at most max_tokens, {request.max_tokens}")
    if request.max_tokens == 0 and not (isinstance(request, CompletionRequest) and request.echo):
        raise bad("max_tokens", "must be at least 1, or 0 with echo")
    if isinstance(request, CompletionRequest):
        _check_completion(request, models)
    elif isinstance(request, ChatCompletionRequest):
        _check_chat(request, models)


def _check_completion(request: CompletionRequest, models: Models) -> None:
    if request.suffix:
        raise bad("suffix", "is not supported", "unsupported")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise bad("best_of", "other than n is not supported", "unsupported")
    if request.echo and request.logprobs is not None and "prompt_logprobs" not in models.supports:
        raise bad("echo", "together with logprobs is not supported by this engine", "unsupported")


def _check_chat(request: ChatCompletionRequest, models: Models) -> None:
    check_tools(request, models.supports)
    if request.chat_template is not None and not models.trust_chat_template:
        raise bad("chat_template", "is only taken with --trust-request-chat-template", "unsupported")
    template = request.chat_template or models.tokenizer.chat_template or ""
    if request.reasoning_effort is not None and "reasoning_effort" not in template:
        raise bad("reasoning_effort", "is not known to the model's chat template", "unsupported")
    if request.top_logprobs and not request.logprobs:
        raise bad("top_logprobs", "needs logprobs to be true")


AS_THEY_ARE = (
    "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens",
    "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


def sampling_params(request: GenerationRequest, logprobs: int | None, models: Models) -> SamplingParams:
    """The sampling parameters of a request, `max_tokens` still open. Raises ApiError naming the field."""
    size = models.tokenizer.vocabulary_size
    given = {name: value for name in AS_THEY_ARE if (value := getattr(request, name)) is not None}
    top_k = models.defaults.get("top_k", 0) if request.top_k is None else request.top_k
    defaults = {name: value for name, value in models.defaults.items() if name not in ("top_k", "max_tokens")}
    echoes = isinstance(request, CompletionRequest) and request.echo
    allowed = request.allowed_token_ids
    return SamplingParams(
        max_tokens=1,
        top_k=max(0, int(top_k)),
        seed=None if request.seed in (None, -1) else request.seed % 2**32,
        logit_bias=_logit_bias(request.logit_bias or {}, size),
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or [],
        stop_token_ids=token_ids("stop_token_ids", request.stop_token_ids or [], size),
        logprobs=logprobs,
        bad_words=_bad_words(request.bad_words or [], models.tokenizer),
        allowed_token_ids=None if allowed is None else token_ids("allowed_token_ids", allowed, size),
        structured_outputs=structured_output(request),
        adapter=request.model if request.model in models.adapters else "",
        prompt_logprobs=logprobs if echoes and logprobs is not None else request.prompt_logprobs,
        **(defaults | given),
    )


def _bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """What must not be made, as tokens: each word as it is, and as it stands behind a blank."""
    found: list[list[int]] = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special=False)
            if ids and ids not in found:
                found.append(ids)
    return found


def _logit_bias(biases: dict[str, float], vocabulary_size: int) -> dict[int, float]:
    for text in biases:
        if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= vocabulary_size:
            raise bad("logit_bias", f"{text[:40]!r} is no token id of this model (0 to {vocabulary_size - 1})")
    return {int(text): bias for text, bias in biases.items()}


# Headers ------------------------------------------------------------------------------------------


def rank_of(headers: Headers) -> int | None:
    """The rank that a client names. Raises ApiError."""
    text = headers.get(RANK_HEADER.decode())
    if text is None:
        return None
    text = text.strip()
    if not text.isascii() or not text.isdigit() or len(text) > 5:
        text = f"X-data-parallel-rank: {text[:40]!r} is no rank number"
        raise ApiError(400, text, param="X-data-parallel-rank", code="unknown_rank")
    return int(text)


def session_of(headers: Headers, named: str | None) -> str | None:
    """The session's key: the header, else what the body names; None where neither is there or both are empty."""
    key = headers.get("x-session-id", "").strip() or named
    return key[:MAX_SESSION_CHARACTERS] if key else None


def asks_why(headers: Headers) -> bool:
    """Whether the client wants to be told what the choice of its rank was based on."""
    return headers.get("x-paceline-routing", "").strip().lower() in {"1", "true"}
