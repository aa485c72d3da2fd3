"""Prompts of tokens from what clients write, without ever stopping the event loop for long.

A text may be as long as a body may, while a model takes some thousand tokens. So it is bounded before it is read: no
token is longer than the vocabulary's longest piece, and a long text is tokenized in pieces first, which is given up as
soon as they are more than fit. What is long is done in a thread (`Prompts.prepare` of `requests.py` decides), which
looks between two pieces whether anybody still waits for it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines.base import Tokenizer
from paceline.engines.chat import Conversation
from paceline.server.embeddings import EmbeddingsRequest
from paceline.server.errors import bad
from paceline.server.fields import (
    OVERLONG,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    ToolCall,
    overlong,
)

DEFAULT_COMPLETION_TOKENS = 16
PIECE = 32_768
"""Characters that are tokenized at once while it is not known whether a text fits."""
MOST_CHOICES = 4096
"""Of one request: each is a request to the ranks."""
USUAL_PIECE = 8
"""Characters that few tokens have more of on average."""
SLACK = 8
"""Tokens that a piece may have more than its text has within the whole: its ends cut words."""


BLANKS = re.compile(r"\s+")
TEXTS = ("text", "input_text", "output_text", "refusal")
"""Types of parts that hold a text."""


class Cancelled(Exception):
    """Nobody waits for the prompt any more."""


class Prompt(Struct):
    """`max_tokens`: what may be made. `echo`: the text that the answer begins with."""

    token_ids: list[int]
    max_tokens: int
    echo: str = ""


class PromptMaker:
    """Makes the prompts of one request. `limit`: tokens of prompt and answer together. `usual`: of the answer of a chat
    that names none; None: as many as there is room for.

    `cancelled` is set by whoever does not want them any more; then `Cancelled` is raised.
    """

    def __init__(
        self, tokenizer: Tokenizer, limit: int, cancelled: threading.Event | None = None, usual: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._cancelled = cancelled
        self._usual = usual

    # Texts --------------------------------------------------------------------------------------

    def tokens(
        self, text: str, most: int, param: str, *, special: bool = True, parse: bool = False,
        kept: tuple[int, bool] | None = None,
    ) -> list[int]:  # fmt: skip
        """The tokens of a text that may have `most`. Raises ApiError as soon as it is known to have more.

        `kept`: how many are kept of them, and whether the first ones; what of a long text has no part in these is not
        read.
        """
        if kept is not None:
            return self._end_of(text, *kept, special, parse)
        least = -(-len(text) // self._tokenizer.longest_piece) if len(text) > PIECE else 0
        if least > most:
            raise overlong(f"at least {least}", self._limit, param)
        encode = self._tokenizer.encode
        if len(text) > PIECE:
            found = 0
            for begin in range(0, len(text), PIECE):
                self._look()
                found += max(
                    0, len(encode(text[begin : begin + PIECE], add_special=False, parse_special=parse)) - SLACK
                )
                if found > most:
                    raise overlong(f"more than {found}", self._limit, param)
        return encode(text, add_special=special, parse_special=parse)

    def _end_of(self, text: str, kept: int, first: bool, special: bool, parse: bool) -> list[int]:
        """The tokens of so much of a text's end, or beginning, that more than `kept` come of it. The few beside the cut
        may be others than the whole text has.
        """
        size = max(PIECE, USUAL_PIECE * kept)
        while True:
            self._look()
            part = text[:size] if first else text[-size:]
            ids = self._tokenizer.encode(part, add_special=special, parse_special=parse)
            if len(ids) > kept + SLACK or size >= len(text):
                return ids
            size *= 2

    def _kept(self, request: GenerationRequest | EmbeddingsRequest) -> tuple[int, bool] | None:
        asked = request.truncate_prompt_tokens
        if asked is None:
            return None
        return self._limit if asked == -1 else asked, request.truncation_side == "right"

    def _look(self) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise Cancelled

    # Completions --------------------------------------------------------------------------------

    def completion(self, request: CompletionRequest) -> list[Prompt]:
        """The checked prompts of a completion. Raises ApiError."""
        given = request.prompt
        if given is None or given == "":
            raise bad("prompt", "must not be empty" if given == "" else "is required")
        parts = [given] if isinstance(given, str) else token_prompts(given, self._tokenizer.vocabulary_size)
        if len(parts) * (request.n or 1) > MOST_CHOICES:
            raise bad("prompt", f"{len(parts)} prompts with n = {request.n or 1} are more than {MOST_CHOICES} choices")
        return [self._completion_prompt(request, part) for part in parts]

    def _completion_prompt(self, request: CompletionRequest, part: str | list[int]) -> Prompt:
        self._look()
        ids = part
        if isinstance(part, str):
            special, kept = request.add_special_tokens is not False, self._kept(request)
            ids = self.tokens(part, self._limit, "prompt", special=special, parse=request.parse_special, kept=kept)
        assert isinstance(ids, list)
        ids = truncated(ids, request, self._limit)
        tokens = max_tokens_of("max_tokens", request.max_tokens, DEFAULT_COMPLETION_TOKENS, len(ids), self._limit)
        if not request.echo:
            return Prompt(ids, tokens)
        whole = isinstance(part, str) and request.truncate_prompt_tokens is None
        return Prompt(ids, tokens, part if whole else self._tokenizer.decode(ids))  # type: ignore[arg-type]

    def embeddings(self, request: EmbeddingsRequest) -> list[Prompt]:
        """The checked inputs of embeddings. Raises ApiError."""
        given = request.input
        if not given:
            raise bad("input", "must not be empty")
        parts = [given] if isinstance(given, str) else token_prompts(given, self._tokenizer.vocabulary_size, "input")
        if len(parts) > MOST_CHOICES:
            raise bad("input", f"must be at most {MOST_CHOICES} inputs, not {len(parts)}")
        prompts = []
        for part in parts:
            self._look()
            ids = part
            if isinstance(part, str):
                special, kept = request.add_special_tokens is not False, self._kept(request)
                ids = self.tokens(part, self._limit, "input", special=special, kept=kept)
            assert isinstance(ids, list)
            # Nothing is made, so that the prompt may be all that fits.
            ids = truncated(ids, request, self._limit + 1)
            if len(ids) > self._limit:
                raise overlong(str(len(ids)), self._limit, "input")
            prompts.append(Prompt(ids, 1))
        return prompts

    # Chats --------------------------------------------------------------------------------------

    def chat(self, request: ChatCompletionRequest) -> Prompt:
        """The checked prompt of a chat completion. Raises ApiError."""
        if len(request.messages) > self._limit:
            raise overlong(f"at least {len(request.messages)}", self._limit, "messages")
        self._bound(sum(map(_written, request.messages)), request)
        generation = request.add_generation_prompt
        if request.continue_final_message and generation:
            raise bad("continue_final_message", "cannot be combined with add_generation_prompt")
        effort = {} if request.reasoning_effort is None else {"reasoning_effort": request.reasoning_effort}
        conversation = Conversation(
            [_message(place, message) for place, message in enumerate(request.messages)],
            add_generation_prompt=not request.continue_final_message if generation is None else generation,
            continue_final_message=bool(request.continue_final_message),
            tools=None if request.tool_choice == "none" else msgspec.to_builtins(request.tools or []) or None,
            documents=request.documents,
            template=request.chat_template,
            arguments=effort | (request.chat_template_kwargs or {}),
        )
        ids = truncated(self._chat_tokens(conversation, request), request, self._limit)
        asked, param = request.max_tokens, "max_tokens"
        other = request.max_completion_tokens
        if other is not None and (asked is None or other < asked):
            asked, param = other, "max_completion_tokens"
        return Prompt(ids, max_tokens_of(param, asked, self._usual, len(ids), self._limit, "messages"))

    def _bound(self, characters: int, request: ChatCompletionRequest) -> None:
        """Raises ApiError where messages of so many characters are known not to fit."""
        if characters > PIECE and request.truncate_prompt_tokens is None:
            least = -(-characters // self._tokenizer.longest_piece)
            if least > self._limit:
                raise overlong(f"at least {least}", self._limit, "messages")

    def _chat_tokens(self, conversation: Conversation, request: ChatCompletionRequest) -> list[int]:
        kept = self._kept(request)
        most = self._limit if kept is None else 2**53
        try:
            fragments = self._tokenizer.chat(conversation)
        except ValueError as error:
            param = "chat_template" if conversation.template else "messages"
            raise bad(param, str(error)) from None
        # The template has put the special tokens where they belong; more of them only where they are asked for.
        ids: list[int] = self._tokenizer.encode("", add_special=True) if request.add_special_tokens else []
        for fragment in fragments:
            if isinstance(fragment, int):
                ids.append(fragment)
                continue
            self._look()
            ids += self.tokens(fragment, most - len(ids), "messages", special=False, kept=kept)
            if len(ids) > most:
                raise overlong(f"more than {len(ids) - 1}", self._limit, "messages")
        return ids


def token_prompts(prompt: Sequence[Any], vocabulary_size: int, param: str = "prompt") -> list[str | list[int]]:
    """A `prompt` that is a list, as prompts of text or token ids. Raises ApiError."""
    if not prompt:
        raise bad(param, "must not be empty")
    if all(isinstance(part, int) for part in prompt):
        return [token_ids(param, list(prompt), vocabulary_size)]
    prompts: list[str | list[int]] = []
    for place, part in enumerate(prompt):
        if not part:
            raise bad(f"{param}[{place}]", "must not be empty")
        if isinstance(part, int) or type(part) is not type(prompt[0]):
            raise bad(f"{param}[{place}]", "must be all text, or all token ids")
        prompts.append(part if isinstance(part, str) else token_ids(f"{param}[{place}]", part, vocabulary_size))
    return prompts


def token_ids(param: str, ids: list[int], vocabulary_size: int) -> list[int]:
    """The ids. Raises ApiError where one is none of the model's."""
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocabulary_size)
        raise bad(param, f"{wrong} is no token id of this model (0 to {vocabulary_size - 1})")
    return ids


def truncated(ids: list[int], request: GenerationRequest | EmbeddingsRequest, limit: int) -> list[int]:
    """What `truncate_prompt_tokens` leaves of a prompt: its end, or with `truncation_side` its beginning."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = limit - 1
    if most == 0 or most >= limit:
        raise bad("truncate_prompt_tokens", f"must be -1, or 1 to {limit - 1}, not {most}")
    return ids[:most] if request.truncation_side == "right" else ids[-most:]


def _written(message: ChatMessage) -> int:
    """Characters that a message brings into the prompt at least: of JSON a sixth, where all is escaped."""
    content = message.content or ""
    parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    calls = [call.function.arguments for call in message.tool_calls or ()]
    return sum(map(len, parts)) + sum(len(BLANKS.sub("", one)) for one in calls if isinstance(one, str)) // 6


def _message(place: int, message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it: its content as text, the arguments of its tool calls as objects."""
    content = message.content
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            text = part.get("refusal" if part.get("type") == "refusal" else "text")
            if part.get("type") not in TEXTS or not isinstance(text, str):
                raise bad(f"messages[{place}].content[{number}]", "only parts of type 'text' are supported")
            texts.append(text)
        content = "\n".join(texts)
    if content is None:
        if message.role != "assistant":
            raise bad(f"messages[{place}].content", "is required")
        content = ""
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        made["tool_calls"] = [
            _tool_call(f"messages[{place}].tool_calls[{number}]", call)
            for number, call in enumerate(message.tool_calls)
        ]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    return made


def _tool_call(param: str, call: ToolCall) -> dict[str, Any]:
    function, arguments = call.function, call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise bad(f"{param}.function.arguments", "must be a text that holds a JSON object") from None
    made = {"type": "function", "function": {"name": function.name, "arguments": arguments}}
    return {"id": call.id, **made} if call.id is not None else made


def max_tokens_of(
    param: str, asked: int | None, default: int | None, prompt_tokens: int, limit: int, prompt_param: str = "prompt"
) -> int:
    """The checked number of tokens to make. `limit`: tokens of prompt and answer together."""
    left = limit - prompt_tokens
    if left < 1 and not (left == 0 and asked == 0):
        raise overlong(str(prompt_tokens), limit, prompt_param)
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        text = (
            f"{asked} is too large. This model's maximum context length is {limit} tokens, "
            f"and the prompt has {prompt_tokens} of them"
        )
        raise bad(param, text, OVERLONG)
    return asked
