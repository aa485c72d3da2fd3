"""Ranks whose collectives cannot be formed anew, as vLLM's: a death starts all again, and no request is lost."""

from __future__ import annotations

import random

import pytest

from paceline.sim.deployment import LONGEST_LOADING_S, Deployment, Shape
from paceline.sim.run import check_quiescence
from paceline.sim.world import Seeds
from tests.pace import examples

RANKS, REQUESTS, DEATHS = 3, 12, 4


def members_of(deployment: Deployment) -> list[int]:
    assert deployment.coordinator is not None
    return sorted(deployment.coordinator.machine.epoch()[1])


@pytest.mark.parametrize("seed", range(examples(60)))
def test_ranks_killed_at_any_moment(seed: int) -> None:
    draw = random.Random(seed)
    shape = Shape(
        ranks=RANKS, frontends=2, once=True, late_binding=bool(seed % 2), sync_interval=4, scatter=True,
        loss=0.02 * (seed % 3),
    )  # fmt: skip
    deployment = Deployment(shape, Seeds(seed)).start().ready()
    asked = []
    for _ in range(REQUESTS):
        frontend = deployment.frontends[draw.randrange(2)]
        tokens = draw.randrange(1, 60)
        asked.append((frontend, frontend.submit(max_tokens=tokens), tokens))
        deployment.world.run_for(draw.random() * 0.1)
    for _ in range(DEATHS):
        # While they serve, meet, load, or end.
        deployment.world.run_for(draw.random() * 1.5 * LONGEST_LOADING_S)
        victim = draw.randrange(RANKS)
        if deployment.ranks[victim].alive:
            deployment.crash_rank(victim)
            deployment.world.after(draw.random(), lambda victim=victim: deployment.revive_rank(victim))
    deployment.finish(limit_s=120.0)
    for frontend, request, tokens in asked:
        assert frontend.answers[request].tokens == tokens, "nothing is lost, and nothing comes twice"
    # A death that met no request is still being got over.
    deployment.world.run_for(2.0)
    deployment.ready(limit_s=60.0)
    assert members_of(deployment) == list(range(RANKS)), "nobody goes on without the others"
    check_quiescence(deployment)


def test_all_lives_are_new_after_a_death() -> None:
    deployment = Deployment(Shape(ranks=RANKS, once=True, sync_interval=4)).start().ready()
    before = {number: rank.machine.incarnation for number, rank in deployment.ranks.items()}
    deployment.crash_rank(1)
    deployment.world.after(0.5, lambda: deployment.revive_rank(1))
    deployment.world.run_for(1.0)
    deployment.ready()
    after = {number: rank.machine.incarnation for number, rank in deployment.ranks.items()}
    assert all(after[number] != before[number] for number in before)
    assert [rank.machine.bound for rank in deployment.ranks.values()] == [True] * RANKS


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", range(examples(10)))
def test_another_number_of_ranks_is_a_new_start_of_all(seed: int, size: int) -> None:
    deployment = Deployment(Shape(ranks=RANKS, once=True, scaled=True, sync_interval=4), Seeds(seed)).start().ready()
    frontend = deployment.frontends[0]
    asked = [frontend.submit(max_tokens=200) for _ in range(REQUESTS)]
    deployment.world.run_for(0.2)
    call = frontend.scale(size)
    deployment.world.run_until(lambda: frontend.calls[call].over, 200.0, "that it is done")
    deployment.finish(limit_s=120.0)
    assert [frontend.answers[request].tokens for request in asked] == [200] * REQUESTS
    deployment.world.run_for(2.0)
    deployment.ready(limit_s=60.0)
    assert members_of(deployment) == list(range(size))
