"""Groups for tests: the members threads of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from paceline.engines.group import RankGroup
from paceline.net.group import GroupListener, form_group
from tests.pace import stretched


def group_path(folder: str | os.PathLike[str], rank: int) -> str:
    return f"ipc://{os.fspath(folder)}/group-{rank}"


class Threads:
    """A generation whose members are threads of this process."""

    def __init__(self, addresses: list[str], timeout_s: float = 20.0) -> None:
        self.timeout_s = timeout_s
        self.listeners = [GroupListener(address) for address in addresses]
        self.pool = ThreadPoolExecutor(len(addresses))
        self.groups: list[RankGroup] = []
        self.form(1)

    def form(self, epoch: int) -> None:
        addresses = {rank: listener.address for rank, listener in enumerate(self.listeners)}
        self.groups = self.each(lambda rank: form_group(self.listeners[rank], epoch, rank, addresses, self.timeout_s))

    def each(self, call: Callable[[int], Any]) -> list[Any]:
        return [future.result(stretched(60)) for future in self.start(call)]

    def start(self, call: Callable[[int], Any]) -> list[Future[Any]]:
        return [self.pool.submit(call, rank) for rank in range(len(self.listeners))]

    def close(self) -> None:
        for group in self.groups:
            group.leave()
        self.pool.shutdown()
        for group in self.groups:
            group.close()
        for listener in self.listeners:
            listener.close()
