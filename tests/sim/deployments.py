"""Small deployments with steps of ten milliseconds, for tests of the machines together; and what happened in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paceline.core.rank.events import DummyStep, Step
from paceline.core.rank.prefill_quota import AUTO, OFF
from paceline.core.requests import AddRequest
from paceline.engines.timed import CostModel
from paceline.sim.checks import Checks
from paceline.sim.deployment import Deployment, Shape
from paceline.sim.processes import CoordinatorProcess, FrontendProcess, RankProcess
from paceline.sim.run import check_quiescence
from paceline.sim.world import STEADY

DELAY_S = STEADY.median_s
STEP_S = 0.01
COSTS = CostModel(step_ms=STEP_S * 1e3, prefill_ms=0.0, decode_ms=0.0)
"""Steps take equally long, so a prompt costs nothing: what is seen of the quota is how often ranks agree."""


class Seen(Checks):
    """The invariants, and a record: broadcasts, steps, when each request was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.broadcasts: list[Any] = []
        self.steps = 0
        self.placed_at: dict[tuple[str, int], float] = {}

    def broadcast(self, coordinator: CoordinatorProcess, message: Any) -> None:
        super().broadcast(coordinator, message)
        self.broadcasts.append(message)

    def step(self, rank: RankProcess, effect: Step | DummyStep) -> None:
        super().step(rank, effect)
        self.steps += 1

    def sent(self, frontend: FrontendProcess, rank: int, request: AddRequest) -> None:
        super().sent(frontend, rank, request)
        self.placed_at[frontend.name, request.request] = frontend.world.now


def deploy(ranks: int = 2, frontends: int = 1, *, lockstep: bool = True, slots: int = 8, **shape: Any) -> Deployment:
    shape = {"grouped": False, "sync_interval": 4, "prefill_quota": AUTO if lockstep else OFF, "costs": COSTS, **shape}
    return Deployment(Shape(ranks, frontends, lockstep, slots=slots, **shape), checks=Seen())


def ready(ranks: int = 2, frontends: int = 1, **shape: Any) -> Deployment:
    return deploy(ranks, frontends, **shape).start().ready()


def seen(deployment: Deployment) -> Seen:
    assert isinstance(deployment.checks, Seen)
    return deployment.checks


def rest(deployment: Deployment) -> None:
    """Everything is answered, all ranks pause, and all is counted exactly."""
    deployment.finish()
    check_quiescence(deployment)


def waves(deployment: Deployment) -> set[int]:
    return {rank.machine.wave for rank in deployment.ranks.values()}


def placed(frontend: FrontendProcess) -> dict[int, int]:
    """The requests that have, or had, a rank, and which."""
    return {request: answer.rank for request, answer in frontend.answers.items() if answer.rank >= 0}


def tokens(frontends: Iterable[FrontendProcess]) -> list[int]:
    """How many each client got: 0, 1, 2, …, each once, or the run had been broken."""
    return [answer.tokens for frontend in frontends for answer in frontend.answers.values()]
