"""Groups for tests: every implementation of `RankGroup`, its members threads of one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from paceline.engines.group import RankGroup
from paceline.runtime.group_link import GroupListener, form_group

IMPLEMENTATIONS = [
    "socket",
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torch") is None, reason="torch is not installed: make test-torch"
        ),
    ),
]
"""For parametrize, or for a fixture's params."""


def form(
    implementation: str,
    listener: GroupListener,
    generation: int,
    rank: int,
    addresses: Mapping[int, str],
    timeout_s: float,
) -> RankGroup:
    """One member's group."""
    if implementation == "socket":
        return form_group(listener, generation, rank, addresses, timeout_s)
    from paceline.runtime.torch_link import form_torch_group

    return form_torch_group(listener, generation, rank, addresses, timeout_s)


class Threads:
    """A generation whose members are threads of this process."""

    def __init__(self, implementation: str, addresses: list[str], timeout_s: float = 20.0) -> None:
        self.implementation = implementation
        self.timeout_s = timeout_s
        self.listeners = [GroupListener(address) for address in addresses]
        self.pool = ThreadPoolExecutor(len(addresses))
        self.groups: list[RankGroup] = []
        self.form(1)

    def form(self, generation: int) -> None:
        """Form a new generation of all."""
        addresses = {rank: listener.address for rank, listener in enumerate(self.listeners)}
        self.groups = self.each(
            lambda rank: form(self.implementation, self.listeners[rank], generation, rank, addresses, self.timeout_s)
        )

    def each(self, call: Callable[[int], Any]) -> list[Any]:
        """What `call(rank)` returns at each, all at a time."""
        return [future.result(60) for future in self.start(call)]

    def start(self, call: Callable[[int], Any]) -> list[Future[Any]]:
        """Likewise, without waiting."""
        return [self.pool.submit(call, rank) for rank in range(len(self.listeners))]

    def close(self) -> None:
        """End everything."""
        for group in self.groups:
            group.leave()
        self.pool.shutdown()
        for group in self.groups:
            group.close()
        for listener in self.listeners:
            listener.close()
