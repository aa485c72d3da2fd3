"""Real ranks and a real coordinator, with front-ends in the test's own process: everything said can be watched."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import zmq

from paceline.core import codec
from paceline.core.frontend.events import Placed, Refuse
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import PROTOCOL_VERSION, Identify, RankHello
from paceline.core.requests import Output, SamplingParams
from paceline.core.routing import LeastLoad
from paceline.net.coordinator import DPCoordinator
from paceline.net.frontend import FrontendShell
from paceline.net.links import new_identity
from paceline.net.rank import RankSettings, run_rank
from paceline.process.spawn import spawn
from paceline.settings import DeploymentConfig, EngineConfig, ParallelConfig
from tests.net.peers import context, receive
from tests.pace import stretched
from tests.serving import cpu_s, wait_until


class Answer:
    """Keeps what becomes of a request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.rank: int | None = None
        self.finish: str | None = None
        self.error: str | None = None
        self.done = asyncio.Event()

    def handle(self, news: Placed | Output | Refuse) -> None:
        match news:
            case Placed(_, rank):
                self.rank = rank
            case Output():
                self.tokens += news.token_ids
                self.finish = news.finish_reason
            case Refuse():
                self.error = news.text
        if self.finish is not None or self.error is not None:
            self.done.set()


class Watching(Frontend):
    """A front-end's machine that tells of each change of the wave or of running, in the moment of it."""

    on_change: Callable[[int, bool], None] = staticmethod(lambda wave, running: None)

    def handle(self, event: Any, now: float) -> Any:
        before = (self.wave, self.running)
        effects = super().handle(event, now)
        if (self.wave, self.running) != before:
            # After the effects, as another event of the loop: the machine is not to be called from within.
            asyncio.get_running_loop().call_soon(self.on_change, self.wave, self.running)
        return effects


class Fleet:
    """A coordinator and `size` ranks of one engine, on one machine."""

    def __init__(self, folder: Path, size: int, engine: str, options: dict[str, str], sync_interval: int) -> None:
        self.size = size
        parallel = ParallelConfig(
            data_parallel_size=size, data_parallel_size_local=size, dp_sync_interval=sync_interval
        )
        config = DeploymentConfig(parallel, EngineConfig(engine=engine, options=options, threads=1))
        self.coordinator = DPCoordinator(parallel)
        self._statuses: list[Any] = []
        self._input, self._output = self.coordinator.get_engine_socket_addresses()
        self._settings = (folder, config)
        self._lives = itertools.count(1)
        self.ranks = [self._rank(rank) for rank in range(size)]

    def start_rank(self, rank: int) -> None:
        """Another life of a rank, in place of one that has ended."""
        self.ranks[rank].join()
        self.ranks[rank] = self._rank(rank)

    def _rank(self, rank: int) -> Any:
        folder, config = self._settings
        life = next(self._lives)
        reader, writer = get_context("spawn").Pipe(duplex=False)
        settings = RankSettings(
            config, rank, f"ipc://{folder}/rank-{life}", self._input, self._output, f"ipc://{folder}/group-{life}"
        )
        process = spawn(f"rank {rank}", run_rank, {"settings": settings, "status": writer}, "warning")
        writer.close()
        # Left open: a rank that cannot say how it goes ends.
        self._statuses.append(reader)
        return process

    def frontend(self, index: int, count: int) -> FrontendShell:
        machine = Watching(new_identity(), LeastLoad(index, count), relay_sends=count > 1, lockstep=True)
        return FrontendShell(machine, self.coordinator.get_stats_publish_address())

    def hellos(self) -> list[RankHello]:
        """What each rank says of itself to a new coordinator, which the test plays: the real one is ended."""
        self.coordinator.shutdown()
        decode = codec.from_rank().decode
        said: dict[int, RankHello] = {}
        with context() as zmq_context:
            inbox, broadcasts = zmq_context.socket(zmq.PULL), zmq_context.socket(zmq.XPUB)
            Path(self._output.removeprefix("ipc://")).parent.mkdir(exist_ok=True)
            inbox.bind(self._output)
            broadcasts.bind(self._input)
            while len(said) < self.size:
                receive(broadcasts)
                broadcasts.send(codec.encode(Identify(PROTOCOL_VERSION, 1)))
                while inbox.poll(200):
                    message = decode(receive(inbox)[0])
                    if isinstance(message, RankHello):
                        said[message.rank] = message
        return [said[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()
        self.coordinator.shutdown()


@contextlib.contextmanager
def fleet(folder: Path, size: int, engine: str, options: dict[str, str], sync_interval: int = 16) -> Iterator[Fleet]:
    """A fleet that is gone at the block's end."""
    made = Fleet(folder, size, engine, options, sync_interval)
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def frontends(made: Fleet, count: int) -> AsyncIterator[list[FrontendShell]]:
    clients = [made.frontend(index, count) for index in range(count)]
    try:
        async with asyncio.timeout(stretched(60)):
            for client in clients:
                while len(client.machine.ready_ranks()) < made.size:
                    await client.wait_changed()
        yield clients
    finally:
        for client in clients:
            client.close()


def ask(client: FrontendShell, tokens: int, rank: int | None = None) -> Answer:
    answer = Answer()
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    client.submit(answer.handle, [1, 2, 3, 4], params, rank)
    return answer


def cpu_used_s(pids: list[int], seconds: float) -> float:
    """CPU time that the processes use together in the next `seconds`."""
    import time

    before, end = sum(map(cpu_s, pids)), time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, "the end of the time to measure")
    return sum(map(cpu_s, pids)) - before
