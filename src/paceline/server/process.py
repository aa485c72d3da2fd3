"""A front-end as a process: the event loop, the HTTP server, and a good end.

SIGTERM drains: the port stays open and answers 503 to new work while what runs finishes, up to the drain
timeout. A second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import uvicorn
import uvloop
from msgspec import Struct

from paceline.core.frontend.machine import Frontend
from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.registry import find_engine, find_policy
from paceline.errors import StartupError
from paceline.net.links import new_identity
from paceline.process.supervisor import Failed, Ready, Waiting
from paceline.server.app import Api, build_app
from paceline.server.client import Client
from paceline.server.connection import HttpConnection, OncePerKind, raise_descriptor_limit
from paceline.server.generation import Models

logger = logging.getLogger("paceline.front-end")

LISTEN_BACKLOG = 2048
CUT_OFF_S = 1.0
"""What answers that were cut off get to tell their clients."""


class FrontendSettings(Struct, frozen=True):
    """What one front-end's process needs to know.

    `index` of `count`: which of the front-ends that balance over the same ranks it is. `ranks`: those ranks, None for
    all; `awaited`: those that there are now. `node`: where it runs, as the coordinator knows it.
    `most_ranks`: what it may scale to. `rank_timeout_s`: how long a rank may be silent, 0 for ever.
    `late_binding`: whether requests wait in the coordinator's queue.
    `first_life`: it serves when all of its ranks are ready; a later one, when any is.
    """

    index: int
    count: int
    host: str
    port: int
    coordinator: str
    engine: str
    settings: EngineSettings
    ranks: frozenset[int] | None
    awaited: frozenset[int]
    routing: str
    served_model_name: str | None
    max_waiting: int | None
    max_body_bytes: int
    drain_timeout_s: float
    first_life: bool = True
    rank_timeout_s: float = 0.0
    late_binding: bool = False
    node: int = 0
    most_ranks: int = 65_536
    most_losses: int = 3


def run_frontend(settings: FrontendSettings, status: Connection) -> None:
    """Serve until SIGTERM and drained."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, status))
    except (EngineError, StartupError) as error:
        status.send(Failed(str(error)))
        raise SystemExit(1) from None


async def _serve(settings: FrontendSettings, status: Connection) -> None:
    engine_class = find_engine(settings.engine)
    tokenizer = engine_class.tokenizer(settings.settings)
    limit = min(tokenizer.max_model_len, settings.settings.kv_cache_tokens or tokenizer.max_model_len)
    models = Models(settings.served_model_name or tokenizer.model_name, tokenizer, limit)
    machine = Frontend(
        new_identity(settings.index),
        find_policy(settings.routing)(settings.index, settings.count),
        ranks=settings.ranks,
        max_waiting=settings.max_waiting,
        relay_sends=settings.count > 1,
        lockstep=engine_class.lockstep,
        routing=settings.routing,
        resumes=engine_class.resumes,
        late_binding=settings.late_binding,
        node=settings.node,
        most_losses=settings.most_losses,
    )
    client = Client(machine, settings.coordinator, settings.rank_timeout_s)
    api = Api(client, models, int(time.time()), settings.max_body_bytes, settings.most_ranks)
    raise_descriptor_limit()
    logging.getLogger("uvicorn.error").addFilter(OncePerKind())
    server = Server(_uvicorn_config(api, settings))
    drain = Drain(api, server, settings.drain_timeout_s)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, drain.asked)
    await _wait_ranks(client, settings.awaited, len(settings.awaited) if settings.first_life else 1, status)
    listener = listen(settings.host, settings.port)
    status.send(Ready())
    await server.serve([listener])
    client.close()


async def _wait_ranks(client: Client, ranks: frozenset[int], enough: int, status: Connection) -> None:
    """Until `enough` of `ranks` are ready; tells `status` whom it waits for whenever that changes."""
    while len(missing := ranks.difference(client.machine.ready_ranks())) > len(ranks) - enough:
        status.send(Waiting(sorted(missing)))
        await client.wait_changed()


class Server(uvicorn.Server):
    """Uvicorn without signal handlers of its own: ours drain first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Drain:
    """What SIGTERM does, once and twice."""

    def __init__(self, api: Api, server: uvicorn.Server, timeout_s: float) -> None:
        self._api = api
        self._server = server
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def asked(self) -> None:
        """SIGTERM has come."""
        if self._task is not None:
            os._exit(1)
        self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self._api.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._api.idle.wait(), self._timeout_s)
        if self._api.active:
            logger.warning("%d requests had not finished after %g s", self._api.active, self._timeout_s)
            self._api.cut_off()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._api.idle.wait(), CUT_OFF_S)
        self._server.should_exit = True
        self._server.force_exit = self._api.active > 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that shares its port with the other front-ends. Raises StartupError."""
    listener = shared_socket(host, port)
    listener.listen(LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket bound to a port that several processes may bind. Raises StartupError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return bound


def reserve_port(host: str, port: int) -> socket.socket:
    """Hold a port for the front-ends without listening on it; port 0 finds a free one.

    Raises StartupError where somebody else has it: bound without sharing first, because a shared bind would
    also succeed next to another server of this user that shares.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            port = probe.getsockname()[1]
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return shared_socket(host, port)


def _uvicorn_config(api: Api, settings: FrontendSettings) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(api),
        http=HttpConnection,
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=75,
    )
