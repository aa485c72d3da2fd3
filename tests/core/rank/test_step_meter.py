"""What a rank learns of its steps: the costs of each kind of token, the pace of the machine, nothing from nothing."""

from __future__ import annotations

import random

import pytest

from paceline.core.rank.reporting import StepCost, StepMeter


def seconds(prefilled: int, decoded: int) -> float:
    return 0.006 + 0.0004 * prefilled + 0.002 * decoded


def learned(steps: int, *, pace: float = 1.0, noise: float = 0.0) -> StepMeter:
    meter, chance = StepMeter(), random.Random(1)
    for _ in range(steps):
        prefilled, decoded = chance.choice([0, 0, chance.randint(8, 500)]), chance.randint(1, 16)
        meter.add(prefilled, decoded, seconds(prefilled, decoded) * pace * (1 + noise * chance.uniform(-1, 1)), 0.0)
    return meter


def test_nothing_is_known_at_first_and_nothing_is_learned_from_nothing() -> None:
    meter = StepMeter()
    meter.add(0, 0, 1.0, 0.0)
    meter.add(10, 0, 0.0, 0.0)
    assert meter.cost == StepCost(0.0, 0.0, 0.0)


def test_one_step_tells_its_own_length() -> None:
    meter = StepMeter()
    meter.add(300, 1, 0.6, 0.0)
    cost = meter.cost
    assert cost.step_s + 300 * cost.prompt_token_s + cost.answer_token_s == pytest.approx(0.6, rel=0.02)
    assert cost.prompt_token_s == pytest.approx(0.002, rel=0.1), "a long prompt's time is its tokens'"


def test_the_costs_are_found() -> None:
    assert learned(300).cost == pytest.approx((0.006, 0.0004, 0.002), rel=0.02)


def test_noise_is_evened_out() -> None:
    cost = learned(1000, noise=0.5).cost
    for prefilled, decoded in ((0, 1), (0, 16), (200, 4), (500, 16)):
        expected = cost.step_s + prefilled * cost.prompt_token_s + decoded * cost.answer_token_s
        assert expected == pytest.approx(seconds(prefilled, decoded), rel=0.15)


def test_a_change_of_pace_is_followed_within_seconds_also_for_what_does_not_occur() -> None:
    meter = learned(300)
    for _ in range(1000):
        meter.add(0, 4, 2 * seconds(0, 4), 0.0)
    cost = meter.cost
    assert cost.step_s + 4 * cost.answer_token_s == pytest.approx(2 * seconds(0, 4), rel=0.1)
    assert cost.prompt_token_s == pytest.approx(0.0008, rel=0.5), "prompts are taken to have become slower as well"


def test_no_cost_is_negative_and_all_are_finite() -> None:
    meter = StepMeter()
    for _ in range(50):
        meter.add(100, 1, 0.1, 0.0)
        meter.add(200, 2, 0.1, 0.0)
        meter.add(0, 1, 0.5, 0.0)
    assert min(meter.cost) >= 0.0
    assert max(meter.cost) < 10.0


def test_a_cost_has_three_digits_so_that_noise_is_no_change() -> None:
    meter = StepMeter()
    meter.add(1000, 0, 1.23456, 0.0)
    assert all(float(f"{cost:.3g}") == cost for cost in meter.cost)


def test_after_a_rest_the_pace_is_learned_anew() -> None:
    fresh, rested = learned(300), learned(300)
    fresh.add(100, 0, 3 * seconds(100, 0), 0.0)
    rested.add(100, 0, 3 * seconds(100, 0), 60.0)
    assert fresh.cost.prompt_token_s < 0.0006
    assert rested.cost.prompt_token_s > 0.0010
