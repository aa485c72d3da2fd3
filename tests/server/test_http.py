"""One HTTP connection, over real sockets: what it may cost, and when it is over and forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from paceline.core.frontend.events import Placed
from paceline.core.requests import Output
from paceline.server.formats import CompletionFormat, Wording
from paceline.server.http import MAX_HEAD_BYTES, MAX_PIPELINED, SUBMIT_S, HttpConnection, OncePerKind, ResponseWriter
from paceline.server.responses import Response, Submitted
from tests.pace import stretched
from tests.serving import deployment, wait_until

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"
LONG_S = 60.0


class App:
    """Answers a request that is whole with its number, and ends the answer once `ready`."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        if message["type"] == "http.disconnect":
            return
        self.asked += 1
        number = b"%d" % self.asked
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": number, "more_body": True})
        await self.ready.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Peer:
    """A client's end."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.said = b""
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        """All of it, or as much as the other end takes before it breaks the connection."""
        try:
            await asyncio.wait_for(self._loop.sock_sendall(self.socket, data), stretched(30))
        except (ConnectionResetError, BrokenPipeError):
            return

    async def wait_said(self, text: bytes) -> None:
        while text not in self.said:
            part = await asyncio.wait_for(self._loop.sock_recv(self.socket, 1 << 16), stretched(30))
            assert part, self.said
            self.said += part

    async def wait_end(self) -> bytes:
        """Until the connection has ended; returns all that was said."""
        try:
            while part := await asyncio.wait_for(self._loop.sock_recv(self.socket, 1 << 16), stretched(30)):
                self.said += part
        except ConnectionResetError:
            pass
        return self.said

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@asynccontextmanager
async def served(app: App, patience_s: float = LONG_S) -> AsyncIterator[tuple[Peer, ServerState]]:
    """A server of `app`, and one client of it."""
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=patience_s)  # type: ignore[arg-type]
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpConnection(config, state, {}), "127.0.0.1", 0)
    peer = Peer(server.sockets[0].getsockname()[1])
    try:
        yield peer, state
    finally:
        peer.socket.close()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        for task in list(state.tasks):
            task.cancel()
        await server.wait_closed()


def on_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """The test, in a loop of its own."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(test(**given), stretched(100)))

    return run


def only(state: ServerState) -> weakref.ref[Any]:
    (connection,) = state.connections
    return weakref.ref(connection)


async def wait_forgotten(connection: weakref.ref[Any], state: ServerState) -> None:
    """Until it has ended and nothing holds it."""
    await wait_for(lambda: not state.connections)
    await wait_for(lambda: gc.collect() >= 0 and connection() is None)


async def wait_s(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    await wait_for(lambda: loop.time() > end)


async def wait_for(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(stretched(30)):
        while not condition():
            await asyncio.sleep(0)


@on_loop
async def test_a_connection_that_breaks_after_an_answer_is_forgotten() -> None:
    async with served(App()) as (peer, state):
        await peer.send(GET)
        await peer.wait_said(b"0\r\n\r\n")
        connection = only(state)
        peer.reset()
        await wait_forgotten(connection, state)


@on_loop
async def test_one_that_breaks_in_mid_answer_is_forgotten() -> None:
    app = App()
    app.ready.clear()
    async with served(app) as (peer, state):
        await peer.send(GET)
        await peer.wait_said(b"1\r\n")
        connection = only(state)
        peer.reset()
        await wait_for(lambda: not state.connections)
        app.ready.set()
        await wait_forgotten(connection, state)


@pytest.mark.parametrize("begin", [b"", GET[:20], GET + GET[:20], POST], ids=["silent", "head", "later head", "body"])
@on_loop
async def test_one_that_stops_before_its_request_is_whole_is_closed(begin: bytes) -> None:
    async with served(App(), patience_s=0.1) as (peer, _):
        await peer.send(begin)
        await peer.wait_end()


@on_loop
async def test_a_head_that_comes_in_drops_is_closed() -> None:
    async with served(App(), patience_s=0.3) as (peer, state):
        await peer.send(GET[:-2])
        await wait_for(lambda: state.connections)
        while state.connections:
            await peer.send(b"a: b\r\n")
            await wait_s(0.01)


@on_loop
async def test_a_body_that_comes_in_drops_is_not() -> None:
    async with served(App(), patience_s=1.0) as (peer, _):
        await peer.send(POST)
        for _ in range(20):
            await peer.send(b"1\r\na\r\n")
            await wait_s(0.1)
        await peer.send(b"0\r\n\r\n")
        await peer.wait_said(b"\r\n\r\n1\r\n1\r\n0\r\n\r\n")


@on_loop
async def test_an_answer_takes_as_long_as_it_takes() -> None:
    app = App()
    app.ready.clear()
    async with served(app, patience_s=0.1) as (peer, _):
        await peer.send(GET)
        await peer.wait_said(b"1\r\n")
        await wait_s(0.5)
        app.ready.set()
        await peer.wait_said(b"0\r\n\r\n")


@pytest.mark.parametrize("begin", [GET[:-2] + b"x: ", GET[:5], GET + GET[:-2] + b"x: ", POST + b"0\r\nx: "],
                         ids=["header", "path", "later head", "trailer"])  # fmt: skip
@on_loop
async def test_a_head_without_end_is_refused(begin: bytes) -> None:
    async with served(App()) as (peer, _):
        await peer.send(begin + b"y" * (MAX_HEAD_BYTES + 1_000_000))
        assert b"HTTP/1.1 431 " in await peer.wait_end()


@on_loop
async def test_a_large_body_is_no_large_head() -> None:
    async with served(App()) as (peer, _):
        size = 10 * MAX_HEAD_BYTES
        await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + b"y" * size + GET)
        await peer.wait_said(b"\r\n\r\n1\r\n2\r\n0\r\n\r\n")


@on_loop
async def test_requests_in_advance_are_answered_in_order_up_to_so_many() -> None:
    app = App()
    app.ready.clear()
    async with served(app) as (peer, state):
        await peer.send(GET * (1 + MAX_PIPELINED))
        await peer.wait_said(b"1\r\n")
        app.ready.set()
        await peer.wait_said(b"\r\n%d\r\n0\r\n\r\n" % (1 + MAX_PIPELINED))
        app.ready.clear()
        await peer.send(GET * (2 + MAX_PIPELINED))
        await wait_for(lambda: not state.connections)


@on_loop
async def test_garbage_behind_a_request_does_not_get_into_its_answer() -> None:
    app = App()
    app.ready.clear()
    async with served(app) as (peer, _):
        await peer.send(GET + b"\x00garbage\r\n\r\n")
        assert b"400" not in await peer.wait_end()


@pytest.mark.slow
def test_clients_leave_descriptors_for_the_ranks() -> None:
    with deployment("--engine", "timed", "-dp", "2") as running:
        frontend, rank = running.pid_of("front-end 0"), running.pid_of("rank 0")
        resource.prlimit(frontend, resource.RLIMIT_NOFILE, (200, 200))
        host, _, port = running.url.removeprefix("http://").rpartition(":")
        with contextlib.ExitStack() as held:
            for _ in range(300):
                held.enter_context(socket.create_connection((host, int(port)), timeout=stretched(30)))
            running.wait_line("more than 150 connections")
            os.kill(rank, signal.SIGKILL)
            running.wait_line("rank 0 is back")
        wait_until(lambda: running.health()["ready"] == [0, 1], "both ranks are there")
        body = {"prompt": "a", "max_tokens": 2}
        answer = running.http.post("/v1/completions", json=body, headers={"X-data-parallel-rank": "0"})
        assert answer.json()["choices"][0]["text"] == " 0 1"
        assert running.output.count("more than 150 connections") == 1
        assert "Traceback" not in running.output


@on_loop
async def test_garbage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    logger, once = logging.getLogger("uvicorn.error"), OncePerKind()
    logger.addFilter(once)
    try:
        async with served(App()) as (peer, _):
            address = peer.socket.getpeername()
            for _ in range(3):
                other = Peer(address[1])
                await other.send(b"\x00garbage\r\n\r\n")
                assert b"HTTP/1.1 400 " in await other.wait_end()
                other.socket.close()
    finally:
        logger.removeFilter(once)
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == [
        "Invalid HTTP request received. (further ones are only counted)"
    ]
    assert list(once.counts.values()) == [3]


@on_loop
async def test_a_response_goes_on_from_where_the_client_stopped_reading() -> None:
    reads, sent = asyncio.Event(), list[Any]()

    async def send(message: Any) -> None:
        await reads.wait()
        sent.append(message)

    form = CompletionFormat("1", "m", 5, Wording())
    writer = ResponseWriter(send, Response(form, "id", [""], stream=True), lambda choice: 1, reads.set)
    for event in (Placed(1, 0), Submitted(1), Output(1, [7], "a"), Output(1, [7], "b", "stop")):
        writer.handle(event)
    assert not sent
    reads.set()
    await wait_for(lambda: len(sent) == 2)
    start, rest = sent
    assert (start["status"], rest["more_body"]) == (200, False)
    assert [part.count(b'"text":"') for part in rest["body"].split(b"\n\n")] == [1, 1, 0, 0]


@on_loop
async def test_others_come_in_between_choices_that_take_long_to_submit() -> None:
    """And nothing is submitted for who has gone away."""
    loop, submitted, seen = asyncio.get_running_loop(), list[int](), list[int]()

    def submit(choice: int) -> int:
        until = loop.time() + 2 * SUBMIT_S
        while loop.time() < until:
            pass
        submitted.append(choice)
        return len(submitted)

    async def send(message: Any) -> None: ...

    def other() -> None:
        seen.append(len(submitted))
        loop.call_soon(other)

    loop.call_soon(other)
    form = CompletionFormat("1", "m", 5, Wording())
    writers = [ResponseWriter(send, Response(form, "id", [""] * count), submit, lambda: None) for count in (5, 99)]
    writers[0].submit_more()
    await wait_for(lambda: len(submitted) == 5)
    assert submitted == [0, 1, 2, 3, 4]
    assert {1, 2, 3, 4} <= set(seen)
    writers[1].submit_more()
    writers[1].close()
    begun = len(seen)
    await wait_for(lambda: loop.time() and len(seen) > begun + 100)
    assert len(submitted) == 6


@on_loop
async def test_what_comes_last_waits_for_what_is_kept() -> None:
    kept, sent = Future[None](), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    form = CompletionFormat("1", "m", 5, Wording())
    writer = ResponseWriter(send, Response(form, "id", [""]), lambda choice: 1, lambda: None, lambda: kept)
    for event in (Submitted(1), Placed(1, 0), Output(1, [7], "a", "stop")):
        writer.handle(event)
    await asyncio.sleep(0)
    assert not sent
    kept.set_result(None)
    await wait_for(lambda: len(sent) == 2)


@on_loop
async def test_http_1_0_gets_a_stream_without_chunks() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one ", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with served(app) as (peer, _):
        await peer.send(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = (await peer.wait_end()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"one two"
