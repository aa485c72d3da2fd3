"""Starts and ends a node's ranks as the coordinator says: the node's machine between its link and the supervisor."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

from paceline.core.messages import Scaling
from paceline.core.node import (
    CoordinatorSaid,
    Event,
    KeepRank,
    Node,
    RankEnded,
    StartRank,
    StopRank,
    ToCoordinator,
)
from paceline.net.node import NodeLink
from paceline.process.supervisor import Supervisor

logger = logging.getLogger("paceline.supervisor")

StartRankProcess = Callable[[int, Callable[[str], None]], None]
"""Starts a rank's process in the supervisor; the callable is told why it ended, until the rank is kept."""


class NodeRanks:
    """One node's ranks, from when it serves. `on_scaling`: called when the machine has heard of a change."""

    def __init__(
        self, machine: Node, supervisor: Supervisor, coordinator_input: str, coordinator_output: str,
        start_rank: StartRankProcess, on_scaling: Callable[[Scaling], None],
    ) -> None:  # fmt: skip
        self._machine = machine
        self._supervisor = supervisor
        self._start_rank = start_rank
        self._on_scaling = on_scaling
        self._link = NodeLink(machine.identity, coordinator_input, coordinator_output, supervisor.attend(self._attend))

    def close(self) -> None:
        """Hear nothing more."""
        self._link.close()

    def _attend(self) -> None:
        while True:
            try:
                message = self._link.inbox.get_nowait()
            except queue.Empty:
                return
            self._feed(CoordinatorSaid(message))

    def _feed(self, event: Event) -> None:
        before = self._machine.scaling.number
        effects = self._machine.handle(event, time.monotonic())
        if self._machine.scaling.number != before:
            self._on_scaling(self._machine.scaling)
        for effect in effects:
            match effect:
                case StartRank(rank):
                    logger.info("starting rank %d", rank)
                    self._start_rank(rank, lambda why, rank=rank: self._feed(RankEnded(rank, why)))  # type: ignore[misc]
                case KeepRank(rank):
                    self._supervisor.keep(rank_name(rank))
                case StopRank(rank):
                    logger.info("ending rank %d", rank)
                    self._supervisor.remove(rank_name(rank))
                case ToCoordinator(message):
                    self._link.send(message)


def rank_name(rank: int) -> str:
    """What a rank's process is called."""
    return f"rank {rank}"
