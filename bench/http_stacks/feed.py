"""What every measured server shares: wire types, the zmq reader variants and the per-stream hand-over objects."""

import asyncio
import sys
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Protocol

import msgspec
import zmq
import zmq.asyncio


class CompletionRequest(msgspec.Struct):
    model: str
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    stream: bool = False
    request_id: int = 0


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: None
    finish_reason: str


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


decode_request = msgspec.json.Decoder(CompletionRequest).decode
encode_json = msgspec.json.Encoder().encode
decode_step = msgspec.msgpack.Decoder(list[tuple[int, str | None]]).decode

ANSWER_TEXT = " A short answer of some two hundred characters, as a small model gives one." * 3
# Sent as the first body bytes, so that every stack (some hold the headers back until the first body)
# has its response head on the wire before tokens flow; an SSE comment is no event.
HELLO = b": ok\n\n"
DONE = b"data: [DONE]\n\n"


def answer(request: CompletionRequest) -> bytes:
    """The whole non-streaming work apart from HTTP: build and encode an answer of about 400 bytes."""
    usage = Usage(12, request.max_tokens, 12 + request.max_tokens)
    choice = Choice(0, ANSWER_TEXT, None, "length")
    return encode_json(
        Completion(f"cmpl-{request.request_id:016x}", "text_completion", 1_700_000_000, request.model, [choice], usage)
    )


def event_parts(request: CompletionRequest) -> tuple[bytes, bytes]:
    """All of an event that is the same for each token of a stream; only the text is encoded per token."""
    head = (
        f'data: {{"id":"cmpl-{request.request_id:016x}","object":"text_completion","created":1700000000,'
        f'"model":"{request.model}","choices":[{{"index":0,"text":'
    )
    return head.encode(), b',"logprobs":null,"finish_reason":null}]}\n\n'


class Sink(Protocol):
    """What the hub calls once per token; None means the stream has ended."""

    def push(self, text: str | None) -> None: ...

    def waiting(self) -> int: ...


class Hub:
    """Gives the tokens of each step message to their streams."""

    def __init__(self) -> None:
        self.sinks: dict[int, Sink] = {}

    def on_step(self, raw: bytes) -> None:
        sinks = self.sinks
        for stream_id, text in decode_step(raw):
            sink = sinks.get(stream_id)
            if sink is not None:
                sink.push(text)
            elif stream_id == -1:
                self.report()

    def report(self) -> None:
        """Print how many events wait in our hands (not in the stack's) and the resident size: the probes read it."""
        with open("/proc/self/statm") as f:
            rss = int(f.read().split()[1]) * 4096
        waiting = [sink.waiting() for sink in self.sinks.values()]
        say(f"stat {len(waiting)} {sum(waiting)} {rss}")

    def gone(self, request: CompletionRequest) -> None:
        """A handler calls this when it learns in mid-stream that its client has left."""
        say(f"gone {request.request_id} {time.monotonic_ns()}")


def say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)


class QueueSink:
    """The obvious pattern: an asyncio.Queue a stream."""

    def __init__(self, request: CompletionRequest) -> None:
        self.head, self.tail = event_parts(request)
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def push(self, text: str | None) -> None:
        self.queue.put_nowait(None if text is None else self.head + encode_json(text) + self.tail)

    def waiting(self) -> int:
        return self.queue.qsize()

    async def take(self) -> bytes | None:
        return await self.queue.get()


class WakeSink:
    """A list and one future: tokens which arrive before the task runs leave in one send."""

    __slots__ = ("ended", "head", "loop", "pending", "tail", "waiter")

    def __init__(self, request: CompletionRequest) -> None:
        self.head, self.tail = event_parts(request)
        self.pending: list[bytes] = []
        self.waiter: asyncio.Future[None] | None = None
        self.ended = False
        self.loop = asyncio.get_running_loop()

    def push(self, text: str | None) -> None:
        if text is None:
            self.ended = True
        else:
            self.pending.append(self.head + encode_json(text) + self.tail)
        self.wake()

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            # A cancelled handler leaves a cancelled future behind.
            if not waiter.done():
                waiter.set_result(None)

    def waiting(self) -> int:
        return len(self.pending)

    async def take(self) -> bytes | None:
        """All events that wait, in one piece; None at the end."""
        if not self.pending and not self.ended:
            self.waiter = self.loop.create_future()
            await self.waiter
        pending = self.pending
        if not pending:
            return None
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        return data


@types.coroutine
def resume(coro: Coroutine[Any, Any, Any], waited: Any) -> Generator[Any, Any, None]:
    """Go on with a coroutine which was started by hand and stopped at `waited`."""
    while True:
        try:
            value = yield waited
        except BaseException as exc:
            coro.throw(exc)
            raise
        try:
            waited = coro.send(value)
        except StopIteration:
            return


class DirectSink:
    """Sends from the zmq callback itself: the send coroutine is started by hand and nearly always ends at once.

    Only public API: when the stack's send does stop (its write buffer is over the high-water mark), a task takes
    the started coroutine over, and later tokens wait in `pending` until it is through.
    """

    __slots__ = ("blocked", "done", "head", "loop", "pending", "send", "tail")

    def __init__(self, request: CompletionRequest, send: Callable[[bytes], Coroutine[Any, Any, Any]]) -> None:
        self.head, self.tail = event_parts(request)
        self.send = send
        self.pending: list[bytes] = []
        self.blocked: asyncio.Task[None] | None = None
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()

    def push(self, text: str | None) -> None:
        if text is None:
            self.close()
            return
        data = self.head + encode_json(text) + self.tail
        if self.blocked is not None:
            self.pending.append(data)
            return
        coro = self.send(data)
        try:
            waited = coro.send(None)
        except StopIteration:
            return
        except ConnectionError:
            self.close()
            return
        self.blocked = self.loop.create_task(self._drain(coro, waited))

    async def _drain(self, coro: Coroutine[Any, Any, Any], waited: Any) -> None:
        try:
            await resume(coro, waited)
            while self.pending:
                data = b"".join(self.pending)
                self.pending.clear()
                await self.send(data)
        except ConnectionError:
            self.close()
        finally:
            self.blocked = None

    def close(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def waiting(self) -> int:
        return len(self.pending)

    async def finished(self) -> None:
        """Until the stream has ended or closed and what was pending has left."""
        await self.done
        if self.blocked is not None:
            await self.blocked


async def read_asyncio(endpoint: str, hub: Hub) -> None:
    """zmq.asyncio: a future, a poll of the events and a task wake for each message."""
    sock = zmq.asyncio.Context.instance().socket(zmq.PULL)
    sock.connect(endpoint)
    while True:
        hub.on_step(await sock.recv())


async def read_fd(endpoint: str, hub: Hub) -> None:
    """add_reader on the socket's FD. The FD tells of a change only, so read on until EAGAIN each time."""
    sock = zmq.Context.instance().socket(zmq.PULL)
    sock.connect(endpoint)
    recv, noblock, on_step = sock.recv, zmq.NOBLOCK, hub.on_step

    def readable() -> None:
        while True:
            try:
                raw = recv(noblock)
            except zmq.Again:
                return
            on_step(raw)

    loop = asyncio.get_running_loop()
    loop.add_reader(sock.getsockopt(zmq.FD), readable)
    # What came before add_reader may have spent its edge already.
    loop.call_soon(readable)
    await asyncio.Event().wait()


async def read_fd_events(endpoint: str, hub: Hub) -> None:
    """As read_fd, but asks EVENTS first, which spares the cost of one exception a wake."""
    sock = zmq.Context.instance().socket(zmq.PULL)
    sock.connect(endpoint)
    recv, noblock, on_step, getsockopt = sock.recv, zmq.NOBLOCK, hub.on_step, sock.getsockopt
    events, pollin = zmq.EVENTS, zmq.POLLIN

    def readable() -> None:
        while getsockopt(events) & pollin:
            on_step(recv(noblock))

    loop = asyncio.get_running_loop()
    loop.add_reader(sock.getsockopt(zmq.FD), readable)
    loop.call_soon(readable)
    await asyncio.Event().wait()


READERS: dict[str, Callable[[str, Hub], Awaitable[None]]] = {
    "asyncio": read_asyncio,
    "fd": read_fd,
    "fd-events": read_fd_events,
}
