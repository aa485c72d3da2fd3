"""The engine model: against the `timed` engine itself, step by step; memory, pushing out, shared prompts."""

from __future__ import annotations

from random import Random

import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.timed import CostModel, TimedEngine
from paceline.simulate.traffic.engine import Engine, EngineShape
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import BLOCK_TOKENS, Arrival
from tests.simulate.traffic.deployments import drawn

FREE = CostModel(step_ms=0, prefill_ms=0, decode_ms=0)


def sequence(number: int, prompt: int, answer: int, blocks: tuple[int, ...] = ()) -> Sequence:
    return Sequence(number, Arrival(0.0, prompt, answer, blocks), 0)


def engine(*sequences: Sequence, **shape: int) -> Engine:
    made = Engine(EngineShape(**shape))  # type: ignore[arg-type]
    for one in sequences:
        made.add(one)
    return made


def run_out(made: Engine) -> list[Sequence]:
    ended: list[Sequence] = []
    while made.has_work():
        steps = made.steady()
        if steps:
            ended += made.advance(steps)
        else:
            made.begin()
            ended += made.end()[1]
    return ended


@pytest.mark.parametrize("seed", range(6))
def test_every_step_is_the_timed_engines(seed: int) -> None:
    chance = Random(seed)
    slots, budget = chance.choice((3, 16, 64)), chance.choice((64, 128, 512))
    settings = EngineSettings(max_num_seqs=slots, max_num_batched_tokens=budget, kv_cache_tokens=10**9)
    timed, model = TimedEngine(settings, FREE), engine(slots=slots, budget=budget, kv_tokens=10**9)
    coming = [(chance.randrange(120), one) for one in drawn(60, 1.0, seed)]
    for step in range(100_000):
        for number, (at, one) in enumerate(coming):
            if at == step:
                request = EngineRequest(number, [1] * one.prompt_tokens, SamplingParams(max_tokens=one.answer_tokens))
                timed.add(request)
                model.add(Sequence(number, one, 0))
        assert timed.has_work() == model.has_work()
        if not timed.has_work():
            if step > 120:
                return
            continue
        result = timed.step()
        model.begin()
        made = (model.prefilled, model.decoded)
        _, done = model.end()
        assert made == (result.prefilled_tokens, result.decoded_tokens)
        assert {one.number for one in done} == {out.key for out in result.outputs if out.finish_reason is not None}
        load, counts = timed.load(), model.counts()
        assert (load.prefill_tokens, load.decoding) == (counts.to_prefill, counts.decoding)
        assert load.waiting + load.running == counts.waiting + counts.running
    pytest.fail("the engines never had nothing to do")


def test_many_steady_steps_are_as_many_single_ones() -> None:
    many, single = (engine(*(sequence(n, 50 * n + 7, 5 * n + 3) for n in range(9)), slots=4) for _ in range(2))
    while many.has_work():
        steps = many.steady()
        if not steps:
            many.begin()
            many.end()
            steps = 1
        else:
            many.advance(steps)
        for _ in range(steps):
            single.begin()
            single.end()
        assert (many.counts(), many.finished) == (single.counts(), single.finished)
    assert not single.has_work()


def test_memory_is_never_overrun_and_all_end() -> None:
    made = engine(*(Sequence(n, one, 0) for n, one in enumerate(drawn(80, 1.0, 3))), kv_tokens=7000, slots=64)
    assert len(run_out(made)) == 80
    assert made.preempted > 0
    assert made.kv_peak <= 7000
    assert made.kv_used == made.to_prefill == made.decoding == 0


def test_who_began_last_is_pushed_out_and_computed_anew() -> None:
    first, last = sequence(0, 50, 40), sequence(1, 40, 40)
    made = engine(first, last, kv_tokens=100, slots=2)
    made.begin()
    assert (made.prefilled, made.decoded) == (90, 2)
    made.end()
    assert made.steady() == 4
    assert made.advance(4) == []
    made.begin()
    assert (made.preempted, list(made.running), list(made.waiting)) == (1, [first], [last])
    assert (made.decoded, last.made, last.to_prefill) == (1, 5, 45)
    made.end()
    assert run_out(made) == [first, last]
    assert made.finished == 2


def test_a_request_begins_when_its_prompt_fits() -> None:
    made = engine(sequence(0, 600, 9), sequence(1, 500, 9), kv_tokens=1000)
    made.begin()
    assert (len(made.running), len(made.waiting)) == (1, 1)
    assert not made.fits_ever(sequence(2, 992, 9))


def test_quota_bounds_prompt_tokens_of_a_step() -> None:
    made = engine(sequence(0, 600, 9))
    made.begin(quota=100)
    assert made.prefilled == 100
    made.end()
    made.begin(quota=0)
    assert (made.prefilled, made.decoded) == (0, 0)


def test_equal_beginnings_are_computed_and_kept_once() -> None:
    blocks = (7, 8, 9)
    prompt = 2 * BLOCK_TOKENS + 10
    made = engine(sequence(0, prompt, 100, blocks))
    made.begin()
    made.end()
    made.add(sequence(1, prompt, 100, (7, 8, 10)))
    made.begin()
    assert made.prefilled == 10
    made.end()
    assert made.hit_tokens == 2 * BLOCK_TOKENS
    assert made.kv_used == 2 * BLOCK_TOKENS + 2 * 10 + 3
    assert len(run_out(made)) == 2
    # Still there, but nobody's.
    made.add(sequence(2, prompt, 2, blocks))
    made.begin()
    assert made.prefilled == 10
    made.end()
    assert len(run_out(made)) == 1
    assert made.kv_used == 0


def test_a_prompt_that_is_all_there_still_computes_its_end() -> None:
    made = engine(sequence(0, BLOCK_TOKENS, 1, (7,)))
    run_out(made)
    made.add(sequence(1, BLOCK_TOKENS, 1, (7,)))
    made.begin()
    assert made.prefilled == BLOCK_TOKENS


def test_idle_blocks_make_room() -> None:
    made = engine(sequence(0, 2 * BLOCK_TOKENS, 2, (1, 2)), kv_tokens=4 * BLOCK_TOKENS)
    run_out(made)
    made.add(sequence(1, 2 * BLOCK_TOKENS, 2, (3, 4)))
    run_out(made)
    made.add(sequence(2, 2 * BLOCK_TOKENS + 1, 2, (1, 2, 5)))
    made.begin()
    # The end of the first prompt had to go, its beginning is still there.
    assert made.prefilled == BLOCK_TOKENS + 1


@pytest.mark.parametrize("seed", range(4))
def test_shared_memory_is_all_given_back(seed: int) -> None:
    made = engine(
        *(Sequence(n, one, 0) for n, one in enumerate(drawn(120, 1.0, seed, shared=True))), kv_tokens=12_000, slots=32
    )
    assert len(run_out(made)) == 120
    assert made.hit_tokens > 0
    assert made.kv_used == made.to_prefill == 0
    assert made.kv_peak <= 12_000


def test_load_tells_what_there_is() -> None:
    made = engine(sequence(0, 3000, 9), sequence(1, 10, 9), budget=1000, slots=8)
    made.begin()
    made.end()
    load = made.load(made.counts(), grown=5)
    assert (load.waiting, load.running, load.slots, load.prefill_tokens) == (1, 1, 8, 2010)
    assert (load.kv_used, load.kv_total, load.step_tokens) == (3005, 131_072, 1000)
    assert (load.step_s, load.prompt_token_s, load.answer_token_s) == pytest.approx((0.006, 0.00009, 0.00002))
