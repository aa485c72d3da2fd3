"""The server process: one stack, one zmq reader, one uvloop, one core."""

import argparse
import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any

import uvloop

from http_stacks import asgi, native
from http_stacks.feed import READERS, Hub, say

# Row label -> (stack, hand-over, zmq reader). The readers are compared on the floor and on uvicorn only.
VARIANTS: dict[str, tuple[str, str, str]] = {
    "floor: own Protocol, direct": ("floor", "direct", "fd"),
    "floor, zmq EVENTS first": ("floor", "direct", "fd-events"),
    "floor, zmq.asyncio": ("floor", "direct", "asyncio"),
    "uvicorn raw, direct": ("uvicorn", "direct", "fd"),
    "uvicorn raw, direct, zmq.asyncio": ("uvicorn", "direct", "asyncio"),
    "uvicorn raw, wake": ("uvicorn", "wake", "fd"),
    "uvicorn raw, wake, zmq.asyncio": ("uvicorn", "wake", "asyncio"),
    "uvicorn raw, queue": ("uvicorn", "queue", "fd"),
    "uvicorn + Starlette, wake": ("starlette", "wake", "fd"),
    "uvicorn + Starlette, queue": ("starlette", "queue", "fd"),
    "uvicorn + Starlette, queue, zmq.asyncio": ("starlette", "queue", "asyncio"),
    "uvicorn + BlackSheep, wake": ("blacksheep", "wake", "fd"),
    "aiohttp, direct": ("aiohttp", "direct", "fd"),
    "aiohttp, wake": ("aiohttp", "wake", "fd"),
    "sanic, wake": ("sanic", "wake", "fd"),
    "granian RSGI, wake": ("granian-rsgi", "wake", "fd"),
    "granian ASGI, wake": ("granian-asgi", "wake", "fd"),
    "hypercorn raw, wake": ("hypercorn", "wake", "fd"),
}


def serving(stack: str, handover: str, hub: Hub, sock: socket.socket) -> Coroutine[Any, Any, None]:
    if stack == "floor":
        return native.serve_floor(hub, sock)
    if stack == "uvicorn":
        return asgi.serve_uvicorn(asgi.raw_app(hub, handover), sock)
    if stack == "starlette":
        return asgi.serve_uvicorn(asgi.starlette_app(hub, handover), sock)
    if stack == "blacksheep":
        return asgi.serve_uvicorn(asgi.blacksheep_app(hub, handover), sock)
    if stack == "aiohttp":
        return native.serve_aiohttp(hub, sock, handover)
    if stack == "sanic":
        return native.serve_sanic(hub, sock)
    if stack == "granian-rsgi":
        return asgi.serve_granian(native.rsgi_app(hub), sock, "rsgi")
    if stack == "granian-asgi":
        return asgi.serve_granian(asgi.raw_app(hub, handover), sock, "asgi")
    if stack == "hypercorn":
        return asgi.serve_hypercorn(asgi.raw_app(hub, handover), sock)
    raise ValueError(stack)


async def run(label: str, port: int, endpoint: str) -> None:
    stack, handover, reader = VARIANTS[label]
    hub = Hub()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    if not stack.startswith("granian"):
        # granian binds by itself; a listening socket of ours would take the driver's first connections.
        sock.listen(1024)
    sock.setblocking(False)
    feed = asyncio.ensure_future(READERS[reader](endpoint, hub))
    say("ready")
    await serving(stack, handover, hub, sock)
    feed.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("label", choices=list(VARIANTS))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--core", type=int, default=0)
    args = parser.parse_args()
    # Before any thread starts, so that zmq's and the stack's own threads inherit it.
    os.sched_setaffinity(0, {args.core})
    uvloop.install()
    asyncio.run(run(args.label, args.port, args.endpoint))


if __name__ == "__main__":
    main()
