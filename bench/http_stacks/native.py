"""The measured servers with an interface of their own: granian RSGI, aiohttp, sanic, and the hand-written floor."""

import asyncio
import socket
from typing import Any

import httptools

from http_stacks.feed import DONE, HELLO, DirectSink, Hub, WakeSink, answer, decode_request, encode_json, event_parts

SSE = "text/event-stream"


def rsgi_app(hub: Hub) -> Any:
    headers = [("content-type", SSE), ("cache-control", "no-cache")]

    async def watch(protocol: Any, leave: Any) -> None:
        await protocol.client_disconnect()
        leave()

    async def app(scope: Any, protocol: Any) -> None:
        request = decode_request(await protocol())
        if not request.stream:
            protocol.response_bytes(200, [("content-type", "application/json")], answer(request))
            return
        sink = WakeSink(request)
        hub.sinks[request.request_id] = sink

        def leave() -> None:
            if hub.sinks.pop(request.request_id, None) is not None:
                hub.gone(request)
                sink.push(None)

        watcher = asyncio.ensure_future(watch(protocol, leave))
        try:
            transport = protocol.response_stream(200, headers)
            await transport.send_bytes(HELLO)
            while (data := await sink.take()) is not None:
                await transport.send_bytes(data)
            if request.request_id in hub.sinks:
                await transport.send_bytes(DONE)
                hub.sinks.pop(request.request_id)
        finally:
            # A send to a lost client may raise before the watcher has had its turn.
            leave()
            watcher.cancel()

    return app


async def serve_aiohttp(hub: Hub, sock: socket.socket, handover: str) -> None:
    from aiohttp import web

    async def completions(http: web.Request) -> web.StreamResponse:
        request = decode_request(await http.read())
        if not request.stream:
            return web.Response(body=answer(request), content_type="application/json")
        response = web.StreamResponse(headers={"content-type": SSE, "cache-control": "no-cache"})
        await response.prepare(http)
        await response.write(HELLO)
        sink = DirectSink(request, response.write) if handover == "direct" else WakeSink(request)
        hub.sinks[request.request_id] = sink
        try:
            if isinstance(sink, DirectSink):
                await sink.finished()
            else:
                while (data := await sink.take()) is not None:
                    await response.write(data)
            await response.write(DONE)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            hub.gone(request)
            raise
        finally:
            hub.sinks.pop(request.request_id, None)
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    # Without handler_cancellation a handler hears of a lost client only from its next write.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, handle_signals=False)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    await asyncio.Event().wait()


async def serve_sanic(hub: Hub, sock: socket.socket) -> None:
    from sanic import Request, Sanic
    from sanic.response import HTTPResponse, raw

    app = Sanic("bench", configure_logging=False)

    @app.post("/v1/completions")
    async def completions(http: Request) -> HTTPResponse | None:
        request = decode_request(http.body)
        if not request.stream:
            return raw(answer(request), content_type="application/json")
        sink = WakeSink(request)
        hub.sinks[request.request_id] = sink
        try:
            response = await http.respond(content_type=SSE)
            await response.send(HELLO)
            while (data := await sink.take()) is not None:
                await response.send(data)
            await response.send(DONE)
            await response.eof()
        except asyncio.CancelledError:
            hub.gone(request)
            raise
        finally:
            hub.sinks.pop(request.request_id, None)
        return None

    server = await app.create_server(sock=sock, return_asyncio_server=True, access_log=False)
    await server.startup()
    await server.serve_forever()


class FloorProtocol(asyncio.Protocol):
    """The least an HTTP/1.1 server can do: httptools to parse, transport.write from the zmq callback.

    No limits, no pipelining, no error answers: it exists to know the floor, not to be used.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.stream_id: int | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        request = decode_request(self.body)
        self.body = b""
        if not request.stream:
            data = answer(request)
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
            )
            return
        self.request = request
        self.stream_id = request.request_id
        self.head, self.tail = event_parts(request)
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            b"%x\r\n%b\r\n" % (len(HELLO), HELLO)
        )
        self.hub.sinks[self.stream_id] = self

    def push(self, text: str | None) -> None:
        if text is None:
            self.hub.sinks.pop(self.stream_id or 0, None)
            self.stream_id = None
            self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))
            return
        data = self.head + encode_json(text) + self.tail
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def waiting(self) -> int:
        return 0

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stream_id is not None:
            self.hub.sinks.pop(self.stream_id, None)
            self.hub.gone(self.request)


async def serve_floor(hub: Hub, sock: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: FloorProtocol(hub), sock=sock)
    await server.serve_forever()
