"""What a client is sent: one machine for completions and chat, streamed and whole.

    write = response.handle(event)

Events are what becomes of the requests behind the response (they are submitted, placed, make tokens, are refused) and
whether its client reads. The shell writes what `handle` returns, in order, and says `Blocked` where a write has to
wait; then nothing is to be written until it has said `Unblocked`.

    opening: nothing is sent yet. The response headers name the ranks, so a stream's go out when all requests have
        theirs, or with the first token where some still wait. Until then a failure has a status of its own.
    streaming: each token goes out as it comes. A failure is an event, and the last one.
    ended: the last write was made, or is kept for a client that does not read. What comes now is void.

A whole response goes from opening to ended. While the client does not read, writes are kept up to a bound; past it the
client is given up.

A streamed token costs what it must: the parts of an event that do not change are encoded once for a choice, and each
token adds its own text between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import accumulate
from typing import Any

import msgspec
from msgspec import Struct

from paceline.core.frontend.events import Placed, Refuse
from paceline.core.requests import Output, PositionLogprobs, TokenLogprob
from paceline.core.routing.policy import Decision
from paceline.server.errors import ApiError, error_response

_encode = msgspec.json.encode

LOWEST_LOGPROB = -9999.0
DONE_EVENT = b"data: [DONE]\n\n"
RANK_HEADER = b"x-data-parallel-rank"
ROUTING_HEADER = b"x-paceline-routing"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

MAX_KEPT_BYTES = 4 * 1024 * 1024
"""What is kept for a client that does not read, besides what the socket and the server hold."""

MAX_DECISIONS = 4
MAX_DECISIONS_BYTES = 4096
"""Some proxies refuse longer headers."""
MAX_DECISION_TEXT = 120

RawHeaders = Sequence[tuple[bytes, bytes]]
Entry = dict[str, Any]
"""An element of `choices`."""


# Events and what to do ----------------------------------------------------------------------------


class Submitted(Struct, frozen=True):
    """All requests were taken. Their numbers, one for each choice."""

    requests: list[int]


class CutOff(Struct, frozen=True):
    """The server ends before the response does."""


class Blocked(Struct, frozen=True):
    """The client does not read: the last write waits."""


class Unblocked(Struct, frozen=True):
    """That write is done."""


Event = Output | Placed | Refuse | Submitted | CutOff | Blocked | Unblocked


class Write(Struct, frozen=True, gc=False):
    """Send this. `status` is not 0 where the response begins; `last`: where it ends."""

    data: bytes
    last: bool = False
    status: int = 0
    headers: RawHeaders = ()


class GiveUp(Struct, frozen=True):
    """Break the connection: the client reads too little."""


Effect = Write | GiveUp


class Phase(Enum):
    OPENING = "opening"
    STREAMING = "streaming"
    ENDED = "ended"


# An enumeration's members are slow to look up in it.
OPENING, STREAMING, ENDED = Phase


# The machine --------------------------------------------------------------------------------------


class Response:
    """One response. `opening_texts`: what each choice begins with, of which each is a request of its own.

    `stream`: send each token; `with_usage`: count them in an event of its own. `explain`: say why each rank was chosen.
    """

    def __init__(
        self, form: CompletionFormat, request_id: str, opening_texts: list[str], prompt_tokens: int, *,
        stream: bool = False, with_usage: bool = False, explain: bool = False,
    ) -> None:  # fmt: skip
        self.phase = OPENING
        self.given_up = False
        self._form = form
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._stream = stream
        self._with_usage = with_usage
        self._choices = [Choice(form, index, text, stream) for index, text in enumerate(opening_texts)]
        self._choice_of: dict[int, Choice] = {}
        self._left = self._unplaced = len(opening_texts)
        self._ranks: list[int] = []
        self._decisions: list[Decision] | None = [] if explain else None
        self._kept: list[bytes] | None = None
        """Writes for a client that does not read; None while it does."""
        self._kept_bytes = 0

    def handle(self, event: Event) -> Effect | None:
        """Take in one event; returns what to do."""
        if type(event) is Output and event.finish_reason is None and self.phase is STREAMING:
            data = self._choice_of[event.request].event(event)
            return (Write(data) if self._kept is None else self._write(data)) if data else None
        if self.phase is ENDED and type(event) is not Unblocked:
            return None
        match event:
            case Output():
                return self._on_output(event)
            case Placed():
                return self._on_placed(event)
            case Submitted():
                self._choice_of = dict(zip(event.requests, self._choices, strict=True))
                return self._begin_when_placed()
            case Refuse():
                return self._fail(of_refusal(event))
            case CutOff():
                text = "the server has shut down"
                return self._fail(ApiError(503, text, kind="server_error", code="shutting_down", retry_after_s=1))
            case Blocked():
                self._kept = []
            case Unblocked():
                return self._write_kept()
        return None

    # Beginning and ending -----------------------------------------------------------------------

    def _on_placed(self, placed: Placed) -> Effect | None:
        self._unplaced -= 1
        if placed.rank not in self._ranks:
            self._ranks.append(placed.rank)
        if self._decisions is not None and placed.decision is not None:
            self._decisions.append(placed.decision)
        return self._begin_when_placed()

    def _begin_when_placed(self) -> Effect | None:
        # Not before all are submitted: the next one may be refused.
        if self._stream and self._choice_of and not self._unplaced and self.phase is OPENING:
            return self._write_event(b"")
        return None

    def _on_output(self, output: Output) -> Effect | None:
        """Any output but those in the midst of a stream."""
        if output.finish_reason == "error":
            error = output.error or "the rank failed"
            return self._fail(ApiError(500, error, kind="server_error", code="engine_error"))
        choice = self._choice_of[output.request]
        self._left -= output.finish_reason is not None
        if not self._stream:
            choice.take(output)
            return None if self._left else self._write_whole()
        data = choice.event(output)
        if self._left:
            return self._write_event(data)
        if self._with_usage:
            data += self._form.usage_event(self._usage())
        return self._write_event(data + DONE_EVENT, last=True)

    def _fail(self, error: ApiError) -> Effect | None:
        if self.phase is STREAMING:
            return self._write(stream_event(error.body), last=True)
        response = error_response(error, self._request_id)
        return self._start(response.status_code, response.raw_headers, bytes(response.body), last=True)

    def _usage(self) -> dict[str, int]:
        completion = sum(choice.tokens for choice in self._choices)
        total = self._prompt_tokens + completion
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": completion, "total_tokens": total}

    def _headers(self) -> RawHeaders:
        """What is known so far: the ranks in order of first use."""
        found = [(b"x-request-id", self._request_id.encode("latin-1", "replace"))]
        if self._ranks:
            found.append((RANK_HEADER, ",".join(map(str, self._ranks)).encode()))
        if self._decisions is not None:
            found.append((ROUTING_HEADER, decisions_value(self._decisions)))
        return found

    # Writing ------------------------------------------------------------------------------------

    def _write_whole(self) -> Effect:
        body = self._form.body([choice.entry(self._form.entry) for choice in self._choices], self._usage())
        plain = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        return self._start(200, [*self._headers(), *plain], body, last=True)

    def _write_event(self, data: bytes, last: bool = False) -> Effect | None:
        """Write `data` of a stream, behind the response headers where they have not gone out."""
        if self.phase is not OPENING:
            return self._write(data, last) if data else None
        opening = b"".join([choice.opening() for choice in self._choices])
        return self._start(200, [*self._headers(), *STREAM_HEADERS], opening + data, last)

    def _start(self, status: int, headers: RawHeaders, data: bytes, last: bool) -> Write:
        """The first write: nothing can be kept yet."""
        self.phase = ENDED if last else STREAMING
        return Write(data, last, status, headers)

    def _write(self, data: bytes, last: bool = False) -> Effect | None:
        if last:
            self.phase = ENDED
        if self._kept is None:
            return Write(data, last)
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes <= MAX_KEPT_BYTES:
            return None
        self.phase, self.given_up = ENDED, True
        self._kept.clear()
        return GiveUp()

    def _write_kept(self) -> Effect | None:
        kept, self._kept, self._kept_bytes = self._kept, None, 0
        return Write(b"".join(kept), self.phase is ENDED) if kept else None


class Choice:
    """One element of `choices` in the making: its event, or all of it."""

    __slots__ = ("_after", "_before", "_form", "_index", "_last", "_offset", "_opening_text", "_positions", "_texts",
                 "tokens")  # fmt: skip

    def __init__(self, form: CompletionFormat, index: int, opening_text: str, stream: bool) -> None:
        self.tokens = 0
        self._form = form
        self._index = index
        self._opening_text = opening_text if stream else ""
        self._texts = [] if stream else [opening_text]
        """What no event has carried yet, as are `_positions`."""
        self._positions: list[PositionLogprobs] | None = None
        self._last: Output | None = None
        self._offset = 0
        self._before, self._after = form.splice(index) if stream else (b"", b"")

    def opening(self) -> bytes:
        """The events before the first token."""
        opening, text = self._form.opening(self._index), self._opening_text
        return opening + self._before + _encode(text) + self._after if text else opening

    def event(self, output: Output) -> bytes:
        """The event for an output; empty while its text is held back."""
        if output.logprobs is None and output.finish_reason is None and self._positions is None:
            self.tokens += len(output.token_ids)
            return self._before + _encode(output.text) + self._after if output.text else b""
        self.take(output)
        if not output.text and output.finish_reason is None:
            return b""
        return self._form.event(self.entry(self._form.chunk_entry))

    def take(self, output: Output) -> None:
        self.tokens += len(output.token_ids)
        self._texts.append(output.text)
        if output.logprobs is not None:
            self._positions = (self._positions or []) + output.logprobs
        self._last = output

    def entry(self, worded: Callable[[int, str, Any, str | None], Entry]) -> Entry:
        """What no event has carried yet, in these words."""
        text, last = "".join(self._texts), self._last
        logprobs = None if self._positions is None else self._form.logprobs(self._positions, self._offset)
        entry = worded(self._index, text, logprobs, last.finish_reason if last else None)
        if last is not None and last.stop_reason is not None:
            entry["stop_reason"] = last.stop_reason
        self._texts, self._positions = [], None
        self._offset += len(text)
        return entry


# Formats ------------------------------------------------------------------------------------------


class CompletionFormat:
    """How `/v1/completions` words its responses. `identity`: the response's id; `created`: seconds since 1970."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, identity: str, model: str, created: int, null_usage: bool) -> None:
        whole = {"id": f"{self.prefix}-{identity}", "object": self.object_name, "created": created, "model": model}
        self._whole, self._chunk = whole, whole | {"object": self.chunk_name}
        self._null_usage = {"usage": None} if null_usage else {}

    def body(self, choices: list[Entry], total: dict[str, int]) -> bytes:
        return _encode(self._whole | {"choices": choices, "usage": total})

    def event(self, choice: Entry) -> bytes:
        return stream_event(self._chunk | {"choices": [choice]} | self._null_usage)

    def usage_event(self, total: dict[str, int]) -> bytes:
        return stream_event(self._chunk | {"choices": [], "usage": total})

    def splice(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain event of a choice."""
        marker = "\u0000"
        before, _, after = self.event(self.chunk_entry(index, marker, None, None)).partition(_encode(marker))
        return before, after

    def opening(self, index: int) -> bytes:
        """Events before the first token of a choice."""
        return b""

    def chunk_entry(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> Entry:
        """The `choices` entry of an event."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    entry = chunk_entry
    """That of a whole response."""

    def logprobs(self, positions: Sequence[PositionLogprobs], offset: int) -> Any:
        """The `logprobs` object of some tokens, the first of which begins at character `offset`."""
        texts = [_text(position.chosen) for position in positions]
        return {
            "tokens": texts,
            "token_logprobs": [_logprob(position.chosen) for position in positions],
            "top_logprobs": [_top(position) for position in positions],
            "text_offset": [*accumulate(map(len, texts), initial=offset)][:-1],
        }


class ChatFormat(CompletionFormat):
    """What `/v1/chat/completions` words differently."""

    prefix = "chatcmpl"
    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self.event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk_entry(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> Entry:
        # OpenAI's last event has an empty delta; one that still carries text is as common, and saves one.
        delta = {"content": text} if text or finish_reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def entry(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> Entry:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, positions: Sequence[PositionLogprobs], offset: int) -> Any:
        return {
            "content": [
                _chat_token(position.chosen) | {"top_logprobs": [_chat_token(token) for token in position.top]}
                for position in positions
            ]
        }


# Words --------------------------------------------------------------------------------------------


def stream_event(body: object) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


def of_refusal(refusal: Refuse) -> ApiError:
    """What the client of a refused request is told."""
    text, retry_after_s = refusal.text, refusal.retry_after_s
    match refusal.reason:
        case "unknown-rank":
            return ApiError(400, f"X-data-parallel-rank: {text}", param="X-data-parallel-rank", code="unknown_rank")
        case "overloaded":
            return ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)
        case reason:
            code = reason.replace("-", "_")
            return ApiError(503, text, kind="server_error", code=code, retry_after_s=retry_after_s)


def decisions_value(decisions: list[Decision]) -> bytes:
    """`X-Paceline-Routing`, what each choice of a rank was based on: a JSON array of the first of them, in ASCII."""
    shown = [
        msgspec.structs.replace(one, policy=one.policy[:MAX_DECISION_TEXT], reason=one.reason[:MAX_DECISION_TEXT])
        for one in decisions[:MAX_DECISIONS]
    ]
    while True:
        # A policy of somebody else's may have any name and give any reason.
        value = msgspec.json.encode(shown).decode().encode("ascii", "replace")
        if len(value) <= MAX_DECISIONS_BYTES or len(shown) <= 1:
            return value
        shown.pop()


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
