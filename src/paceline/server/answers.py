"""The OpenAI API's answers: bodies and stream events, from outputs.

A streamed token costs what it must: the parts of an event that do not change are encoded once for a
choice, and each token adds its own text between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from paceline.core.requests import Output, PositionLogprobs, TokenLogprob

_encode = msgspec.json.encode

LOWEST_LOGPROB = -9999.0
DONE_EVENT = b"data: [DONE]\n\n"
OutputLogprobs = list[PositionLogprobs] | None


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The `usage` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Dialect:
    """How one endpoint words its answers. `identity`: the answer's id; `created`: seconds since 1970."""

    object_name: str
    chunk_name: str

    def __init__(self, identity: str, model: str, created: int, null_usage: bool) -> None:
        self._head: dict[str, Any] = {"id": identity, "object": "", "created": created, "model": model}
        self._null_usage = null_usage

    def body(self, choices: list[dict[str, Any]], total: dict[str, int]) -> bytes:
        """The whole answer."""
        return _encode(self._head | {"object": self.object_name, "choices": choices, "usage": total})

    def usage_event(self, total: dict[str, int]) -> bytes:
        """The event that ends a stream with `include_usage`."""
        return event(self._head | {"object": self.chunk_name, "choices": [], "usage": total})

    def opening(self, index: int) -> bytes:
        """Events before the first token of a choice."""
        return b""

    def splice(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain event of a choice."""
        marker = "\u0000"
        whole = self.chunk(index, marker, None, None, None)
        before, _, after = whole.partition(_encode(marker))
        return before, after

    def chunk(
        self, index: int, text: str, logprobs: Any, finish_reason: str | None, stop_reason: str | int | None
    ) -> bytes:
        """Any event of a choice."""
        choice = self.chunk_choice(index, text, logprobs, finish_reason)
        if stop_reason is not None:
            choice["stop_reason"] = stop_reason
        body = self._head | {"object": self.chunk_name, "choices": [choice]}
        if self._null_usage:
            body["usage"] = None
        return event(body)

    def chunk_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The `choices` entry of an event."""
        raise NotImplementedError

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The `choices` entry of a whole answer."""
        raise NotImplementedError

    def logprobs(self, positions: Sequence[PositionLogprobs], offset: int) -> Any:
        """The `logprobs` object of some tokens, the first of which begins at character `offset`."""
        raise NotImplementedError


class CompletionDialect(Dialect):
    """`/v1/completions`."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def chunk_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    choice = chunk_choice

    def logprobs(self, positions: Sequence[PositionLogprobs], offset: int) -> Any:
        tokens, offsets = [], []
        for position in positions:
            tokens.append(_text(position.chosen))
            offsets.append(offset)
            offset += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [_logprob(position.chosen) for position in positions],
            "top_logprobs": [_top(position) for position in positions],
            "text_offset": offsets,
        }


class ChatDialect(Dialect):
    """`/v1/chat/completions`."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        body = self._head | {"object": self.chunk_name, "choices": [choice]}
        return event(body | {"usage": None} if self._null_usage else body)

    def chunk_choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        # OpenAI's last event has an empty delta; one that still carries text is as common, and saves one.
        delta = {"content": text} if text or finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, positions: Sequence[PositionLogprobs], offset: int) -> Any:
        return {
            "content": [
                _chat_token(position.chosen) | {"top_logprobs": [_chat_token(token) for token in position.top]}
                for position in positions
            ]
        }


class StreamedChoice:
    """Turns the outputs of one choice into stream events."""

    __slots__ = ("_after", "_before", "_dialect", "_index", "_offset", "_pending", "tokens")

    def __init__(self, dialect: Dialect, index: int) -> None:
        self._dialect = dialect
        self._index = index
        self._before, self._after = dialect.splice(index)
        self._offset = 0
        self._pending: list[PositionLogprobs] = []
        self.tokens = 0

    def events(self, output: Output) -> bytes:
        """The event for an output; empty while its text is held back."""
        self.tokens += len(output.token_ids)
        if output.logprobs is None and output.finish_reason is None and not self._pending:
            return self._before + _encode(output.text) + self._after if output.text else b""
        self._pending += output.logprobs or ()
        if not output.text and output.finish_reason is None:
            return b""
        logprobs = self._dialect.logprobs(self._pending, self._offset) if self._pending else None
        self._offset += len(output.text)
        self._pending = []
        return self._dialect.chunk(self._index, output.text, logprobs, output.finish_reason, output.stop_reason)


class WholeChoice:
    """Gathers the outputs of one choice into its entry of a whole answer."""

    def __init__(self, dialect: Dialect, index: int, opening_text: str = "") -> None:
        self._dialect = dialect
        self._index = index
        self._texts = [opening_text]
        self._positions: list[PositionLogprobs] | None = None
        self._last: Output | None = None
        self.tokens = 0

    def add(self, output: Output) -> None:
        """One more output."""
        self.tokens += len(output.token_ids)
        self._texts.append(output.text)
        if output.logprobs is not None:
            self._positions = (self._positions or []) + output.logprobs
        if output.finish_reason is not None:
            self._last = output

    def entry(self) -> dict[str, Any]:
        """The `choices` entry."""
        logprobs = None if self._positions is None else self._dialect.logprobs(self._positions, 0)
        reason = self._last.finish_reason if self._last else None
        entry = self._dialect.choice(self._index, "".join(self._texts), logprobs, reason)
        if self._last is not None and self._last.stop_reason is not None:
            entry["stop_reason"] = self._last.stop_reason
        return entry


def _text(token: TokenLogprob) -> str:
    return token.piece.decode(errors="replace")


def _logprob(token: TokenLogprob) -> float:
    # JSON has no infinity; clients know this floor from OpenAI and vLLM.
    return max(token.logprob, LOWEST_LOGPROB)


def _top(position: PositionLogprobs) -> dict[str, float]:
    # Two tokens can have the same text (a byte of a character has none of its own): the likelier stays.
    top: dict[str, float] = {}
    for token in [*position.top, position.chosen]:
        top.setdefault(_text(token), _logprob(token))
    return top


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(token), "logprob": _logprob(token), "bytes": list(token.piece)}
