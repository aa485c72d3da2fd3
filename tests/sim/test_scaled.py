"""Ranks come and go in the simulation: nothing is lost, and a change is undone, ended or taken over as it should be."""

from __future__ import annotations

from collections import Counter

import pytest

from paceline.sim.deployment import Deployment, Shape
from paceline.sim.run import Options, simulate


def deployment(lockstep: bool = True) -> Deployment:
    made = Deployment(Shape(ranks=2, lockstep=lockstep, scaled=True))
    made.start().ready()
    return made


def provisional(made: Deployment, rank: int) -> bool:
    return made.node is not None and made.node.machine.provisional(rank)


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_rank_more_and_two_fewer_and_no_request_is_lost(lockstep: bool) -> None:
    made = deployment(lockstep)
    frontend = made.frontends[0]
    for size in (3, 1):
        for _ in range(6):
            frontend.submit(max_tokens=40)
        made.world.run_for(0.02)
        frontend.scale(size)
        made.world.run_until(made.settled, 30.0, "that the change is over")
        made.ready()
        assert sorted(made.present()) == list(range(size))
        made.finish()
    assert all(answer.finish_reason == "length" for answer in frontend.answers.values())
    assert len(frontend.answers) == 12


def test_a_rank_that_dies_before_it_has_joined_is_no_more() -> None:
    made = deployment()
    made.frontends[0].scale(3)
    made.world.run_until(lambda: provisional(made, 2), 5.0, "that the node begins")
    made.world.run_until(lambda: 2 in made.ranks, 5.0, "that the rank has loaded")
    made.crash_rank(2)
    made.world.run_until(made.settled, 30.0, "that the change is over")
    scaling = made.frontends[0].machine.scaling
    assert scaling is not None
    assert (scaling.size, scaling.outcome, sorted(made.present())) == (2, "failed", [0, 1])


def test_a_change_goes_on_under_another_coordinator() -> None:
    made = deployment()
    made.frontends[0].scale(3)
    made.world.run_until(lambda: provisional(made, 2), 5.0, "that the node begins")
    made.crash_coordinator()
    made.world.run_for(0.3)
    made.start_coordinator()
    made.world.run_until(made.settled, 30.0, "that the change is over")
    made.ready()
    assert sorted(made.present()) == [0, 1, 2]


@pytest.mark.slow
def test_something_is_always_wrong_and_ranks_come_and_go() -> None:
    happened: Counter[str] = Counter()
    for seed in (*range(6), 78):
        outcome = simulate(Options(seed, faults_per_second=1.0))
        assert outcome.ok, "\n".join([outcome.verdict, *outcome.history])
        happened.update(outcome.faults)
    assert happened["scale up"] > 3
    assert happened["scale down"] > 3
