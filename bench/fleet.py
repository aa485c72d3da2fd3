"""Deployments of `cost_model.py` and `quota.py`: ranks and a coordinator as processes, one front-end in this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.core.frontend.events import CoordinatorSaid
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import LoadView
from paceline.core.rank.prefill_quota import AUTO
from paceline.core.routing import LeastLoad
from paceline.engines.base import EngineSettings
from paceline.net.coordinator import DPCoordinator
from paceline.net.frontend import FrontendShell
from paceline.net.links import new_identity
from paceline.net.rank import RankSettings, run_rank
from paceline.process.spawn import spawn
from paceline.settings import ParallelConfig

START_S = 120.0


class DatedFrontend(Frontend):
    """A front-end's machine that knows when each rank's report was first seen."""

    def handle(self, event: Any, now: float) -> Any:
        match event:
            case CoordinatorSaid(LoadView(ranks=ranks)):
                for entry in ranks or ():
                    if self.reports.get(entry.rank, (None, 0.0))[0] != (entry.step, entry.load):
                        self.reports[entry.rank] = ((entry.step, entry.load), now)
        return super().handle(event, now)

    @property
    def reports(self) -> dict[int, tuple[tuple[int, Load], float]]:
        """Per rank, its latest report and when it came."""
        return self.__dict__.setdefault("_reports", {})

    def age_s(self, rank: int, now: float) -> float | None:
        """How long the rank has worked since its latest report; none, where that said that it is idle."""
        if rank not in self.reports:
            return None
        (_, load), since = self.reports[rank]
        return now - since if load.waiting or load.running else 0.0


class Fleet:
    """A coordinator and `size` ranks of one engine, one thread each. A context manager: all are gone at its end.

    `prefill_quota`: in lockstep. `changes`: other fields of the engine's settings.
    """

    def __init__(
        self, folder: Path, size: int, engine: str, slots: int, lockstep: bool = False, prefill_quota: int = AUTO,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.size, self.lockstep = size, lockstep
        config = ParallelConfig(data_parallel_size=size, data_parallel_size_local=size)
        self.coordinator = DPCoordinator(config, enable_wave_coordination=lockstep)
        self._statuses: list[Any] = []
        addresses = self.coordinator.get_engine_socket_addresses()
        self._ranks = []
        for rank in range(size):
            reader, writer = get_context("spawn").Pipe(duplex=False)
            settings = EngineSettings(rank=rank, dp_size=size, threads=1, max_num_seqs=slots, **changes)
            rank_settings = RankSettings(
                engine, settings, f"ipc://{folder}/rank-{rank}", *addresses, prefill_quota=prefill_quota,
                group_bind=f"ipc://{folder}/group-{rank}" if lockstep else "",
            )  # fmt: skip
            about = {"settings": rank_settings, "status": writer}
            self._ranks.append(spawn(f"rank {rank}", run_rank, about, "warning"))
            writer.close()
            self._statuses.append(reader)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        self.coordinator.shutdown()


@asynccontextmanager
async def connected(fleet: Fleet) -> AsyncIterator[tuple[FrontendShell, DatedFrontend]]:
    machine = DatedFrontend(new_identity(), LeastLoad(0, 1), lockstep=fleet.lockstep)
    client = FrontendShell(machine, fleet.coordinator.get_stats_publish_address())
    try:
        async with asyncio.timeout(START_S):
            while len(machine.ready_ranks()) < fleet.size:
                await client.wait_changed()
        yield client, machine
    finally:
        client.close()
