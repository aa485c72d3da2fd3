"""The engine with memory: against the `timed` engine itself, step by step; memory, pushing out, shared prompts."""

from __future__ import annotations

from random import Random

import pytest

from paceline.core.rank.events import Stepped
from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.timed import CostModel, TimedEngine
from paceline.sim.engine import BLOCK_TOKENS, EngineShape, MemoryEngine, PrefixCache, Sequence
from tests.sim.traces import drawn, sequence

FREE = CostModel(step_ms=0, prefill_ms=0, decode_ms=0)


def engine(*sequences: Sequence, **shape: int) -> MemoryEngine:
    made = MemoryEngine(EngineShape(**shape), lambda request: sequences[request.request])  # type: ignore[arg-type]
    for one in sequences:
        made.queue(one)
    return made


def of_trace(count: int, seed: int, shared: bool = False) -> list[Sequence]:
    arrivals = drawn(count, 1.0, seed, shared)
    return [sequence(n, one.prompt_tokens, one.answer_tokens, one.blocks) for n, one in enumerate(arrivals)]


def step(made: MemoryEngine, quota: int | None = None) -> Stepped:
    """One step of those that it would take at once."""
    made.plan(quota)
    return made.step(1)


def ended(done: Stepped) -> list[int]:
    return [output.key for output in done.outputs if output.finish_reason is not None]


def run_out(made: MemoryEngine) -> list[int]:
    """The requests in the order in which they end."""
    keys: list[int] = []
    while made.has_work():
        keys += ended(made.step(made.plan().steps))
    return keys


@pytest.mark.parametrize("seed", range(6))
def test_every_step_is_the_timed_engines(seed: int) -> None:
    chance = Random(seed)
    slots, budget = chance.choice((3, 16, 64)), chance.choice((64, 128, 512))
    settings = EngineSettings(max_num_seqs=slots, max_num_batched_tokens=budget, kv_cache_tokens=10**9)
    timed, model = TimedEngine(settings, FREE), engine(slots=slots, budget=budget, kv_tokens=10**9)
    coming = [(chance.randrange(120), one) for one in drawn(60, 1.0, seed)]
    for moment in range(100_000):
        for number, (at, one) in enumerate(coming):
            if at == moment:
                request = EngineRequest(number, [1] * one.prompt_tokens, SamplingParams(max_tokens=one.answer_tokens))
                timed.add(request)
                model.queue(sequence(number, one.prompt_tokens, one.answer_tokens))
        assert timed.has_work() == model.has_work()
        if not timed.has_work():
            if moment > 120:
                return
            continue
        result, done = timed.step(), step(model)
        assert (done.prefilled_tokens, done.decoded_tokens) == (result.prefilled_tokens, result.decoded_tokens)
        assert set(ended(done)) == {out.key for out in result.outputs if out.finish_reason is not None}
        load, found = timed.load(), model.load()
        assert (load.prefill_tokens, load.decoding) == (found.prefill_tokens, found.decoding)
        assert load.waiting + load.running == found.waiting + found.running
    pytest.fail("the engines never had nothing to do")


def test_many_steps_at_once_are_as_many_single_ones() -> None:
    many, single = (engine(*(sequence(n, 50 * n + 7, 5 * n + 3) for n in range(9)), slots=4) for _ in range(2))
    at_once = 0
    while many.has_work():
        _, steps = many.plan()
        at_once = max(at_once, steps)
        done = many.step(steps)
        outputs = [output for _ in range(steps) for output in step(single).outputs]
        assert (done.load, done.outputs) == (single.load(), outputs)
    assert not single.has_work()
    assert at_once > 3


def test_an_answer_is_handed_out_whole_and_once() -> None:
    made = engine(*of_trace(80, 3), kv_tokens=7000, slots=64)
    tokens: dict[int, list[int]] = {}
    while made.has_work():
        for output in made.step(made.plan().steps).outputs:
            tokens.setdefault(output.key, []).extend(output.token_ids)
    assert {key: len(got) for key, got in tokens.items()} == {one.number: one.answer for one in of_trace(80, 3)}
    assert all(got == list(range(len(got))) for got in tokens.values())


def test_memory_is_never_overrun_and_all_end() -> None:
    made = engine(*of_trace(80, 3), kv_tokens=7000, slots=64)
    assert len(run_out(made)) == 80
    assert made.preempted > 0
    assert made.kv_peak <= 7000
    assert made.kv_used == made.to_prefill == made.decoding == made.kv_waiting == 0


def test_who_began_last_is_pushed_out_and_computed_anew() -> None:
    first, last = sequence(0, 50, 40), sequence(1, 40, 40)
    made = engine(first, last, kv_tokens=100, slots=2)
    done = step(made)
    assert (done.prefilled_tokens, done.decoded_tokens) == (90, 2)
    assert made.steady() == 1  # by the memory that may go unreported
    for _ in range(4):
        assert ended(step(made)) == []
    made.plan()
    assert (made.preempted, list(made.running), list(made.waiting)) == (1, [first], [last])
    assert (made.decoded, last.made, last.to_prefill) == (1, 5, 45)
    made.step()
    assert run_out(made) == [0, 1]


def test_memory_use_grows_by_little_unreported() -> None:
    made = engine(*(sequence(n, 10, 5000) for n in range(8)), kv_tokens=100_000)
    step(made)
    assert made.plan().steps == 100_000 // 100 // 8


def test_a_request_begins_when_its_prompt_fits() -> None:
    made = engine(sequence(0, 600, 9), sequence(1, 500, 9), kv_tokens=1000)
    made.plan()
    assert (len(made.running), len(made.waiting)) == (1, 1)


def test_quota_bounds_prompt_tokens_of_a_step() -> None:
    made = engine(sequence(0, 600, 9))
    assert step(made, quota=100).prefilled_tokens == 100
    done = step(made, quota=0)
    assert (done.prefilled_tokens, done.decoded_tokens) == (0, 0)


def test_equal_beginnings_are_computed_and_kept_once() -> None:
    prompt = 2 * BLOCK_TOKENS + 10
    made = engine(sequence(0, prompt, 100, (7, 8, 9)))
    step(made)
    made.queue(sequence(1, prompt, 100, (7, 8, 10)))
    assert step(made).prefilled_tokens == 10
    assert made.hit_tokens == 2 * BLOCK_TOKENS
    assert made.kv_used == 2 * BLOCK_TOKENS + 2 * 10 + 3
    assert len(run_out(made)) == 2
    # Still there, but nobody's.
    made.queue(sequence(2, prompt, 2, (7, 8, 9)))
    assert step(made).prefilled_tokens == 10
    assert len(run_out(made)) == 1
    assert made.kv_used == 0


def test_a_prompt_that_is_all_there_still_computes_its_end() -> None:
    made = engine(sequence(0, BLOCK_TOKENS, 1, (7,)))
    run_out(made)
    made.queue(sequence(1, BLOCK_TOKENS, 1, (7,)))
    assert step(made).prefilled_tokens == BLOCK_TOKENS


def test_idle_blocks_make_room() -> None:
    made = engine(sequence(0, 2 * BLOCK_TOKENS, 2, (1, 2)), kv_tokens=4 * BLOCK_TOKENS)
    run_out(made)
    made.queue(sequence(1, 2 * BLOCK_TOKENS, 2, (3, 4)))
    run_out(made)
    made.queue(sequence(2, 2 * BLOCK_TOKENS + 1, 2, (1, 2, 5)))
    # The end of the first prompt had to go, its beginning is still there.
    assert step(made).prefilled_tokens == BLOCK_TOKENS + 1


@pytest.mark.parametrize("seed", range(4))
def test_shared_memory_is_all_given_back(seed: int) -> None:
    made = engine(*of_trace(120, seed, shared=True), kv_tokens=12_000, slots=32)
    assert len(run_out(made)) == 120
    assert made.hit_tokens > 0
    assert made.kv_used == made.to_prefill == 0
    assert made.kv_peak <= 12_000


def test_load_tells_what_there_is() -> None:
    made = engine(sequence(0, 3000, 9), sequence(1, 10, 9), budget=1000, slots=8)
    load = step(made).load
    assert (load.waiting, load.running, load.slots, load.prefill_tokens) == (1, 1, 8, 2010)
    assert (load.kv_used, load.kv_total, load.step_tokens, load.kv_waiting) == (3000, 131_072, 1000, 10)
    assert (load.startable_tokens, load.decoding, load.answer_tokens) == (1000, 0, 256)


# The cache of blocks ----------------------------------------------------------------------------


def filled(*blocks: int) -> PrefixCache:
    cache = PrefixCache()
    for block in blocks:
        assert cache.add(block)
    return cache


def test_only_leading_blocks_match() -> None:
    cache = filled(1, 2, 4)
    assert cache.match([1, 2, 3, 4]) == 2
    assert cache.match([3, 1]) == 0
    assert cache.match([]) == 0


def test_a_block_is_idle_when_its_last_user_has_gone() -> None:
    cache = filled(1, 2)
    assert cache.take([1]) == 0
    assert cache.release([1, 2]) == 1
    assert (cache.held, list(cache.idle)) == ({1: 1}, [2])
    assert cache.idle_among([1, 2, 3]) == 1
    assert cache.take([1, 2]) == 1
    assert cache.held == {1: 2, 2: 1}


def test_what_is_there_is_not_added_again() -> None:
    cache = filled(1)
    assert not cache.add(1)
    cache.release([1])
    assert not cache.add(1)


def test_least_lately_used_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    cache = filled(1, 2, 3)
    cache.release([1, 2, 3])
    cache.take([3])
    cache.release([3])
    assert list(cache.idle) == [2, 1, 3]
    cache.evict(2)
    assert list(cache.idle) == [3]
    cache.evict(9)
    assert not cache.idle
