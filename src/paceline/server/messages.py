"""`POST /v1/messages`, Anthropic's: its requests as chats, and its words for what a chat's answer says.

A message is a list of blocks: texts, thoughts, calls of tools, and what came of these. Each block of an answer is
opened, gets what is new, and is closed when another begins. A thought's signature is empty, since nobody checks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from paceline.server.errors import ApiError, bad
from paceline.server.fields import NULL, ChatCompletionRequest, StopString, Tokens, as_chat, only
from paceline.server.formats import CompletionFormat, Entry
from paceline.server.tools import Call, Said

Text = str | list[dict[str, Any]]


class InputMessage(Struct):
    role: Literal["user", "assistant", "system"]
    content: Text


class ToolOfMessages(Struct):
    """`input_schema`: the JSON schema of its arguments."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: Literal["custom"] | None = None
    cache_control: Raw = NULL
    strict: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """`budget_tokens` is held where the model does not think, or it leaves no answer; else it is refused."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: str | None = None


class CountRequest(Struct, kw_only=True):
    """`POST /v1/messages/count_tokens`."""

    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    model: str | None = None
    system: Text | None = None
    tools: list[ToolOfMessages] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises ApiError."""
        return as_chat(self.fields())

    def fields(self) -> dict[str, Any]:
        """The chat's fields."""
        messages = [{"role": "system", "content": _texts("system", self.system)}] if self.system else []
        for place, message in enumerate(self.messages):
            messages += _messages_of(f"messages[{place}].content", message)
        made: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            made["tools"] = [
                {"function": {"name": one.name, "description": one.description, "parameters": one.input_schema}}
                for one in self.tools
            ]
        if self.tool_choice is not None:
            made |= _choice(self.tool_choice)
        if self.thinking is not None and self.thinking.type == "disabled":
            made |= {"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": False}}
        if self.output_config is not None:
            made["reasoning_effort"] = self.output_config.effort
        # Its last message may begin the answer.
        last = messages[-1]
        if last["role"] == "assistant" and str(last["content"]).strip() and "tool_calls" not in last:
            made["continue_final_message"] = True
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema}
            made["response_format"] = {"type": "json_schema", "json_schema": schema}
        return made


class MessagesRequest(CountRequest, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Tokens
    stop_sequences: Annotated[list[StopString], Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Raw = NULL
    container: Annotated[Raw, only(None)] = NULL
    mcp_servers: Annotated[Raw, only(None)] = NULL
    context_management: Annotated[Raw, only(None)] = NULL

    def check(self, thinks: bool) -> None:
        """Refuse what a model that `thinks` cannot keep to. Raises ApiError."""
        asked = self.thinking
        budget = None if asked is None or asked.type == "disabled" else asked.budget_tokens
        if thinks and budget is not None and budget < self.max_tokens:
            raise bad("thinking.budget_tokens", "is not supported: max_tokens bounds thought and answer", "unsupported")

    def fields(self) -> dict[str, Any]:
        made = super().fields()
        for name in ("max_tokens", "stream", "temperature", "top_p", "top_k"):
            made[name] = getattr(self, name)
        user = (self.metadata or {}).get("user_id")
        return made | {"stop": self.stop_sequences, "user": user if isinstance(user, str) else None}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    made: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        if choice.name is None:
            raise bad("tool_choice.name", "is required")
        return made | {"tool_choice": {"function": {"name": choice.name}}}
    return made | {"tool_choice": "required" if choice.type == "any" else choice.type}


def _texts(param: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for place, block in enumerate(content if isinstance(content, list) else [content]):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise bad(f"{param}[{place}]", "only blocks of type 'text' are supported here")
    return "\n".join(texts)


def _messages_of(param: str, message: InputMessage) -> list[dict[str, Any]]:
    """One message as a chat has it: what came of tools stands before the rest, in messages of its own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, thoughts, calls = [], [], [], []
    for place, block in enumerate(message.content):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(identity), "name": str(name), "input": dict(given)}:
                calls.append({"id": identity, "function": {"name": name, "arguments": given}})
            case {"type": "tool_result", "tool_use_id": str(identity)}:
                said = _texts(f"{param}[{place}].content", block.get("content"))
                results.append({"role": "tool", "tool_call_id": identity, "content": said})
            case _:
                raise bad(f"{param}[{place}]", f"a block of type {str(block.get('type'))[:40]!r} is not supported here")
    rest: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        rest["tool_calls"] = calls
    if thoughts:
        rest["reasoning_content"] = "\n".join(thoughts)
    return results if results and not (texts or calls) else [*results, rest]


# Answers ------------------------------------------------------------------------------------------

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
Part = tuple[str, str, Call | None]
"""What a block gets: its kind, a text, and its call."""


def parts_of(said: Said) -> Iterator[Part]:
    """What is said, in the order of its blocks."""
    if said.reasoning:
        yield "thinking", said.reasoning, None
    if said.content:
        yield "text", said.content, None
    for call in said.calls:
        yield "tool_use", call.arguments, call


class MessagesFormat(CompletionFormat):
    """How `/v1/messages` words its responses."""

    prefix = "msg_"
    reads = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._blocks = 0
        self._open = ""
        """The kind of the block that is open."""
        self._called = False
        self._reason: Entry = {}

    def _message(self, content: list[Entry], reason: Entry, usage: Entry) -> Entry:
        kept = {name: self._whole[name] for name in ("id", "model")}
        stop: Entry = {"stop_reason": None, "stop_sequence": None} | reason
        return {**kept, "type": "message", "role": "assistant", "content": content, **stop, "usage": usage}

    def usage(self, made: int, cached: int) -> Entry:
        read = {"cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
        return {"input_tokens": self.wording.prompt_tokens - cached, "output_tokens": made} | read

    def chunk_entry(self, index: int, text: Any, logprobs: Any, finish_reason: str | None) -> Entry:
        self._called = self._called or bool(text.calls)
        if self._called and finish_reason == "stop":
            finish_reason = "tool_calls"
        return {"said": text, "finish_reason": finish_reason}

    entry = chunk_entry

    def body(self, choices: list[Entry], total: Entry) -> bytes:
        (choice,) = choices
        content = []
        for kind, text, call in parts_of(choice["said"]):
            content.append(_block(kind, call) | _filled(kind, text))
        return msgspec.json.encode(self._message(content, _reason(choice), total))

    def opening(self, index: int) -> bytes:
        return _event("message_start", message=self._message([], {}, self.usage(0, 0)))

    def event(self, choice: Entry, made: int = 0, cached: int = 0) -> bytes:
        written = b""
        for kind, text, call in parts_of(choice["said"]):
            if kind != self._open or (call is not None and call.identity):
                written += self._close()
                self._open = kind
                written += _event("content_block_start", index=self._blocks, content_block=_block(kind, call))
            if text:
                written += _event("content_block_delta", index=self._blocks, delta=_delta(kind, text))
        if choice["finish_reason"] is not None:
            self._reason = _reason(choice)
        return written

    def _close(self) -> bytes:
        if not self._open:
            return b""
        self._open, self._blocks = "", self._blocks + 1
        return _event("content_block_stop", index=self._blocks - 1)

    def ending(self, total: Entry) -> bytes:
        closed = self._close()
        return closed + _event("message_delta", delta=self._reason, usage=total) + _event("message_stop")

    @classmethod
    def error_body(cls, error: ApiError) -> Entry:
        kind = KINDS.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}

    def error_event(self, error: ApiError) -> bytes:
        return _event(**self.error_body(error))


def _event(type: str, **rest: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (type.encode(), msgspec.json.encode({"type": type, **rest}))


def _reason(choice: Entry) -> Entry:
    """Why the answer has ended; a stop sequence is named."""
    stop = choice.get("stop_reason")
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": REASONS.get(choice["finish_reason"], "end_turn"), "stop_sequence": None}


def _block(kind: str, call: Call | None) -> Entry:
    """A block with nothing in it yet."""
    if call is not None:
        return {"type": kind, "id": f"toolu_{call.identity}", "name": call.name, "input": {}}
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _filled(kind: str, text: str) -> Entry:
    if kind != "tool_use":
        return {kind: text}
    try:
        return {"input": json.loads(text)}
    except ValueError:
        # An answer that was cut off within a call.
        return {"input": {}}


def _delta(kind: str, text: str) -> Entry:
    return {"type": "input_json_delta", "partial_json": text} if kind == "tool_use" else {
        "type": f"{kind}_delta", kind: text
    }  # fmt: skip
