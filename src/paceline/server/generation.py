"""One HTTP request for text: checked, sent to ranks as one or more requests, answered whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines.base import Tokenizer
from paceline.protocol.messages import Output
from paceline.protocol.sampling import SamplingParams
from paceline.server import openai
from paceline.server.answers import (
    DONE_EVENT,
    ChatDialect,
    CompletionDialect,
    Dialect,
    StreamedChoice,
    WholeChoice,
    event,
    usage,
)
from paceline.server.client import Client, Refused, Stream
from paceline.server.openai import ApiError, ChatCompletionRequest, CompletionRequest, GenerationRequest


class Prompt(Struct):
    """One prompt, and the text that the answer begins with (`echo`)."""

    token_ids: list[int]
    max_tokens: int
    opening_text: str = ""


class Models(Struct):
    """What this front-end serves: the model's name, its tokenizer, and tokens of prompt and answer together."""

    name: str
    tokenizer: Tokenizer
    limit: int


def completion_prompts(request: CompletionRequest, models: Models) -> list[Prompt]:
    """The checked prompts of a completion. Raises ApiError."""
    given = request.prompt
    if given is None or given == "":
        raise openai.bad("prompt", "must not be empty" if given == "" else "is required")
    tokenizer = models.tokenizer
    if isinstance(given, str):
        parts: list[str | list[int]] = [given]
    else:
        parts = openai.token_prompts(given, tokenizer.vocabulary_size)
    default = openai.DEFAULT_COMPLETION_TOKENS
    prompts: list[Prompt] = []
    for part in parts:
        ids = tokenizer.encode(part) if isinstance(part, str) else part
        tokens = openai.max_tokens_of("max_tokens", request.max_tokens, default, len(ids), models.limit, "prompt")
        echo = (part if isinstance(part, str) else tokenizer.decode(part)) if request.echo else ""
        prompts.append(Prompt(ids, tokens, echo))
    return prompts


def chat_prompt(request: ChatCompletionRequest, models: Models) -> Prompt:
    """The checked prompt of a chat completion. Raises ApiError."""
    if not request.messages:
        raise openai.bad("messages", "must not be empty")
    conversation = [_plain(place, message) for place, message in enumerate(request.messages)]
    try:
        text = models.tokenizer.apply_chat_template(conversation, add_generation_prompt=request.add_generation_prompt)
    except ValueError as error:
        raise openai.bad("messages", str(error)) from None
    ids = models.tokenizer.encode(text, add_special=False, parse_special=True)
    asked, param = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    tokens = openai.max_tokens_of(param, asked, None, len(ids), models.limit, "messages")
    return Prompt(ids, tokens)


def _plain(place: int, message: openai.ChatMessage) -> dict[str, Any]:
    """A message with its content as text; parts of text are joined, other parts refused."""
    content = message.content
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise openai.bad(f"messages[{place}].content[{number}]", "only parts of type 'text' are supported")
            texts.append(part["text"])
        content = "\n".join(texts)
    if content is None:
        if message.role != "assistant":
            raise openai.bad(f"messages[{place}].content", "is required")
        content = ""
    return {"role": message.role, "content": content}


class Generation:
    """One HTTP request under way: `start`, then either `whole` or `events`; `abandon` when the client goes."""

    def __init__(
        self, client: Client, models: Models, identity: str, request: GenerationRequest, rank: int | None
    ) -> None:
        self._client = client
        self._request = request
        self._rank = rank
        self._numbers: dict[int, int] = {}
        self._stream = Stream()
        openai.check_supported(request)
        self._copies = openai.choices_of(request)
        name = request.model or models.name
        created = int(time.time())
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)
        dialect: Dialect
        vocabulary = models.tokenizer.vocabulary_size
        if isinstance(request, CompletionRequest):
            logprobs = openai.completion_logprobs(request)
            self._prompts = completion_prompts(request, models)
            dialect = CompletionDialect(f"cmpl-{identity}", name, created, self._with_usage)
        else:
            assert isinstance(request, ChatCompletionRequest)
            logprobs = openai.chat_logprobs(request)
            self._prompts = [chat_prompt(request, models)]
            dialect = ChatDialect(f"chatcmpl-{identity}", name, created, self._with_usage)
        self._dialect = dialect
        self._params = openai.sampling_params(request, max_tokens=1, logprobs=logprobs, vocabulary_size=vocabulary)
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)

    @property
    def stream(self) -> Stream:
        """Where outputs arrive."""
        return self._stream

    def start(self) -> list[int]:
        """Send everything; returns the ranks that serve it, in order of first use. Raises ApiError."""
        ranks: list[int] = []
        try:
            for place, prompt in enumerate(self._prompts):
                for copy in range(self._copies):
                    params = self._choice_params(prompt, copy)
                    number, rank = self._client.submit(
                        self._stream, prompt.token_ids, params, self._rank, self._request.priority
                    )
                    self._numbers[number] = place * self._copies + copy
                    if rank not in ranks:
                        ranks.append(rank)
        except Refused as refusal:
            self.abandon()
            raise _refusal(refusal) from None
        return ranks

    def abandon(self) -> None:
        """Abort what still runs."""
        if self._numbers:
            self._client.abandon(list(self._numbers))
            self._numbers = {}

    async def whole(self) -> bytes | None:
        """The whole answer's body; None where the client went away meanwhile. Raises ApiError."""
        choices = [
            WholeChoice(self._dialect, index, self._prompts[index // self._copies].opening_text)
            for index in range(len(self._prompts) * self._copies)
        ]
        left = len(choices)
        while left:
            try:
                outputs = await self._stream.get()
            except Refused as refusal:
                raise _refusal(refusal) from None
            if self._stream.closed:
                return None
            for output in outputs:
                if output.finish_reason == "error":
                    raise _failure(output)
                choices[self._numbers[output.request]].add(output)
                left -= output.finish_reason is not None
        total = usage(self._prompt_tokens, sum(choice.tokens for choice in choices))
        self._numbers = {}
        return self._dialect.body([choice.entry() for choice in choices], total)

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's bytes, all that is there at a time."""
        count = len(self._prompts) * self._copies
        choices = [StreamedChoice(self._dialect, index) for index in range(count)]
        opening = b"".join(self._opening(index) for index in range(count))
        if opening:
            yield opening
        left = count
        while left:
            try:
                outputs = await self._stream.get()
            except Refused as refusal:
                yield event(_refusal(refusal).body)
                return
            if self._stream.closed:
                return
            parts: list[bytes] = []
            for output in outputs:
                if output.finish_reason == "error":
                    yield b"".join(parts) + event(_failure(output).body)
                    return
                parts.append(choices[self._numbers[output.request]].events(output))
                left -= output.finish_reason is not None
            data = b"".join(parts)
            if data:
                yield data
        self._numbers = {}
        total = usage(self._prompt_tokens, sum(choice.tokens for choice in choices))
        yield (self._dialect.usage_event(total) if self._with_usage else b"") + DONE_EVENT

    def _opening(self, index: int) -> bytes:
        text = self._prompts[index // self._copies].opening_text
        opening = self._dialect.opening(index)
        return opening + (self._dialect.chunk(index, text, None, None, None) if text else b"")

    def _choice_params(self, prompt: Prompt, copy: int) -> SamplingParams:
        # Copies of one prompt with one seed would be one answer n times over.
        seed = None if self._params.seed is None else (self._params.seed + copy) % 2**32
        return msgspec.structs.replace(self._params, max_tokens=prompt.max_tokens, seed=seed)


def _refusal(refusal: Refused) -> ApiError:
    text = str(refusal)
    match refusal.reason:
        case "unknown-rank":
            return ApiError(400, f"X-data-parallel-rank: {text}", param="X-data-parallel-rank", code="unknown_rank")
        case "overloaded":
            return ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=1)
        case _:
            return ApiError(503, text, kind="server_error", code=refusal.reason.replace("-", "_"), retry_after_s=1)


def _failure(output: Output) -> ApiError:
    return ApiError(500, output.error or "the rank failed", kind="server_error", code="engine_error")
