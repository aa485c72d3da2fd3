"""A front-end as a process: the event loop, the HTTP server, and a good end.

SIGTERM drains: the port stays open and answers 503 to new work while what runs finishes, up to the drain
timeout. A second one ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from msgspec import Struct

from paceline.core.frontend.machine import Frontend
from paceline.core.routing import LeastLoad, Policy, Sticky
from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.registry import find_engine, find_policy
from paceline.errors import ConfigError, StartupError
from paceline.net.frontend import FrontendShell
from paceline.net.links import new_identity
from paceline.process.supervisor import Failed, Ready, Waiting
from paceline.server.app import Api, build_app
from paceline.server.dashboard import Dashboard
from paceline.server.guard import Guard
from paceline.server.http import HttpConnection, OncePerKind, raise_descriptor_limit
from paceline.server.metrics import Metrics
from paceline.server.peers import Answer, Peers
from paceline.server.reading import ReadingProcess, models_of, store_of
from paceline.server.requests import Preparer
from paceline.server.timelines import Found
from paceline.settings import DeploymentConfig, ServerConfig

if TYPE_CHECKING:
    from paceline.server.tracing import Tracing

logger = logging.getLogger("paceline.front-end")

LISTEN_BACKLOG = 2048
SHARED = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)
"""For a port that several processes bind."""
LOOPBACK = "127.0.0.1"
CUT_OFF_S = 1.0
"""What answers that were cut off get to tell their clients."""


class FrontendSettings(Struct, frozen=True):
    """What one life of one front-end is started with, besides all settings of the deployment.

    `index`: which of the node's front-ends. `port`: found, where the setting is 0. `coordinator`: where that publishes.
    `ranks`: those that there are now, of those that it balances over. `node`: where it runs, as the coordinator knows
    it. `enough`: so many of them are ready before it serves. `engine`: as a rank's.
    `folder`: what all front-ends of the node share, metrics and responses.
    """

    config: DeploymentConfig
    index: int
    port: int
    coordinator: str
    ranks: frozenset[int]
    folder: str
    node: int = 0
    enough: int = 1
    engine: EngineSettings | None = None


def run_frontend(settings: FrontendSettings, status: Connection) -> None:
    """Serve until SIGTERM and drained."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, status))
    except (EngineError, StartupError, ConfigError) as error:
        status.send(Failed(str(error)))
        raise SystemExit(1) from None
    except Exception as error:
        status.send(Failed(f"internal error: {type(error).__name__}: {error}", traceback.format_exc().rstrip()))
        raise SystemExit(70) from None


def _routing(name: str, keeps_prefixes: bool) -> tuple[type[Policy], str]:
    """The policy and its name. Where nothing is saved anywhere, the least loaded rank is the best."""
    policy = find_policy(name)
    return (LeastLoad, "least-load") if issubclass(policy, Sticky) and not keeps_prefixes else (policy, name)


def _machine(settings: FrontendSettings, engine_settings: EngineSettings) -> Frontend:
    config = settings.config
    parallel, server_config = config.parallel, config.server
    engine_class = find_engine(config.engine.engine)
    policy, routing = _routing(server_config.routing, engine_class.keeps_prefixes(engine_settings))
    return Frontend(
        new_identity(settings.index),
        policy(settings.index, parallel.api_server_count),
        ranks=None if parallel.balanced_ranks is None else settings.ranks,
        max_waiting=server_config.max_waiting or None,
        # The coordinator knows what ranks hold by what it is told.
        relay_sends=parallel.api_server_count > 1 or (config.late_binding and policy.names),
        lockstep=engine_class.steps_together(engine_settings),
        routing=routing,
        resumes=engine_class.resumes,
        late_binding=config.late_binding,
        node=settings.node,
        most_losses=server_config.max_rank_losses,
        hold_s=server_config.hold_timeout_s,
        together=engine_class.joins_once and engine_class.steps_together(engine_settings),
    )


async def _serve(settings: FrontendSettings, status: Connection) -> None:
    config = settings.config
    parallel, server_config = config.parallel, config.server
    engine_settings = settings.engine or config.engine_settings()
    models = models_of(config, engine_settings)
    arguments = {"config": config, "engine": engine_settings, "folder": settings.folder}
    reader = ReadingProcess(arguments, settings.index, server_config.log_level)
    preparer = Preparer(
        models, store_of(config, settings.folder, settings.index), reader=reader,
        allow_unknown_fields=server_config.allow_unknown_fields,
    )  # fmt: skip
    machine = _machine(settings, engine_settings)
    frontend = FrontendShell(machine, settings.coordinator, server_config.rank_timeout_s, server_config.log_slow_s)
    guard = Guard(server_config)
    metrics = frontend.observer = Metrics(str(Path(settings.folder, "metrics")), machine, models.names[0])
    metrics.beat()
    found = Found(frontend.timelines, settings.index)
    dashboard = Dashboard(frontend, metrics, models.names[0], settings.index)
    answers: dict[str, Answer] = {"find": found.find, "recent": found.recent, "dashboard": dashboard.own}
    peers = dashboard.peers = Peers(Path(settings.folder, "peers"), settings.index, answers)
    await peers.open()
    dashboard.beat()
    tracing = _tracing(server_config.otlp_traces_endpoint)
    api = Api(
        frontend, preparer, guard, metrics, peers, dashboard, int(time.time()), server_config.max_body_bytes,
        parallel.most_ranks, access_log=server_config.access_log, tenant_weight=server_config.tenant_weight,
        interval_s=parallel.min_stats_update_interval_ms / 1000, tracing=tracing,
    )  # fmt: skip
    api.beat()
    raise_descriptor_limit()
    logging.getLogger("uvicorn.error").addFilter(OncePerKind())
    server = Server(_uvicorn_config(api, server_config))
    drain = Drain(api, server, server_config.drain_timeout_s)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain.asked)
    await _wait_ranks(frontend, settings.ranks, settings.enough, status)
    listeners = [bound(server_config.host, settings.port, *SHARED)]
    if server_config.admin_port is not None:
        listeners.append(bound(admin_host(server_config), server_config.admin_port, *SHARED))
    for listener in listeners:
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    status.send(Ready())
    try:
        await server.serve(listeners)
    finally:
        reader.close()
        peers.close()
        frontend.close()
        if tracing is not None:
            tracing.close()


def _tracing(endpoint: str | None) -> Tracing | None:
    """OpenTelemetry is imported where somebody wants it: it takes a fifth of a second, and is not always installed."""
    if endpoint is None:
        return None
    try:
        from paceline.server.tracing import Tracing

        return Tracing(endpoint)
    except (ImportError, ValueError, OSError) as error:
        # What is wrong can be an OTEL_… variable, too.
        raise StartupError(f"--otlp-traces-endpoint: OpenTelemetry cannot be set up: {error}") from None


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
    """What SIGTERM does. A further one changes nothing: the supervisor kills what is not to go on."""

    def __init__(self, api: Api, server: uvicorn.Server, timeout_s: float) -> None:
        self._api = api
        self._server = server
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def asked(self) -> None:
        """SIGTERM has come."""
        if self._task is None:
            self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        api, server = self._api, self._server
        api.draining = True
        api.end_streams()
        await api.wait_idle(self._timeout_s)
        if api.running:
            logger.warning("%d requests had not finished after %g s", len(api.running), self._timeout_s)
            api.cut_off()
            await api.wait_idle(CUT_OFF_S)
        server.should_exit, server.force_exit = True, bool(api.running)


class Reserved:
    """A port that is held, and the name that says so to others."""

    def __init__(self, held: socket.socket, name: socket.socket) -> None:
        self.port: int = held.getsockname()[1]
        self._sockets = held, name

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def admin_host(config: ServerConfig) -> str:
    """Where the admin's port listens: without a key on loopback."""
    return config.host if config.admin_key or config.admin_key_file else LOOPBACK


def reserve_port(host: str, port: int) -> Reserved:
    """Hold a port for the front-ends without listening on it; port 0 finds a free one.

    Raises StartupError where somebody else has it: bound without sharing first, because a shared bind would
    also succeed next to another server of this user that shares. One that has reserved it and does not listen yet
    would not be seen so; it holds a name in the kernel, which is in the same namespace as the port and goes with it.
    """
    with bound(host, port, socket.SO_REUSEADDR) as probe:
        port = probe.getsockname()[1]
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0paceline {host}:{port}")
        reserved = Reserved(bound(host, port, *SHARED), name)
    except (OSError, StartupError) as error:
        name.close()
        raise (
            error
            if isinstance(error, StartupError)
            else StartupError(f"cannot listen on {host}:{port}: {error.strerror or error}")
        ) from None
    return reserved


def bound(host: str, port: int, *options: int) -> socket.socket:
    """A bound socket with these options. Raises StartupError."""
    made: socket.socket | None = None
    try:
        # Names, brackets and zones: what there is to resolve is the system's to know.
        flags, bare = socket.AI_PASSIVE, host.removeprefix("[").removesuffix("]")
        family, kind, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM, flags=flags)[0]
        made = socket.socket(family, kind)
        for option in options:
            made.setsockopt(socket.SOL_SOCKET, option, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        if made is not None:
            made.close()
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"cannot listen on {host}:{port}: {reason}") from None
    return made


def _uvicorn_config(api: Api, config: ServerConfig) -> uvicorn.Config:
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
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
