"""One HTTP request for text: checked, sent to ranks as one or more requests, answered whole or as a stream."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import Struct

from paceline.core.requests import SamplingParams
from paceline.engines.base import Tokenizer
from paceline.server import errors, openai
from paceline.server.answers import ChatDialect, CompletionDialect, Dialect
from paceline.server.client import Client
from paceline.server.delivery import EventStream, WholeAnswer
from paceline.server.errors import Refused
from paceline.server.head import Head
from paceline.server.openai import ChatCompletionRequest, CompletionRequest, GenerationRequest
from paceline.server.outlet import Outlet


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
        raise errors.bad("prompt", "must not be empty" if given == "" else "is required")
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
        raise errors.bad("messages", "must not be empty")
    conversation = [_plain(place, message) for place, message in enumerate(request.messages)]
    try:
        text = models.tokenizer.apply_chat_template(conversation, add_generation_prompt=request.add_generation_prompt)
    except ValueError as error:
        raise errors.bad("messages", str(error)) from None
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
                raise errors.bad(f"messages[{place}].content[{number}]", "only parts of type 'text' are supported")
            texts.append(part["text"])
        content = "\n".join(texts)
    if content is None:
        if message.role != "assistant":
            raise errors.bad(f"messages[{place}].content", "is required")
        content = ""
    return {"role": message.role, "content": content}


class Generation:
    """One HTTP request under way: `start`, then its sink has the outputs; `abandon` when the client goes.

    `rank`: the one that the client names, if any. `session`: its session's key. `explain`: whether the answer says
    what each choice of a rank was based on. Raises ApiError where a field is wrong.
    """

    def __init__(
        self, client: Client, models: Models, identity: str, request: GenerationRequest, rank: int | None,
        session: str | None = None, explain: bool = False,
    ) -> None:  # fmt: skip
        self._client = client
        self._request = request
        self._rank = rank
        self._session = session
        self._explain = explain
        self._places: dict[int, int] = {}
        openai.check_supported(request)
        self._copies = openai.choices_of(request)
        name = request.model or models.name
        created = int(time.time())
        self._with_usage = bool(request.stream_options and request.stream_options.include_usage)
        vocabulary = models.tokenizer.vocabulary_size
        if isinstance(request, CompletionRequest):
            logprobs = openai.completion_logprobs(request)
            self._prompts = completion_prompts(request, models)
            self._dialect: Dialect = CompletionDialect(f"cmpl-{identity}", name, created, self._with_usage)
        else:
            assert isinstance(request, ChatCompletionRequest)
            logprobs = openai.chat_logprobs(request)
            self._prompts = [chat_prompt(request, models)]
            self._dialect = ChatDialect(f"chatcmpl-{identity}", name, created, self._with_usage)
        self._params = openai.sampling_params(request, max_tokens=1, logprobs=logprobs, vocabulary_size=vocabulary)

    def answer(self, outlet: Outlet, request_id: str) -> WholeAnswer | EventStream:
        """The sink that makes the answer."""
        openings = [prompt.opening_text for prompt in self._prompts for _ in range(self._copies)]
        tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        head = Head(request_id, len(openings), self._explain)
        if self._request.stream:
            return EventStream(outlet, self._dialect, self._places, openings, tokens, head, self._with_usage)
        return WholeAnswer(outlet, self._dialect, self._places, openings, tokens, head)

    def start(self, answer: WholeAnswer | EventStream) -> None:
        """Submit everything; outputs go to `answer`. Raises ApiError where something is refused."""
        try:
            for place, prompt in enumerate(self._prompts):
                for copy in range(self._copies):
                    params = self._choice_params(prompt, copy)
                    number = self._client.submit(
                        answer, prompt.token_ids, params, self._rank, self._request.priority, self._session,
                        self._explain,
                    )  # fmt: skip
                    self._places[number] = place * self._copies + copy
        except Refused as refusal:
            self.abandon()
            raise errors.of_refusal(refusal) from None
        answer.submitted()

    def abandon(self) -> None:
        """Abort what still runs."""
        self._client.abandon(list(self._places))

    def _choice_params(self, prompt: Prompt, copy: int) -> SamplingParams:
        # Copies of one prompt with one seed would be one answer n times over.
        seed = None if self._params.seed is None else (self._params.seed + copy) % 2**32
        return msgspec.structs.replace(self._params, max_tokens=prompt.max_tokens, seed=seed)
