"""How responses are worded: what of a request's answer stands where, in each of the APIs' forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from paceline import __version__
from paceline.core.requests import PositionLogprobs, TokenLogprob
from paceline.server.errors import ApiError
from paceline.server.tools import Call, Language, Reader, Said

_encode = msgspec.json.encode

LOWEST_LOGPROB = -9999.0
FINGERPRINT = f"paceline-{__version__}"
DONE_EVENT = b"data: [DONE]\n\n"

Entry = dict[str, Any]
"""An element of `choices`."""


class Wording(Struct):
    """What a request asks of its response's form.

    `prompt_token_ids`: for each choice, as JSON, where they are shown. `with_usage`: tokens are counted in a stream's
    last event, `usage_throughout`: in all. `with_token_ids`: token ids are shown; `tokens_as_ids`: in place of text in
    log-probabilities. `with_weight_versions`: which weights chose which tokens is shown, also where there were never
    others. `none_made`: the one token that was made is not shown. `prompt_logprobs`: the prompt's are a field of their
    own; `echo_logprobs`: they come before the answer's. `reading`: the language that an answer is read in, beginning in
    `mode`; `most_calls` of tools are shown; `named`: the request says which. `with_reasoning`: it is shown.
    """

    prompt_tokens: int = 0
    prompt_token_ids: list[Raw] = []
    with_usage: bool = False
    usage_throughout: bool = False
    with_token_ids: bool = False
    tokens_as_ids: bool = False
    with_weight_versions: bool = False
    none_made: bool = False
    prompt_logprobs: bool = False
    echo_logprobs: bool = False
    reading: Language | None = None
    mode: str = "content"
    most_calls: int = 1024
    named: bool = False
    with_reasoning: bool = True

    @property
    def plain(self) -> bool:
        """Whether events differ in nothing but their text."""
        return not (self.usage_throughout or self.with_token_ids or self.none_made or self.reading is not None)


class CompletionFormat:
    """How `/v1/completions` words its responses. `identity`: the response's id; `created`: seconds since 1970; `asked`:
    the request, of which nothing is kept that may be long.
    """

    prefix = "cmpl-"
    object_name = chunk_name = "text_completion"
    reads = False
    """Whether an answer is read in any case."""

    def __init__(self, identity: str, model: str, created: int, wording: Wording, asked: Any = None) -> None:
        self.wording, self.model = wording, model
        self.response_id = f"{self.prefix}{identity}"
        whole = {"id": self.response_id, "object": self.object_name, "created": created, "model": model}
        whole["system_fingerprint"] = FINGERPRINT
        self._whole, self._chunk = whole, whole | {"object": self.chunk_name}
        self._null_usage = {"usage": None} if wording.with_usage and not wording.usage_throughout else {}

    def body(self, choices: list[Entry], total: Entry) -> bytes:
        return _encode(self._whole | {"choices": choices, "usage": total})

    def event(self, choice: Entry, made: int = 0, cached: int = 0) -> bytes:
        usage = {"usage": self.usage(made, cached)} if self.wording.usage_throughout else self._null_usage
        return stream_event(self._chunk | {"choices": [choice]} | usage)

    def usage(self, made: int, cached: int) -> Entry:
        """The `usage` object for so many tokens made, and of the prompt's not computed."""
        prompt = self.wording.prompt_tokens
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made} | details

    def reader(self) -> Reader | None:
        """What reads an answer's text, where that is more than text."""
        return None if self.wording.reading is None else Reader(self.wording.reading, self.wording.mode)

    def usage_event(self, total: Entry) -> bytes:
        return stream_event(self._chunk | {"choices": [], "usage": total})

    def ending(self, total: Entry) -> bytes:
        """What a stream ends with."""
        return (self.usage_event(total) if self.wording.with_usage else b"") + DONE_EVENT

    @classmethod
    def error_body(cls, error: ApiError) -> Entry:
        return error.body

    def error_event(self, error: ApiError) -> bytes:
        """The last event of a stream that cannot go on."""
        return stream_event(self.error_body(error))

    def splice(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain event of a choice."""
        marker = "\u0000"
        before, _, after = self.event(self.chunk_entry(index, marker, None, None)).partition(_encode(marker))
        return before, after

    def opening(self, index: int) -> bytes:
        """Events before the first token of a choice."""
        return b""

    def prompt_ids_entry(self, index: int) -> Entry:
        """Where a choice shows the prompt's token ids."""
        return {"prompt_token_ids": self.wording.prompt_token_ids[index]}

    def chunk_entry(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> Entry:
        """The `choices` entry of an event."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    entry = chunk_entry
    """That of a whole response."""

    def vector(self, data: bytes) -> Any:
        """An embedding, as it stands in a response."""
        return None

    def logprobs(self, positions: Sequence[PositionLogprobs], offsets: list[int]) -> Any:
        """The `logprobs` object of some tokens, each of which begins at a character of the text."""
        return {
            "tokens": [self.token_text(position.chosen) for position in positions],
            "token_logprobs": [_logprob(position.chosen) for position in positions],
            "top_logprobs": [self._top(position) for position in positions],
            "text_offset": offsets,
        }

    def token_text(self, token: TokenLogprob) -> str:
        return f"token_id:{token.token_id}" if self.wording.tokens_as_ids else token.piece.decode(errors="replace")

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        # Two tokens can have the same text (a byte of a character has none of its own): the likelier stays.
        top: dict[str, float] = {}
        for token in [*position.top, position.chosen]:
            top.setdefault(self.token_text(token), _logprob(token))
        return top


class ChatFormat(CompletionFormat):
    """What `/v1/chat/completions` words differently."""

    prefix = "chatcmpl-"
    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def body(self, choices: list[Entry], total: Entry) -> bytes:
        shown = {"prompt_token_ids": self.wording.prompt_token_ids[0]} if self.wording.with_token_ids else {}
        return _encode(self._whole | {"choices": choices, "usage": total} | shown)

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self.event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def prompt_ids_entry(self, index: int) -> Entry:
        return {}

    def chunk_entry(self, index: int, text: str | Said, logprobs: Any, finish_reason: str | None) -> Entry:
        # OpenAI's last event has an empty delta; one that still carries text is as common, and saves one.
        delta: Entry
        if isinstance(text, Said):
            delta = {"reasoning_content": text.reasoning} if text.reasoning else {}
            delta |= {"content": text.content} if text.content else {}
            delta |= {"tool_calls": [_call_delta(call) for call in text.calls]} if text.calls else {}
        else:
            delta = {"content": text} if text or finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def entry(self, index: int, text: str | Said, logprobs: Any, finish_reason: str | None) -> Entry:
        message: Entry = {"role": "assistant", "content": text, "refusal": None}
        if isinstance(text, Said):
            message["content"] = text.content or (None if text.calls else "")
            message |= {"reasoning_content": text.reasoning} if text.reasoning else {}
            message |= {"tool_calls": [_whole_call(call) for call in text.calls]} if text.calls else {}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, positions: Sequence[PositionLogprobs], offsets: list[int]) -> Any:
        return {
            "content": [
                self._token(position.chosen) | {"top_logprobs": [self._token(token) for token in position.top]}
                for position in positions
            ]
        }

    def _token(self, token: TokenLogprob) -> Entry:
        return {"token": self.token_text(token), "logprob": _logprob(token), "bytes": list(token.piece)}


def _whole_call(call: Call) -> Entry:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.identity, "type": "function", "function": function}


def _call_delta(call: Call) -> Entry:
    entry = _whole_call(call) if call.identity else {"function": {"arguments": call.arguments}}
    return {"index": call.index, **entry}


def stream_event(body: object) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def prompt_logprobs(positions: list[PositionLogprobs]) -> list[Entry | None]:
    """vLLM's field of this name: for each token of the prompt but the first, itself and the likeliest by token id."""
    found: list[Entry | None] = [None] if positions else []
    for position in positions[1:]:
        ranked = {token.token_id: (rank, token) for rank, token in enumerate(position.top, 1)}
        likelier = sum(token.logprob > position.chosen.logprob for token in position.top)
        ranked.setdefault(position.chosen.token_id, (likelier + 1, position.chosen))
        found.append({str(token_id): _ranked(*one) for token_id, one in ranked.items()})
    return found


def _ranked(rank: int, token: TokenLogprob) -> Entry:
    return {"logprob": _logprob(token), "rank": rank, "decoded_token": token.piece.decode(errors="replace")}


def _logprob(token: TokenLogprob) -> float:
    # JSON has no infinity; clients know this floor from OpenAI and vLLM.
    return max(token.logprob, LOWEST_LOGPROB)
