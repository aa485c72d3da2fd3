"""HTTP's bytes: one connection, a request's body, and how a response is written.

The connection is uvicorn's, with bounds for what a stranger may cost. Uvicorn's own keeps a head as large as it comes
and waits for its end for ever; it parses all requests of one read in advance; where a connection breaks after an
answer, the keep-alive timer holds all that it was until it fires; and each connection that is no HTTP is a line of the
log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from paceline.core.requests import Output
from paceline.log import about
from paceline.server.errors import ApiError
from paceline.server.responses import Blocked, Event, Failed, GiveUp, Quiet, Response, Submitted, Unblocked, Write

logger = logging.getLogger("paceline.front-end")

T = TypeVar("T")

SUBMIT_S = 0.005
"""How long choices of one request are submitted at a stretch: each may be large."""

MAX_HEAD_BYTES = 64 * 1024
"""What may come, one read more or less, without an end of a head or a piece of a body; of trailers too."""
MAX_PIPELINED = 100
"""Requests of one connection that wait for the answer before theirs."""
MOST_DESCRIPTORS = 1 << 16
HEAD_TOO_LARGE = b"the head of the request is larger than %d bytes" % MAX_HEAD_BYTES
ANSWER_431 = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(HEAD_TOO_LARGE), HEAD_TOO_LARGE)
)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: usually far more than it is given at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """How many clients may be connected: a quarter of the descriptors stays free for ranks, which come and go."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft - soft // 4


class UntilClosed(int):
    """A length that is not known, for uvicorn: more bytes than come, and none of them lacking at the end."""

    def __sub__(self, other: int) -> UntilClosed:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class HttpConnection(HttpToolsProtocol):
    """One connection. A request must be whole, or get on, within the keep-alive time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owed = True
        """Whether the client has more to say before there can be an answer."""
        self._progress = 0
        self._bytes_since = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > (most := most_connections()):
            self.logger.warning("more than %d connections: closed", most)
            transport.abort()
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.timeout_keep_alive_task, self._deadline):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._bytes_since += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._bytes_since > MAX_HEAD_BYTES:
            self._end_with(ANSWER_431)
        elif self._owed and self._deadline is None:
            self._arm()

    def send_400_response(self, msg: str) -> None:
        if self._answering():
            self.transport.close()
        else:
            super().send_400_response(msg)

    # What the parser finds ----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._owed = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._got_on()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests in advance")
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            # It knows no chunks: a body without a length ends with the connection.
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = UntilClosed(1 << 62)

    def on_body(self, body: bytes) -> None:
        self._got_on()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._owed = False
        self._got_on()
        super().on_message_complete()

    def _got_on(self) -> None:
        self._progress += 1
        self._bytes_since = 0

    # How it ends --------------------------------------------------------------------------------

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._look, self._progress)

    def _look(self, progress: int) -> None:
        """Give up a client that owes something and has not got on."""
        self._deadline = None
        if not self._owed or self.transport.is_closing():
            return
        if self._progress == progress:
            self.transport.close()
        else:
            self._arm()

    def _answering(self) -> bool:
        """Whether a request that is whole has no answer yet, or another's answer has begun."""
        cycle = self.cycle
        if self.pipeline or cycle is None or cycle.response_complete:
            return bool(self.pipeline)
        return cycle.response_started or not cycle.more_body

    def _end_with(self, answer: bytes) -> None:
        # It would be taken for that answer, or a part of it.
        if not self._answering():
            self.transport.write(answer)
        self.transport.close()


class OncePerKind(logging.Filter):
    """Lets one warning of a kind into the log, and counts all: who sends garbage must not fill a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        """Warnings by their text before anything is put into it, which bounds how many there are."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        kind = str(record.msg)
        self.counts[kind] += 1
        record.msg = f"{kind} (further ones are only counted)"
        return self.counts[kind] == 1


# Bodies -------------------------------------------------------------------------------------------


async def read_body(receive: Receive, headers: Headers, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is known to be too large."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        text = f"content-encoding: {encoding[:40]!r} is not read here: send the body as it is"
        raise ApiError(415, text, param="content-encoding", code="unsupported")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    length = headers.get("content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client went away before its body was read")
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


class ClientGone(ApiError):
    """Nobody is there to be answered."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, or ApiError as soon as the client has gone away; then the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone(400, "the client went away before its request was read")
    finally:
        task.cancel()
        gone.cancel()


class ResponseWriter:
    """Writes a response from wherever its parts come into being: no task is woken for a token.

    ASGI's `send` is a coroutine that nearly never waits, so it is started by hand and is over at once. Where it does
    wait, because the client does not read, a task goes on with it. `bench/results/http_stacks.md` has what this saves.
    `submit` asks the ranks for a choice, and returns the request's number. `give_up` is called where the client does
    not read enough; `before_last` before what the response ends with is written, which waits for what it returns.
    """

    __slots__ = (
        "_before_last", "_closed", "_give_up", "_response", "_rests", "_send", "_submit", "_waiting", "_wrote",
        "status",
    )  # fmt: skip

    def __init__(
        self, send: Send, response: Response, submit: Callable[[int], int], give_up: Callable[[], object],
        before_last: Callable[[], Future[None] | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._send = send
        self._response = response
        self._submit = submit
        self._give_up = give_up
        self._before_last = before_last
        self._waiting: asyncio.Task[None] | None = None
        self._wrote = True
        self._closed = self._rests = False
        """Whether nothing more is to be submitted: ever, or for the moment."""
        self.status = 0
        """Of the answer, once it has begun."""

    def beat(self) -> None:
        """Called at intervals: let a client that was sent nothing in the last one know that it is waited for."""
        if not self._wrote:
            self.handle(Quiet())
        self._wrote = False

    def handle(self, event: Event) -> None:
        """Something has happened to the response: write what follows, and submit what it wants."""
        try:
            effect = self._response.handle(event)
        except Exception:
            name = self._response.name
            logger.exception("internal error in the answer to request %s", name, extra=about(name))
            effect = self._response.handle(Failed())
        if type(event) is Output and event.finish_reason is not None and self._response.wants:
            # After the effects that are under way: the front-end's machine is not to be called from within.
            asyncio.get_running_loop().call_soon(self.submit_more)
        if effect is None:
            return
        if isinstance(effect, GiveUp):
            self._give_up()
            return
        self._wrote = True
        first = self._before_last() if effect.last else None
        if effect.status:
            self.status = effect.status
        message = {"type": "http.response.body", "body": effect.data, "more_body": not effect.last}
        sending: Any = self._start(effect, message) if effect.status else self._send(message)
        if first is not None:
            sending = _behind(first, sending)
        try:
            awaited = sending.send(None)
        except StopIteration:
            return
        self._response.handle(Blocked())
        self._waiting = asyncio.get_running_loop().create_task(self._go_on(sending, awaited))

    def submit_more(self) -> None:
        """Submit choices for as long as the response wants them; but others' tokens come in between, here and at the
        ranks.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + SUBMIT_S
        try:
            while self._response.wants and not self._rests and not self._closed:
                if loop.time() > until:
                    self._rests = True
                    loop.call_later(SUBMIT_S, self._go_on_submitting)
                    return
                self.handle(Submitted(self._submit(self._response.next_choice())))
        except Exception:
            logger.exception("internal error in submitting a choice")
            self.handle(Failed())

    def _go_on_submitting(self) -> None:
        self._rests = False
        self.submit_more()

    def close(self) -> None:
        """Nothing more is to be written."""
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def _start(self, write: Write, message: Message) -> None:
        await self._send({"type": "http.response.start", "status": write.status, "headers": write.headers})
        if write.data or write.last:
            await self._send(message)

    async def _go_on(self, sending: Any, awaited: Any) -> None:
        await _await_started(sending, awaited)
        self.handle(Unblocked())


async def _behind(first: Future[None], sending: Coroutine[Any, Any, None]) -> None:
    await asyncio.wrap_future(first)
    await sending


@types.coroutine
def _await_started(started: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """Await a coroutine that was started by hand and now waits for `awaited`."""
    yield awaited
    yield from started.__await__()
