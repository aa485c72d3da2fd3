"""Predicted waits: by hand, and against a rank played step by step."""

from __future__ import annotations

import math
import random

import pytest
from msgspec.structs import replace

from paceline.engines.timed import CostModel
from paceline.protocol.cost import predicted_wait
from paceline.protocol.load import believed
from paceline.protocol.messages import AddRequest, Load
from paceline.protocol.sampling import SamplingParams
from paceline.simulate.engine import VirtualEngine

IDLE = Load(slots=4, step_s=0.01, prompt_token_s=0.001, answer_token_s=0.002, step_tokens=100, kv_total=1000)
"""A step of 100 tokens takes 0.11 s."""


def test_nothing_is_promised_of_a_rank_that_has_measured_nothing() -> None:
    assert predicted_wait(Load(), 10) == math.inf
    assert predicted_wait(Load(waiting=5, prefill_tokens=1000, step_tokens=8), 10, 1.0) == math.inf


def test_an_idle_rank_computes_the_prompt_in_steps() -> None:
    assert predicted_wait(IDLE, 50) == pytest.approx(0.01 + 0.05 + 0.002)
    assert predicted_wait(IDLE, 250) == pytest.approx(3 * 0.01 + 0.25 + 0.002)
    assert predicted_wait(IDLE, 250, age_s=9.0) == predicted_wait(IDLE, 250), "idle since long is idle"
    assert predicted_wait(replace(IDLE, step_tokens=0), 250) == pytest.approx(0.01 + 0.25 + 0.002)


def test_the_step_that_runs_is_waited_for_and_its_age_counts() -> None:
    busy = replace(IDLE, running=1, prefill_tokens=80)
    whole = (0.01 + 0.08) + (0.01 + 0.002 + 0.05) + 0.002
    assert predicted_wait(busy, 50, age_s=0.0) == pytest.approx(whole)
    assert predicted_wait(busy, 50, age_s=0.03) == pytest.approx(whole - 0.03)
    assert predicted_wait(busy, 50) == pytest.approx(whole - 0.045), "half of the step, where its age is not known"


def test_a_report_older_than_its_work_leaves_a_step_of_answers() -> None:
    busy = replace(IDLE, running=1, prefill_tokens=80)
    assert predicted_wait(busy, 50, age_s=5.0) == pytest.approx(0.006 + 0.062 + 0.002)


def test_a_wait_grows_with_what_is_ahead_and_with_what_is_on_the_wire() -> None:
    busy = replace(IDLE, running=1, decoding=1, answers_left=50, first_end=50, answer_tokens=50, kv_reserved=60)
    waits = [predicted_wait(believed(busy, count, 90 * count), 50) for count in range(4)]
    assert waits == sorted(set(waits))


def full(**changes: int) -> Load:
    """All four slots writing: the answers lack 10, 20, 30 and 40 tokens. A step takes 0.018 s."""
    return replace(
        IDLE, running=4, decoding=4, answers_left=100, first_end=10, answer_tokens=40, kv_reserved=200, **changes
    )


def test_without_a_slot_the_first_end_is_waited_for() -> None:
    own_s = 0.018 + 0.05 + 0.002
    assert predicted_wait(full(), 50, age_s=0.0) == pytest.approx(10 * 0.018 + own_s)
    # One waits already: the second end, and the prompt of the one that takes the first.
    assert predicted_wait(full(waiting=1, prefill_tokens=30), 50, age_s=0.0) == pytest.approx(20 * 0.018 + own_s + 0.03)
    # Four wait: the first of them must have ended too.
    assert predicted_wait(full(waiting=4), 50, age_s=0.0) > 50 * 0.018


def test_kv_room_is_a_barrier_like_a_slot() -> None:
    free = replace(full(), slots=8, kv_total=290)
    assert predicted_wait(free, 50, age_s=0.0) == pytest.approx(0.018 + 0.018 + 0.05 + 0.002), "it just fits"
    assert predicted_wait(replace(free, kv_total=289), 50, age_s=0.0) == pytest.approx(10 * 0.018 + 0.07), (
        "one must end"
    )
    assert predicted_wait(replace(free, kv_total=239), 50, age_s=0.0) == pytest.approx(20 * 0.018 + 0.07), (
        "two must end"
    )


def test_under_a_prefill_quota_a_prompt_takes_as_many_steps_as_that_allows() -> None:
    limited = replace(IDLE, prefill_quota=20)
    assert predicted_wait(limited, 50) == pytest.approx(3 * 0.01 + 0.05 + 0.002)
    assert predicted_wait(replace(IDLE, prefill_quota=200), 50) == predicted_wait(IDLE, 50), "no more than the budget"
    # The step that runs has 20 of the 80 tokens ahead; of the later ones each has 20.
    busy = replace(limited, running=1, prefill_tokens=80)
    ahead_s = 4 * 0.01 + 3 * 0.001 + 0.08
    assert predicted_wait(busy, 50, age_s=0.0) == pytest.approx(ahead_s + 3 * (0.01 + 0.001) + 0.05 + 0.002, rel=0.05)


def test_where_the_quota_is_zero_a_step_with_some_comes_after_patience() -> None:
    writing = replace(full(), slots=8, prefill_quota=0)
    # After the step that runs, an eighth of the budget of 100 in each ninth, of which the first may be any.
    assert predicted_wait(writing, 12, age_s=0.0) == pytest.approx((1 + 5) * 0.018 + 0.012 + 0.002)
    assert predicted_wait(writing, 24, age_s=0.0) == pytest.approx((1 + 14) * 0.018 + 0.024 + 0.002)
    waiting = replace(writing, waiting=1, prefill_tokens=12)
    assert predicted_wait(waiting, 12, age_s=0.0) > predicted_wait(writing, 24, age_s=0.0)


@pytest.mark.parametrize(("arrivals_s", "quota"), [(0.2, None), (0.06, None), (0.2, 64), (0.1, 64)])
def test_it_agrees_with_a_rank_played_step_by_step(arrivals_s: float, quota: int | None) -> None:
    """The engine of the simulator at a light and a heavy load: a median error of at most a tenth."""
    costs, budget, slots = CostModel(6.0, 0.09, 0.02), 256, 64
    engine, chance = VirtualEngine(costs, slots, budget), random.Random(3)
    now, due, begun, key = 0.0, 0.0, 0.0, 0
    promised: dict[int, tuple[float, float]] = {}
    errors: list[float] = []
    while key < 400 or engine.has_work():
        length = engine.plan(quota) if engine.has_work() else 0.0
        begun, planned = now, engine.load()
        arrived: list[tuple[int, int]] = []
        while key < 400 and (due <= now + length or not length):
            at = max(due, now)
            key += 1
            prompt = chance.randint(8, 600)
            load = believed(planned, len(arrived), sum(tokens for _, tokens in arrived))
            known = replace(
                load, step_s=0.006, prompt_token_s=0.00009, answer_token_s=0.00002, step_tokens=budget,
                decoding=load.running, answers_left=20 * load.running, answer_tokens=20,
                prefill_quota=quota,
            )  # fmt: skip
            promised[key] = (at, predicted_wait(known, prompt, at - begun))
            arrived.append((key, prompt))
            due += chance.expovariate(1 / arrivals_s)
            if not length:
                now = at
                break
        now += length
        for output in engine.step().outputs if length else ():
            if output.token_ids == [0]:
                sent, wait = promised[output.key]
                errors.append(abs(wait - (now - sent)) / (now - sent))
        for number, prompt in arrived:
            engine.add(number, AddRequest(number, number, 1, 0, [1] * prompt, SamplingParams(20)))
    assert len(errors) == 400
    assert sorted(errors)[200] <= 0.1
