"""The measured ASGI applications and the servers which run them."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from http_stacks.feed import (
    DONE,
    HELLO,
    CompletionRequest,
    DirectSink,
    Hub,
    QueueSink,
    WakeSink,
    answer,
    decode_request,
)

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
SSE_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")],
}


def body_message(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def read_body(receive: Receive) -> bytes:
    message = await receive()
    body: bytes = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    return body


async def until_disconnect(receive: Receive, leave: Callable[[], None]) -> None:
    """Runs beside a stream: its cost is one task a stream, none a token."""
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


async def stream_taken(request: CompletionRequest, receive: Receive, send: Send, hub: Hub, wake: bool) -> None:
    """The handler's own task takes from its sink and sends (queue and wake hand-over)."""
    sink = WakeSink(request) if wake else QueueSink(request)
    hub.sinks[request.request_id] = sink
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        hub.sinks.pop(request.request_id, None)
        hub.gone(request)
        sink.push(None)

    watch = asyncio.ensure_future(until_disconnect(receive, leave))
    try:
        await send(SSE_START)
        await send(body_message(HELLO))
        while not left and (data := await sink.take()) is not None:
            await send(body_message(data))
        if not left:
            watch.cancel()
            await send(body_message(DONE, False))
    finally:
        watch.cancel()
        hub.sinks.pop(request.request_id, None)


async def stream_direct(request: CompletionRequest, receive: Receive, send: Send, hub: Hub) -> None:
    """The zmq callback sends; the handler's task only opens and closes the response."""
    sink = DirectSink(request, lambda data: send({"type": "http.response.body", "body": data, "more_body": True}))
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        hub.sinks.pop(request.request_id, None)
        hub.gone(request)
        sink.close()

    watch = asyncio.ensure_future(until_disconnect(receive, leave))
    try:
        await send(SSE_START)
        await send(body_message(HELLO))
        hub.sinks[request.request_id] = sink
        await sink.finished()
        if not left:
            watch.cancel()
            await send(body_message(DONE, False))
    finally:
        watch.cancel()
        hub.sinks.pop(request.request_id, None)


def raw_app(hub: Hub, handover: str) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"unasked-for scope {scope['type']}")
        request = decode_request(await read_body(receive))
        if not request.stream:
            data = answer(request)
            length = str(len(data)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", length)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send(body_message(data, False))
        elif handover == "direct":
            await stream_direct(request, receive, send, hub)
        else:
            await stream_taken(request, receive, send, hub, handover == "wake")

    return app


async def sse_parts(request: CompletionRequest, hub: Hub, wake: bool) -> AsyncIterator[bytes]:
    """The body as an async generator, for frameworks which pull."""
    sink = WakeSink(request) if wake else QueueSink(request)
    hub.sinks[request.request_id] = sink
    ended = False
    try:
        yield HELLO
        while (data := await sink.take()) is not None:
            yield data
        ended = True
        yield DONE
    finally:
        hub.sinks.pop(request.request_id, None)
        if not ended:
            hub.gone(request)


def starlette_app(hub: Hub, handover: str) -> App:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    async def completions(http: Request) -> Response:
        request = decode_request(await http.body())
        if not request.stream:
            return Response(answer(request), media_type="application/json")
        return StreamingResponse(sse_parts(request, hub, handover == "wake"), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])


def blacksheep_app(hub: Hub, handover: str) -> App:
    from blacksheep import Application, Content, Request, Response, StreamedContent

    app = Application()

    async def completions(http: Request) -> Response:
        request = decode_request(await http.read() or b"")
        if not request.stream:
            return Response(200, content=Content(b"application/json", answer(request)))
        parts = partial(sse_parts, request, hub, handover == "wake")
        return Response(200, content=StreamedContent(b"text/event-stream", parts))

    app.router.add_post("/v1/completions", completions)
    return app


async def serve_uvicorn(app: App, sock: socket.socket) -> None:
    import uvicorn

    is_function = getattr(app, "__name__", "") == "app"
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        # Frameworks may need their start-up hook; the bare application has none.
        lifespan="off" if is_function else "auto",
        interface="asgi3",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    await uvicorn.Server(config).serve(sockets=[sock])


async def serve_hypercorn(app: App, sock: socket.socket) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{sock.detach()}"]
    config.include_server_header = False
    await serve(app, config)  # type: ignore[arg-type]


async def serve_granian(app: Any, sock: socket.socket, interface: str, task_impl: str = "asyncio") -> None:
    from granian.constants import HTTPModes, Interfaces, TaskImpl
    from granian.server.embed import Server

    # It takes no ready socket: free the port and let it bind by itself.
    port = sock.getsockname()[1]
    sock.close()
    server = Server(
        app,
        port=port,
        interface=Interfaces(interface),
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
        task_impl=TaskImpl(task_impl),
        backlog=1024,
    )
    await server.serve()
