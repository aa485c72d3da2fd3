"""`POST /v1/responses`: OpenAI's newer API, as chats; its words for what a chat's answer says.

A response is a list of items: a message, reasoning, calls of tools. In a stream each item is added, gets what is new,
and is done when another begins. A request brings its whole history along, or says which response it goes on from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from paceline.server.errors import ApiError, bad
from paceline.server.fields import NULL, Alternatives, ChatCompletionRequest, Tokens, as_chat, only
from paceline.server.formats import CompletionFormat, Entry
from paceline.server.messages import Part, parts_of
from paceline.server.stored import ResponseStore, Stored


class FunctionTool(Struct):
    """`parameters`: the JSON schema of its arguments."""

    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Struct):
    name: str
    type: Literal["function"] = "function"


class TextFormat(Struct):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Struct, forbid_unknown_fields=True):
    """What a model has thought is told whole: there is no summary of it."""

    effort: str | None = None
    summary: None = None


LOGPROBS = "message.output_text.logprobs"


class ResponsesRequest(Struct, kw_only=True):
    """`POST /v1/responses`. `input`: a text, or items."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning | None = None
    store: Annotated[bool, Meta(description="true where it is left out")] | None = None
    previous_response_id: str | None = None
    # What changes no answer.
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    service_tier: Raw = NULL
    safety_identifier: Raw = NULL
    stream_options: Raw = NULL
    # What would change one.
    truncation: Annotated[Raw, only("disabled")] = NULL
    background: Annotated[Raw, only(False)] = NULL
    conversation: Annotated[Raw, only(None)] = NULL
    max_tool_calls: Annotated[Raw, only(None)] = NULL
    prompt: Annotated[Raw, only(None)] = NULL
    top_logprobs: Alternatives | None = None

    def items(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    def recall(self, store: ResponseStore | None) -> None:
        """Put what it refers to in its place: the response that it goes on from, and items by their id. Raises
        ApiError.
        """
        if store is None and self.store:
            raise bad("store", "nothing is kept here (--response-store-bytes)", "unsupported")
        self.store = store is not None and self.store is not False
        items = []
        for place, item in enumerate(self.items()):
            if item.get("type") == "item_reference":
                found = None if store is None else store.item(str(item.get("id")))
                if found is None:
                    raise bad(f"input[{place}].id", f"no item {str(item.get('id'))[:80]!r} is kept here", "not_found")
                item = found
            items.append(item)
        if self.previous_response_id is not None:
            before = None if store is None else store.get(self.previous_response_id)
            if before is None:
                text = f"no response {self.previous_response_id[:80]!r} is kept here"
                raise bad("previous_response_id", text, "previous_response_not_found")
            items = [*before.items, *before.response["output"], *items]
        self.input = items

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises ApiError."""
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            raise bad(
                "top_logprobs" if self.top_logprobs else "include", "log-probabilities are not told", "unsupported"
            )
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += messages_of(self.items())
        choice = self.tool_choice
        asked = {name: getattr(self, name) for name in AS_THEY_ARE}
        return as_chat(asked | {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tools": [{"function": msgspec.to_builtins(tool)} for tool in self.tools or []],
            "tool_choice": {"function": {"name": choice.name}} if isinstance(choice, NamedFunctionTool) else choice,
            "response_format": _format(self.text.format) if self.text and self.text.format else None,
        })  # fmt: skip


AS_THEY_ARE = ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "user", "prompt_cache_key")


def _format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": asked.schema}}


def messages_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat; neighbouring calls are one message. Raises ApiError naming the item."""
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        match item:
            case {"role": str(role), "content": str() | list() as content}:
                messages.append({"role": role, "content": _content(f"input[{place}].content", content)})
            case {"type": "function_call", "call_id": str(call), "name": str(name), "arguments": str(given)}:
                if not (messages and messages[-1]["role"] == "assistant"):
                    messages.append({"role": "assistant", "content": ""})
                made = {"id": call, "function": {"name": name, "arguments": given}}
                messages[-1].setdefault("tool_calls", []).append(made)
            case {"type": "function_call_output", "call_id": str(call), "output": str() | list() as output}:
                said = _content(f"input[{place}].output", output)
                messages.append({"role": "tool", "tool_call_id": call, "content": said})
            case {"type": "reasoning"}:
                pass  # Templates leave out what was thought before the last question.
            case _:
                kind = str(item.get("type", "message"))[:40]
                raise bad(f"input[{place}]", f"is no item of a type that is supported here: {kind!r}")
    return messages


def _content(param: str, content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)} | {"refusal": str(text)}:
                texts.append(text)
            case _:
                raise bad(f"{param}[{place}]", "only parts of text are supported")
    return "\n".join(texts)


# Answers ------------------------------------------------------------------------------------------

KINDS = {"text": "message", "thinking": "reasoning", "tool_use": "function_call"}
LETTERS = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
CHANNELS = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}


class Item(Struct):
    """One item of `output` in the making."""

    kind: str
    identity: str
    text: str = ""
    name: str = ""
    call_id: str = ""

    def shown(self, status: str) -> Entry:
        base: Entry = {"id": self.identity, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return base | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        parts = [self.part()] if self.text or status != "in_progress" else []
        if self.kind == "reasoning":
            return base | {"summary": [], "content": parts}
        return base | {"role": "assistant", "content": parts}

    def part(self, text: str | None = None) -> Entry:
        said = self.text if text is None else text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": said}
        return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}


class ResponsesFormat(CompletionFormat):
    """How `/v1/responses` words its responses."""

    prefix = "resp_"
    reads = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._identity = given[0]
        self._items: list[Item] = []
        self._open: Item | None = None
        self._number = 0
        """Of the next event."""
        self._reason: str | None = None
        asked: ResponsesRequest = given[-1]
        self._given = _repeated(asked)
        self._asked_items: Any = Raw(msgspec.json.encode(asked.items())) if asked.store else None
        self.weight = sum(map(len, self._given.values())) + len(self._asked_items or b"")
        """Bytes of the request that are repeated or kept."""
        self.kept: Stored | None = None
        """What is to be kept of it, once it has ended."""

    def _response(self, status: str, usage: Entry | None = None, error: Entry | None = None) -> Entry:
        return self._given | {
            "id": self._whole["id"], "object": "response", "created_at": self._whole["created"],
            "model": self._whole["model"], "status": status, "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [item.shown("completed") for item in self._items],
            "truncation": "disabled", "background": False,
            "usage": usage and usage | self._details(),
        }  # fmt: skip

    def _details(self) -> Entry:
        """How many tokens were reasoning: not told where there is any, since it is told apart by its text."""
        reasons = any(item.kind == "reasoning" for item in self._items)
        return {} if reasons else {"output_tokens_details": {"reasoning_tokens": 0}}

    def usage(self, made: int, cached: int) -> Entry:
        prompt = self.wording.prompt_tokens
        return {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": made,
            "total_tokens": prompt + made,
        }  # fmt: skip

    def chunk_entry(self, index: int, text: Any, logprobs: Any, finish_reason: str | None) -> Entry:
        return {"said": text, "finish_reason": finish_reason}

    entry = chunk_entry

    def body(self, choices: list[Entry], total: Entry) -> bytes:
        (choice,) = choices
        for kind, text, call in parts_of(choice["said"]):
            self._add((kind, text, call)).text = text
        return msgspec.json.encode(self._ended(_status(choice["finish_reason"]), total))

    def _ended(self, status: str, total: Entry) -> Entry:
        response = self._response(status, total)
        if self._asked_items is not None:
            self.kept = Stored(self._asked_items, response)
        return response

    def _add(self, part: Part) -> Item:
        kind, _, call = part
        kind = KINDS[kind]
        item = Item(kind, f"{LETTERS[kind]}_{self._identity}{len(self._items)}")
        if call is not None:
            item.name, item.call_id = call.name, f"call_{call.identity}"
        self._items.append(item)
        return item

    # Streams ------------------------------------------------------------------------------------

    def _event(self, type: str, **rest: Any) -> bytes:
        said = {"type": type, "sequence_number": self._number} | rest
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (type.encode(), msgspec.json.encode(said))

    def _of(self, item: Item) -> Entry:
        """Which item an event speaks of, and which part of it."""
        place = {"item_id": item.identity, "output_index": len(self._items) - 1}
        return place if item.kind == "function_call" else place | {"content_index": 0}

    def opening(self, index: int) -> bytes:
        begun = self._response("in_progress")
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def event(self, choice: Entry, made: int = 0, cached: int = 0) -> bytes:
        written = b""
        for part in parts_of(choice["said"]):
            kind, text, call = part
            if self._open is None or self._open.kind != KINDS[kind] or (call is not None and call.identity):
                written += self._close() + self._begin(self._add(part))
            item = self._open
            assert item is not None
            item.text += text
            if text:
                more: Entry = {"logprobs": []} if item.kind == "message" else {}
                written += self._event(f"response.{CHANNELS[item.kind]}.delta", **self._of(item), delta=text, **more)
        self._reason = choice["finish_reason"] or self._reason
        return written

    def _begin(self, item: Item) -> bytes:
        self._open = item
        place = len(self._items) - 1
        written = self._event("response.output_item.added", output_index=place, item=item.shown("in_progress"))
        if item.kind != "function_call":
            written += self._event("response.content_part.added", **self._of(item), part=item.part(""))
        return written

    def _close(self) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        channel, of = f"response.{CHANNELS[item.kind]}.done", self._of(item)
        if item.kind == "function_call":
            written = self._event(channel, **of, arguments=item.text, name=item.name)
        else:
            more: Entry = {"logprobs": []} if item.kind == "message" else {}
            written = self._event(channel, **of, text=item.text, **more)
            written += self._event("response.content_part.done", **of, part=item.part())
        done = item.shown("completed")
        return written + self._event("response.output_item.done", output_index=len(self._items) - 1, item=done)

    def ending(self, total: Entry) -> bytes:
        closed, status = self._close(), _status(self._reason)
        return closed + self._event(f"response.{status}", response=self._ended(status, total))

    def error_event(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": str(error)}
        return self._event("response.failed", response=self._response("failed", error=said))


REPEATED = (
    "instructions",
    "max_output_tokens",
    "temperature",
    "top_p",
    "tools",
    "tool_choice",
    "text",
    "user",
    "metadata",
    "store",
    "previous_response_id",
)


def _repeated(asked: ResponsesRequest) -> Entry:
    """What a response repeats of its request, as JSON: it may be long, and is written with several events."""
    given: Entry = {name: getattr(asked, name) for name in REPEATED}
    given["parallel_tool_calls"] = asked.parallel_tool_calls is not False
    given["tool_choice"] = asked.tool_choice or "auto"
    given["tools"] = asked.tools or []
    given["text"] = asked.text or {"format": {"type": "text"}}
    given["reasoning"] = {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None}
    return {name: Raw(msgspec.json.encode(value)) for name, value in given.items()}


def _status(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"
