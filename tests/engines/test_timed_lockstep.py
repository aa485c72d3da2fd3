"""The timed engine in lockstep: as slow as the slowest, and a step that was not finished is as if not begun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineError, EngineRequest, EngineSettings
from paceline.engines.group import EpochEnded
from paceline.engines.timed import CostModel, TimedLockstepEngine
from tests.net.groups import Threads, group_path
from tests.pace import stretched

COSTS = CostModel(step_ms=1, prefill_ms=1, decode_ms=0)
BLOCKED_S = 0.3


def engine(dp_size: int = 2, costs: CostModel = COSTS) -> TimedLockstepEngine:
    return TimedLockstepEngine(EngineSettings(dp_size=dp_size), costs)


def request(key: int, prompt: int = 4, tokens: int = 3) -> EngineRequest:
    return EngineRequest(key, [1] * prompt, SamplingParams(max_tokens=tokens))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Threads]:
    members = Threads([group_path(tmp_path, rank) for rank in range(2)])
    yield members
    members.close()


def test_a_step_lasts_as_long_as_the_slowest_rank_s(two: Threads) -> None:
    engines = [engine(), engine()]
    for rank in range(2):
        engines[rank].join(two.groups[rank])
    engines[0].add(request(1, prompt=100))
    begin = time.monotonic()
    two.each(lambda rank: engines[rank].dummy_step() if rank else engines[rank].step())
    assert time.monotonic() - begin >= 0.1


def test_prompts_stay_within_the_quota() -> None:
    alone = engine(dp_size=1, costs=CostModel(0, 0, 0))
    alone.add(request(1, prompt=10, tokens=2))
    found = []
    for quota in (0, 4, 0, None, 0):
        alone.limit_prefill(quota)
        result = alone.step()
        found.append((result.prefilled_tokens, result.decoded_tokens))
    assert found == [(0, 0), (4, 0), (0, 0), (6, 1), (0, 1)]


def test_what_can_start_is_said() -> None:
    alone = TimedLockstepEngine(EngineSettings(max_num_seqs=2, kv_cache_tokens=50), CostModel(0, 0, 0))
    for key in range(4):
        alone.add(request(key, prompt=10, tokens=3))
    assert (alone.load().prefill_tokens, alone.load().startable_tokens) == (40, 20)
    large = TimedLockstepEngine(EngineSettings(max_num_seqs=4, kv_cache_tokens=30), CostModel(0, 0, 0))
    for key in range(4):
        large.add(request(key, prompt=10, tokens=3))
    assert large.load().startable_tokens == 20


def test_a_step_that_its_epoch_did_not_live_to_see_is_made_anew(two: Threads) -> None:
    engines = [engine(), engine()]
    for rank in range(2):
        engines[rank].join(two.groups[rank])
    engines[0].add(request(1, prompt=4, tokens=1))
    before = engines[0].load().prefill_tokens
    waiting = two.pool.submit(engines[0].step)
    with pytest.raises(TimeoutError):
        waiting.result(BLOCKED_S)
    two.groups[1].leave()
    with pytest.raises(EpochEnded):
        waiting.result(stretched(30))
    assert engines[0].load().prefill_tokens == before
    for group in two.groups:
        group.close()
    two.form(2)
    for rank in range(2):
        engines[rank].join(two.groups[rank])
    made, _ = two.each(lambda rank: engines[rank].dummy_step() if rank else engines[rank].step())
    assert [output.finish_reason for output in made.outputs] == ["length"]
    assert not engines[0].has_work()


def test_among_several_it_needs_a_group() -> None:
    with pytest.raises(EngineError, match="has not been given their group"):
        engine().dummy_step()
