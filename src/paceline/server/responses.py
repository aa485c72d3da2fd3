"""What a client is sent: one machine for completions and chat, streamed and whole.

    write = response.handle(event)

Events are what becomes of the requests behind the response (they are submitted, placed, make tokens, are refused) and
whether its client reads. The shell writes what `handle` returns, in order, and says `Blocked` where a write has to
wait; then nothing is to be written until it has said `Unblocked`.

    opening: nothing is sent yet. The response headers name the ranks, so a stream's go out when all requests have
        theirs, or with the first token where some still wait, or a comment where nothing comes. Until then a failure
        has a status of its own.
    streaming: each token goes out as it comes; what stands before a choice's first token goes with it, since load
        generators take the first event for it. A failure is an event, and the last one.
    ended: the last write was made, or is kept for a client that does not read. What comes now is void.

A request of many choices is submitted piece by piece: the machine says how many more it `wants` now, and the shell
submits the next. So no request has more than `MOST_AT_ONCE` of its own in the queue, and what is refused for want of
room, while others of it run, is submitted again when one of them has ended.

A whole response goes from opening to ended. While the client does not read, writes are kept up to a bound; past it the
client is given up.

A streamed token costs what it must: the parts of an event that do not change are encoded once for a choice, and each
token adds its own text between them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgspec
from msgspec import Struct

from paceline.core.frontend.events import Placed, Refuse
from paceline.core.requests import Output, PositionLogprobs
from paceline.core.routing.policy import Decision
from paceline.server.errors import ApiError, error_response
from paceline.server.formats import CompletionFormat, Entry, prompt_logprobs
from paceline.server.tools import Reader, Said

_encode = msgspec.json.encode

COMMENT = b": waiting\n\n"
"""An event stream's comment, which clients leave out: a proxy that sees nothing for long cuts the connection."""
BAD_REQUEST = "bad_request"
DEFAULT_VERSION = "default"
"""vLLM's name for the weights that a rank starts with."""
RANK_HEADER = b"x-data-parallel-rank"
ROUTING_HEADER = b"x-paceline-routing"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

MAX_KEPT_BYTES = 4 * 1024 * 1024
"""What is kept for a client that does not read, besides what the socket and the server hold."""

MOST_AT_ONCE = 256
"""Choices of one request that are submitted and have not ended: some times what a rank runs at once."""
DEFECT = ApiError(500, "internal error", kind="server_error", code="internal_error")

MAX_DECISIONS = 4
MAX_DECISIONS_BYTES = 4096
"""Some proxies refuse longer headers."""
MAX_DECISION_TEXT = 120

RawHeaders = Sequence[tuple[bytes, bytes]]


# Events and what to do ----------------------------------------------------------------------------


class Submitted(Struct, frozen=True):
    """The next choice was submitted as this request."""

    request: int


class Failed(Struct, frozen=True):
    """A defect of ours: the response cannot go on."""


class CutOff(Struct, frozen=True):
    """The server ends before the response does."""


class Quiet(Struct, frozen=True):
    """Nothing was written for a while: its ranks are on their way, or slow."""


class Blocked(Struct, frozen=True):
    """The client does not read: the last write waits."""


class Unblocked(Struct, frozen=True):
    """That write is done."""


Event = Output | Placed | Refuse | Submitted | CutOff | Failed | Quiet | Blocked | Unblocked


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

    `stream`: send each token. `explain`: say why each rank was chosen. `headers`: go with the answer, whatever it is.
    """

    def __init__(
        self, form: CompletionFormat, request_id: str, opening_texts: list[str], *, stream: bool = False,
        explain: bool = False, headers: RawHeaders = (),
    ) -> None:  # fmt: skip
        self.phase = OPENING
        self._more_headers = headers
        self.given_up = False
        self.name = request_id[:128]
        self._form = form
        self._request_id = request_id
        self._stream = stream
        self._choices = [Choice(form, index, text, stream) for index, text in enumerate(opening_texts)]
        self._choice_of: dict[int, Choice] = {}
        self._next = 0
        """The choice to be submitted next; what is `_refused` for want of room is submitted again, when one has ended
        (`_rests` until then)."""
        self._refused: set[int] = set()
        self._again: list[Choice] = []
        self._rests = False
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
                return self._on_submitted(event.request)
            case Refuse():
                return self._on_refused(event)
            case Failed():
                return self._fail(DEFECT)
            case CutOff():
                text = "the server has shut down"
                return self._fail(ApiError(503, text, kind="server_error", code="shutting_down", retry_after_s=1))
            case Quiet() if self._stream and self._choice_of and self._kept is None:
                return self._write_event(COMMENT)
            case Blocked():
                self._kept = []
            case Unblocked():
                return self._write_kept()
        return None

    # Requests -----------------------------------------------------------------------------------

    @property
    def wants(self) -> bool:
        """Whether the next choice is to be submitted now."""
        return self._waiting and not self._rests and len(self._choice_of) < MOST_AT_ONCE and self.phase is not ENDED

    @property
    def _waiting(self) -> bool:
        return bool(self._again) or self._next < len(self._choices)

    def next_choice(self) -> int:
        """The index of the choice that is to be submitted."""
        return self._again[-1].index if self._again else self._next

    def _on_submitted(self, request: int) -> Effect | None:
        choice = self._again.pop() if self._again else self._choices[self._next]
        if choice.index == self._next:
            self._next += 1
        if request in self._refused:
            self._refused.discard(request)
            self._again.append(choice)
            self._rests = True
            return None
        self._choice_of[request] = choice
        return self._begin_when_placed()

    def _on_refused(self, refusal: Refuse) -> Effect | None:
        known = refusal.request in self._choice_of
        if refusal.reason != "overloaded" or len(self._choice_of) - known < 1:
            return self._fail(of_refusal(refusal))
        if not known:
            self._refused.add(refusal.request)
            return None
        choice = self._choice_of.pop(refusal.request)
        if choice.tokens:
            return self._fail(of_refusal(refusal))
        self._again.append(choice)
        self._rests = True
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
        if self._stream and not self._waiting and self._unplaced <= 0 and self.phase is OPENING:
            return self._write_event(b"")
        return None

    def _on_output(self, output: Output) -> Effect | None:
        """Any output but those in the midst of a stream."""
        if output.finish_reason == "error":
            error = output.error or "the rank failed"
            if output.stop_reason == BAD_REQUEST:
                return self._fail(ApiError(400, error, code="bad_request"))
            return self._fail(ApiError(500, error, kind="server_error", code="engine_error"))
        choice = self._choice_of[output.request]
        if output.finish_reason is not None:
            del self._choice_of[output.request]
            self._left -= 1
            self._rests = False
        if not self._stream:
            choice.take(output)
            return None if self._left else self._write_whole()
        data = choice.event(output)
        if self._left:
            return self._write_event(data)
        return self._write_event(data + self._form.ending(self._usage()), last=True)

    def _fail(self, error: ApiError) -> Effect | None:
        if self.phase is STREAMING:
            return self._write(self._form.error_event(error), last=True)
        response = error_response(error, self._request_id, self._form.error_body(error))
        headers = [*response.raw_headers, *self._more_headers]
        return self._start(response.status_code, headers, bytes(response.body), last=True)

    def _usage(self) -> Entry:
        return self._form.usage(
            sum(choice.tokens for choice in self._choices), sum(choice.cached_tokens for choice in self._choices)
        )

    def _headers(self) -> RawHeaders:
        """What is known so far: the ranks in order of first use."""
        found = [(b"x-request-id", self._request_id.encode("latin-1", "replace")), *self._more_headers]
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
        return self._start(200, [*self._headers(), *STREAM_HEADERS], data, last)

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

    __slots__ = ("_after", "_before", "_decoder", "_embedding", "_form", "_last", "_offset", "_opening", "_plain",
                 "_positions", "_prompt_logprobs", "_reader", "_said", "_texts", "_token_ids", "cached_tokens",
                 "index", "tokens", "versions")  # fmt: skip

    def __init__(self, form: CompletionFormat, index: int, opening_text: str, stream: bool) -> None:
        self.index = index
        self.tokens = self.cached_tokens = 0
        self.versions: list[tuple[str, int]] = []
        """Which weights chose its tokens, and the first token of each."""
        self._form = form
        self._texts = [] if stream else [opening_text]
        """What no event has carried yet, as are `_positions` and `_token_ids`."""
        self._reader, self._said = form.reader(), Said()
        """In a chat what the text says, which is read; of that what no event has carried yet."""
        self._positions: list[PositionLogprobs] | None = None
        self._prompt_logprobs: list[PositionLogprobs] | None = None
        self._token_ids: list[int] = []
        self._last: Output | None = None
        self._embedding: Any = None
        self._offset = len(opening_text)
        """Characters before the next token, whose bytes go through `_decoder`."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._plain = stream and form.wording.plain
        self._before, self._after = form.splice(index) if stream and not form.reads else (b"", b"")
        self._opening = form.opening(index) if stream else b""
        """What goes out before the first token."""
        if stream and opening_text:
            self._opening += self._before + _encode(opening_text) + self._after

    def event(self, output: Output) -> bytes:
        """The event for an output; empty while its text is held back."""
        if not self.versions or output.weight_version != self.versions[-1][0]:
            self._note_version(output)
        if output.logprobs is None and output.finish_reason is None and self._plain and not self._opening:
            self.tokens += len(output.token_ids)
            return self._before + _encode(output.text) + self._after if output.text else b""
        self.take(output)
        opening, self._opening = self._opening, b""
        if output.finish_reason is None and self._says_nothing(output):
            return opening
        return opening + self._form.event(self.entry(self._form.chunk_entry), self.tokens, self.cached_tokens)

    def _says_nothing(self, output: Output) -> bool:
        """Whether no event is due: nothing can be shown yet."""
        if self._reader is None:
            return self._plain and not output.text
        return output.logprobs is None and not (self._said.content or self._said.reasoning or self._said.calls)

    def _note_version(self, output: Output) -> None:
        if output.token_ids:
            self.versions.append((output.weight_version, self.tokens))

    def take(self, output: Output) -> None:
        if not self.versions or output.weight_version != self.versions[-1][0]:
            self._note_version(output)
        self.cached_tokens += output.cached_tokens
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        if output.embedding:
            self._embedding = self._form.vector(output.embedding)
        if not self._form.wording.none_made:
            self.tokens += len(output.token_ids)
            if self._reader is None:
                self._texts.append(output.text)
            else:
                self._read(self._reader, output)
            self._token_ids += output.token_ids
            if output.logprobs is not None:
                self._positions = (self._positions or []) + output.logprobs
        self._last = output

    def _read(self, reader: Reader, output: Output) -> None:
        wording = self._form.wording
        said = reader.push(output.text)
        if output.finish_reason is not None:
            said.add(reader.finish())
        said.calls = [call for call in said.calls if call.index < wording.most_calls]
        if not wording.with_reasoning:
            said.reasoning = ""
        self._said.add(said)

    def _reason(self) -> str | None:
        """Why the answer has ended, as OpenAI says it."""
        reason = self._last.finish_reason if self._last else None
        called = self._reader is not None and self._reader.calls and not self._form.wording.named
        return "tool_calls" if called and reason == "stop" else reason

    def entry(self, worded: Callable[[int, Any, Any, str | None], Entry]) -> Entry:
        """What no event has carried yet, in these words."""
        text: str | Said = "".join(self._texts) if self._reader is None else self._said
        last, wording = self._last, self._form.wording
        positions, prompt = self._positions, self._prompt_logprobs
        if prompt is not None and wording.echo_logprobs:
            positions, self._offset = prompt + (positions or []), 0
        logprobs = None if positions is None else self._form.logprobs(positions, self._offsets(positions))
        if prompt is not None and wording.echo_logprobs and logprobs is not None:
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        entry = worded(self.index, text, logprobs, self._reason())
        if last is not None and last.stop_reason is not None:
            entry["stop_reason"] = last.stop_reason
        if self._embedding is not None:
            entry["embedding"] = self._embedding
        if last is not None and last.finish_reason is not None:
            entry |= self._weights()
        if wording.with_token_ids:
            entry["token_ids"] = self._token_ids
            entry |= self._form.prompt_ids_entry(self.index)
        if wording.prompt_logprobs:
            entry["prompt_logprobs"] = prompt_logprobs(prompt or [])
        self._texts, self._positions, self._prompt_logprobs, self._token_ids = [], None, None, []
        self._said = Said()
        return entry

    def _weights(self) -> Entry:
        """Which weights chose its tokens: nothing where nobody has ever brought other ones and nobody asks."""
        versions, asked = self.versions, self._form.wording.with_weight_versions
        if not asked and not any(version for version, _ in versions):
            return {}
        ends = [begin for _, begin in versions[1:]] + [self.tokens]
        spans = [
            {"weight_version": version or DEFAULT_VERSION, "start": begin, "end": end}
            for (version, begin), end in zip(versions, ends, strict=True)
        ]
        newest = spans[-1]["weight_version"] if spans else None
        return {"weight_version": newest} | ({"weight_versions": spans} if asked or len(spans) > 1 else {})

    def _offsets(self, positions: Sequence[PositionLogprobs]) -> list[int]:
        """Where each token begins, in characters: one that ends within a character has not begun the next."""
        found = []
        for position in positions:
            found.append(self._offset)
            self._offset += len(self._decoder.decode(position.chosen.piece))
        return found


# Words --------------------------------------------------------------------------------------------


def of_refusal(refusal: Refuse) -> ApiError:
    """What the client of a refused request is told."""
    text, retry_after_s = refusal.text, refusal.retry_after_s
    match refusal.reason:
        case "unknown-rank":
            return ApiError(400, f"X-data-parallel-rank: {text}", param="X-data-parallel-rank", code="unknown_rank")
        case "overloaded":
            return ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)
        case "late":
            return ApiError(
                429, text, kind="rate_limit_error", param="X-Request-Deadline-Ms", code="deadline",
                retry_after_s=retry_after_s,
            )  # fmt: skip
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
