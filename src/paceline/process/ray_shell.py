"""The process that speaks with Ray: it has the cluster set places aside for ranks, and an actor in each.

What is done is decided by `core/places.py`. A place is a placement group of one bundle and the actor in it. Ray moves
neither to another node by itself: an actor's end is told, and whoever watches the rank asks for its next life.

A question for news is open at each actor all the time; so Ray says at once when an actor has ended, and of a node when
it takes that for dead. An actor that cannot be reached for a while is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterable
from multiprocessing.connection import Connection
from typing import Any

# Before Ray is loaded: it tells a server of its makers' otherwise.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util import get_node_ip_address, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from paceline import __version__
from paceline.core import places
from paceline.core.places import ClusterNode, Places
from paceline.process.ray_actor import Logged, News, RankActor
from paceline.process.ray_link import Connected, Ended, Life, Said, ShellSettings
from paceline.process.spawn import AGAIN, unmoved
from paceline.process.supervisor import Failed, Progressed, Ready

logger = logging.getLogger("paceline.supervisor")

CONNECT_AGAIN_S = 1.0
PATIENCE_S = 10.0
"""For the answer of a cluster's head that may not be there."""
ASK_AGAIN_S = 0.5
LOOKS_S = 2.0
SAY_WAITING_S = (5.0, 60.0)
"""How long a rank waits for room before the log says so, and again."""
CALLS_AT_ONCE = 4
"""At an actor: a question for news is always open."""


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Shell:
    """Carries orders to Ray, and what comes of them back through `pipe`."""

    def __init__(self, settings: ShellSettings, pipe: Connection) -> None:
        self._pipe = pipe
        self._machine = Places(settings.ranks_a_node)
        self._loop = asyncio.get_running_loop()
        self._lives: dict[int, Life] = {}
        self._places: dict[int, tuple[Any, Any]] = {}
        """The placement group and the actor of each place."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until the supervisor has ended, or ends this process, or the cluster is another."""
        self._start(self._watch_cluster())
        orders: asyncio.Queue[Life | places.End | places.Kill | None] = asyncio.Queue()
        threading.Thread(target=self._read, args=(orders,), name="orders", daemon=True).start()
        while (order := await orders.get()) is not None:
            if isinstance(order, Life):
                self._lives[order.life] = order
                self._feed(places.Begin(order.life, order.rank, order.needs, nodes()))
            else:
                self._feed(order)

    def _read(self, orders: asyncio.Queue[Any]) -> None:
        order: object = True
        while order is not None:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                order = None
            self._loop.call_soon_threadsafe(orders.put_nowait, order)

    def _feed(self, event: places.Event) -> None:
        for effect in self._machine.handle(event, time.monotonic()):
            match effect:
                case places.FindPlace():
                    self._start(self._keep(effect))
                case places.GiveUp(number):
                    self._give_up(number)
                case places.StartLife(number, life):
                    self._places[number][1].start.remote(self._lives[life])
                case places.EndLife(number, _, kill):
                    self._places[number][1].end.remote(kill)
                case places.SayEnded(life, exit_code, why):
                    self._lives.pop(life, None)
                    self._pipe.send(Ended(life, exit_code, why))

    def _start(self, running: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_cluster(self) -> None:
        """Ends this process where the cluster that it is connected to is no more: Ray itself does not see that another
        has begun at the same address, and nothing that was asked for ever ends.
        """
        own = ray.get_runtime_context().get_node_id()
        while True:
            await asyncio.sleep(LOOKS_S)
            try:
                alive = [one["NodeID"] for one in await asyncio.to_thread(ray.nodes) if one["Alive"]]
            except Exception:
                # Its head is away. Ray ends this process where that lasts a minute.
                continue
            if own not in alive:
                logger.warning("this node is no longer in the Ray cluster; connecting anew")
                os._exit(1)

    async def _keep(self, wanted: places.FindPlace) -> None:
        """One place from when it is looked for until its actor has ended."""
        try:
            group, actor = self._find(wanted)
            await self._ready(wanted, actor)
            node = placement_group_table(group)["bundles_to_node_id"][0]
            host = next((one["NodeManagerAddress"] for one in ray.nodes() if one["NodeID"] == node), "unknown")
            logger.info("rank %d has its place on Ray node %s", wanted.rank, host, extra={"rank": wanted.rank})
            self._feed(places.Found(wanted.place, node))
            seen = 0
            while True:
                try:
                    seen, news = await actor.news.remote(seen)
                except ActorUnavailableError:
                    await asyncio.sleep(ASK_AGAIN_S)
                    continue
                self._on_news(news)
        except RayError as error:
            self._feed(places.Lost(wanted.place, in_one_line(error)))

    def _find(self, wanted: places.FindPlace) -> tuple[Any, Any]:
        needs = {name: need for name, need in wanted.needs.items() if need}
        group = placement_group([needs], strategy="STRICT_PACK", _soft_target_node_id=wanted.hint)
        actor = ray.remote(RankActor).options(
            num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0), max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        ).remote(__version__)  # fmt: skip
        self._places[wanted.place] = group, actor
        return group, actor

    async def _ready(self, wanted: places.FindPlace, actor: Any) -> None:
        """Until there is room and the actor is there, however long that takes."""
        asked = asyncio.ensure_future(_answered(actor))
        needs = ", ".join(f"{need:g} {name}" for name, need in wanted.needs.items() if need)
        for life in [one.life for one in self._lives.values() if one.rank == wanted.rank]:
            self._pipe.send(Said(life, Progressed(f"waiting for room in the Ray cluster: {needs}", 0.0)))
        wait_s, again_s = SAY_WAITING_S
        while not (await asyncio.wait([asked], timeout=wait_s))[0]:
            text = "rank %d waits for room in the Ray cluster: %s"
            logger.warning(text, wanted.rank, needs, extra={"rank": wanted.rank})
            wait_s = again_s
        await asked

    def _on_news(self, news: Iterable[News]) -> None:
        for one in news:
            match one:
                case Logged(lines):
                    with contextlib.suppress(OSError):
                        os.write(sys.stderr.fileno(), lines)
                case Said(life, status):
                    self._pipe.send(one)
                    if isinstance(status, Ready):
                        self._feed(places.LifeReady(life))
                case Ended(life, exit_code, why):
                    self._feed(places.LifeEnded(life, exit_code, why, again=exit_code == AGAIN))

    def _give_up(self, number: int) -> None:
        group, actor = self._places.pop(number, (None, None))
        if group is not None:
            with contextlib.suppress(RayError):
                ray.kill(actor)
            remove_placement_group(group)


async def _answered(actor: Any) -> None:
    while True:
        try:
            await actor.__ray_ready__.remote()
            return
        except ActorUnavailableError:
            await asyncio.sleep(ASK_AGAIN_S)


class SaidByRay(io.TextIOBase):
    """What Ray prints for whoever sits before a screen, as lines of our log."""

    def write(self, text: str) -> int:
        for line in COLOURS.sub("", text).splitlines():
            if line.strip():
                logger.warning("Ray: %s", line.strip())
        return len(text)


def nodes() -> list[ClusterNode]:
    """The nodes that live, with what is free."""
    free = ray._private.state.available_resources_per_node()
    return [ClusterNode(one["NodeID"], free.get(one["NodeID"], {})) for one in ray.nodes() if one["Alive"]]


def in_one_line(error: Exception) -> str:
    """What ended an actor, without the list of all that Ray knows of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, RayError) and len(lines) > 1 else " ".join(lines))[:500]


def connect(address: str) -> str:
    """Connect to a cluster that runs already; returns this node's address there. Raises OSError, and what Ray does."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        # Ray would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level="error")
    # Ray has it end this process.
    signal.signal(signal.SIGTERM, unmoved)
    return str(get_node_ip_address())


def run_shell(settings: ShellSettings, pipe: Connection) -> None:
    """Connect, and serve until the supervisor ends. One in another's place waits for the cluster, however long."""
    say_at = 0.0
    sys.stdout = SaidByRay()
    while True:
        try:
            pipe.send(Connected(connect(settings.address)))
            break
        except Exception as error:
            # Ray raises many kinds, for an address and for a cluster that is not there.
            why = f"{settings.address}: {in_one_line(error)}"
        if settings.fresh:
            pipe.send(Failed(why))
            sys.exit(1)
        if time.monotonic() >= say_at:
            logger.warning("waiting for the Ray cluster at %s", why)
            say_at = time.monotonic() + SAY_WAITING_S[1]
        time.sleep(CONNECT_AGAIN_S)

    async def serve() -> None:
        await Shell(settings, pipe).serve()

    asyncio.run(serve())
