"""The moe engine in a group: the same tokens for any number of ranks, and no step without everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.base import EngineError
from paceline.engines.group import EpochEnded
from tests.engines.moe_runs import Answers, Deployment, Leaving, make_engine, many_requests, request, run_alone
from tests.pace import stretched

REQUESTS = many_requests(64)
NARROW = {"max_num_seqs": 6, "max_num_batched_tokens": 24}
BLOCKED_S = 1.0
"""A step that has not ended by then is taken for blocked. One takes a few milliseconds."""

Deploys = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploys]:
    made: list[Deployment] = []

    def deploy(dp_size: int, **settings: Any) -> Deployment:
        made.append(Deployment(tmp_path, dp_size, **{**NARROW, **settings}))
        made[0].form(1, range(dp_size))
        return made[0]

    yield deploy
    for deployment in made:
        deployment.close()


@pytest.fixture(scope="module")
def alone() -> Answers:
    """What each request gets when it is the only one."""
    engine = make_engine()
    answers: Answers = {}
    for one in REQUESTS:
        engine.add(one)
        answers[one.key] = [token for output in run_alone(engine) for token in output.token_ids]
    return answers


def stagger(deployment: Deployment, ranks: range) -> None:
    """Two requests come before every step, in turn at each of `ranks`."""
    for index, one in enumerate(REQUESTS):
        deployment.arrivals[ranks[index % len(ranks)]].setdefault(index // 2, []).append(one)


def test_requests_that_run_alone_differ(alone: Answers) -> None:
    # Or what follows would compare the same with the same.
    assert len({tuple(tokens[:4]) for tokens in alone.values() if len(tokens) >= 4}) > 40
    assert [len(alone[one.key]) for one in REQUESTS] == [one.params.max_tokens for one in REQUESTS]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_tokens_do_not_depend_on_the_number_of_ranks(dp_size: int, deploy: Deploys, alone: Answers) -> None:
    deployment = deploy(dp_size)
    stagger(deployment, range(dp_size))
    deployment.run()
    assert deployment.answers == alone


@pytest.mark.parametrize("quotas", [(0, 3), (1, None, 0), (7,)], ids=str)
def test_tokens_do_not_depend_on_the_prefill_quota(
    quotas: tuple[int | None, ...], deploy: Deploys, alone: Answers
) -> None:
    deployment = deploy(2)
    stagger(deployment, range(2))
    deployment.quota = lambda step: quotas[step % len(quotas)]
    deployment.run()
    assert deployment.answers == alone


def test_more_ranks_than_experts(deploy: Deploys) -> None:
    options = {"experts": "2", "experts_per_token": "1"}
    engine = make_engine(options=options)
    engine.add(request(0, tokens=12))
    expected = [output.token_ids[0] for output in run_alone(engine)]
    deployment = deploy(3, options=options)
    deployment.arrivals[2][0] = [request(0, tokens=12)]
    deployment.run()
    assert deployment.answers == {0: expected}


def test_one_rank_works_and_the_others_take_part(deploy: Deploys, alone: Answers) -> None:
    deployment = deploy(4)
    stagger(deployment, range(1, 2))
    deployment.run()
    assert deployment.answers == alone
    assert len(set(deployment.steps)) == 1


def test_without_dummy_steps_it_blocks(deploy: Deploys) -> None:
    deployment = deploy(2)
    busy, idle = deployment.engines
    busy.add(request(0, tokens=9))
    futures = deployment.start(lambda rank: busy.step() if rank == 0 else idle.has_work())
    assert futures[1].result(stretched(30)) is False
    with pytest.raises(TimeoutError):
        futures[0].result(BLOCKED_S)
    # It is the dummy step that was missing, and nothing else.
    idle.dummy_step()
    assert len(futures[0].result(stretched(30)).outputs) == 1
    # Blocked again; ended from without.
    futures = deployment.start(lambda rank: busy.step() if rank == 0 else None)
    with pytest.raises(TimeoutError):
        futures[0].result(BLOCKED_S)
    deployment.groups[1].leave()
    with pytest.raises(EpochEnded):
        futures[0].result(stretched(30))


def test_every_layer_has_two_all_to_alls(deploy: Deploys) -> None:
    # A member that goes at the n-th of them: all that come before are done, and one later there is none left.
    deployment = deploy(2, options={"layers": "3"})
    leaving = Leaving(deployment.groups[1], at=6)
    deployment.engines[1].join(leaving)
    deployment.engines[0].add(request(0))
    futures = deployment.start(lambda rank: deployment.engines[rank].dummy_step() if rank else None)
    deployment.take(deployment.engines[0].step())
    futures[1].result(stretched(30))
    assert len(deployment.answers[0]) == 1
    with pytest.raises(EpochEnded):
        deployment.engines[1].dummy_step()


@pytest.mark.parametrize("members", [[0, 1, 3], [0, 2, 1], [3, 1], [0]])
def test_group_changes_between_steps(members: list[int], deploy: Deploys, alone: Answers) -> None:
    deployment = deploy(4)
    stagger(deployment, range(2))
    gone = [rank for rank in (0, 1) if rank not in members]
    deployment.run(until_step=20)
    deployment.form(2, members)
    for rank in gone:
        # Its requests are sent anew to one that lives, as front-ends do.
        mine = [one for index, one in enumerate(REQUESTS) if index % 2 == rank]
        for one in mine:
            deployment.answers.pop(one.key, None)
        deployment.arrivals[members[0]].setdefault(20, []).extend(mine)
        deployment.arrivals[rank].clear()
    deployment.run()
    assert deployment.answers == alone


@pytest.mark.parametrize("at", range(4))
def test_step_that_is_broken_off_is_made_anew(at: int, deploy: Deploys, alone: Answers) -> None:
    deployment = deploy(3)
    stagger(deployment, range(3))
    # Each layer has two all-to-alls: in step 11, before the `at`-th of them.
    deployment.engines[2].join(Leaving(deployment.groups[2], at=2 * 2 * 11 + at))
    deployment.run()
    assert sorted(deployment.steps)[0] == deployment.steps[2] == 11
    deployment.form(2, [0, 1, 2])
    # Some may have ended the step that others have not: each takes it up where it is.
    deployment.run()
    assert deployment.answers == alone


def test_broken_step_leaves_no_trace(deploy: Deploys) -> None:
    deployment = deploy(2)
    engine = deployment.engines[0]
    engine.add(request(0, "a prompt of more tokens than fit", tokens=3))
    engine.add(request(1, [999]))
    deployment.groups[1].leave()
    for _ in range(3):
        with pytest.raises(EpochEnded):
            engine.step()
        assert (engine.load().kv_used, engine.load().prefill_tokens) == (0, 33)
        assert engine.has_work()
    deployment.form(2, [0])
    result = engine.step()
    assert (result.prefilled_tokens, result.decoded_tokens) == (24, 0)
    assert [output.finish_reason for output in result.outputs] == ["error"]


def test_error_alone_takes_part_in_the_step(deploy: Deploys) -> None:
    # A step that computes nothing has its collectives all the same: the others are in theirs.
    deployment = deploy(2)
    deployment.arrivals[0][0] = [request(0, [999])]
    deployment.arrivals[1][0] = [request(1)]
    deployment.run()
    assert deployment.answers[0] == []
    assert len(deployment.answers[1]) == 8


def test_several_ranks_need_a_group() -> None:
    engine = make_engine(dp_size=2)
    engine.add(request(0))
    with pytest.raises(EngineError, match="group"):
        engine.step()


def test_ranks_of_different_models(deploy: Deploys) -> None:
    deployment = deploy(2)
    other = make_engine(rank=1, dp_size=2, options={"d_model": "64"})
    other.join(deployment.groups[1])
    futures = deployment.start(lambda rank: other.dummy_step() if rank else deployment.engines[0].dummy_step())
    with pytest.raises(EngineError, match="rank 1 runs another model"):
        futures[0].result(stretched(30))
