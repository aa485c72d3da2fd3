"""A front-end as a process: the event loop, the HTTP server, and a good end.

SIGTERM drains: the port stays open and answers 503 to new work while what runs finishes, up to the drain
timeout. A second one ends at once.
"""

from __future__ import annotations

import asyncio
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
from paceline.net.frontend import FrontendShell
from paceline.net.links import new_identity
from paceline.process.supervisor import Failed, Ready, Waiting
from paceline.server.app import Api, build_app
from paceline.server.http import HttpConnection, OncePerKind, raise_descriptor_limit
from paceline.server.requests import Models

logger = logging.getLogger("paceline.front-end")

LISTEN_BACKLOG = 2048
SHARED = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)
"""For a port that several processes bind."""
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
    frontend = FrontendShell(machine, settings.coordinator, settings.rank_timeout_s)
    api = Api(frontend, models, int(time.time()), settings.max_body_bytes, settings.most_ranks)
    raise_descriptor_limit()
    logging.getLogger("uvicorn.error").addFilter(OncePerKind())
    server = Server(_uvicorn_config(api))
    drain = Drain(api, server, settings.drain_timeout_s)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain.asked)
    await _wait_ranks(frontend, settings.awaited, len(settings.awaited) if settings.first_life else 1, status)
    listener = bound(settings.host, settings.port, *SHARED)
    listener.listen(LISTEN_BACKLOG)
    listener.setblocking(False)
    status.send(Ready())
    await server.serve([listener])
    frontend.close()


async def _wait_ranks(frontend: FrontendShell, ranks: frozenset[int], enough: int, status: Connection) -> None:
    """Until `enough` of `ranks` are ready; tells `status` whom it waits for whenever that changes."""
    while len(missing := ranks.difference(frontend.machine.ready_ranks())) > len(ranks) - enough:
        status.send(Waiting(sorted(missing)))
        await frontend.wait_changed()


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
        api, server = self._api, self._server
        api.draining = True
        await api.wait_idle(self._timeout_s)
        if api.running:
            logger.warning("%d requests had not finished after %g s", len(api.running), self._timeout_s)
            api.cut_off()
            await api.wait_idle(CUT_OFF_S)
        server.should_exit, server.force_exit = True, bool(api.running)


def reserve_port(host: str, port: int) -> socket.socket:
    """Hold a port for the front-ends without listening on it; port 0 finds a free one.

    Raises StartupError where somebody else has it: bound without sharing first, because a shared bind would
    also succeed next to another server of this user that shares.
    """
    with bound(host, port, socket.SO_REUSEADDR) as probe:
        port = probe.getsockname()[1]
    return bound(host, port, *SHARED)


def bound(host: str, port: int, *options: int) -> socket.socket:
    """A bound socket with these options. Raises StartupError."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return made


def _uvicorn_config(api: Api) -> uvicorn.Config:
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
