"""What a rank reports: all that is new, nothing twice; what it learns of its steps, and how fast it works."""

from __future__ import annotations

import random

import pytest

from paceline.core.load import Load
from paceline.core.rank.events import Stepped
from paceline.core.rank.reporting import LoadReporter, StepCost, StepMeter
from paceline.core.rank.requests import RankRequests
from paceline.core.requests import AddRequest, SamplingParams

LIFE, FRONTEND = 33, 100


def request(number: int) -> AddRequest:
    return AddRequest(number, number, LIFE, 0, [1, 2], SamplingParams(4))


def fresh() -> tuple[RankRequests, LoadReporter]:
    requests = RankRequests(3, LIFE)
    return requests, LoadReporter(requests)


@pytest.mark.parametrize(
    "changed", [(Load(2), 0, False), (Load(1), 1, False), (Load(1), 0, True)], ids=["load", "wave", "running"]
)
def test_each_change_is_reported(changed: tuple[Load, int, bool]) -> None:
    _, reporter = fresh()
    reporter.report(Load(1), 1, 0, False)
    load, wave, running = changed
    report = reporter.report(load, 2, wave, running)
    assert report is not None
    assert (report.load, report.step, report.wave, report.running) == (load, 2, wave, running)


def test_a_quota_that_has_changed_goes_with_the_next_report_and_is_no_reason_for_one() -> None:
    _, reporter = fresh()
    reporter.report(Load(1), 1, 0, True, 64)
    assert reporter.report(Load(1), 2, 0, True, 0) is None
    report = reporter.report(Load(2), 3, 0, True, 0)
    assert report is not None
    assert report.load.prefill_quota == 0


def test_a_request_that_was_taken_in_is_reported_also_where_the_load_is_the_same() -> None:
    requests, reporter = fresh()
    first = reporter.report(Load(1), 1, 0, False)
    requests.arrive(FRONTEND, request(1))
    second = reporter.report(Load(1), 1, 0, False)
    assert first is not None
    assert second is not None
    assert (first.taken, second.taken) == ({}, {FRONTEND: 1})
    requests.arrive(FRONTEND, request(2))
    assert second.taken == {FRONTEND: 1}, "a report is of its moment"


def test_what_is_held_and_what_is_finished_are_reported() -> None:
    requests, reporter = fresh()
    reporter.report(Load(), 1, 0, False)
    requests.hold(FRONTEND, request(1))
    held = reporter.report(Load(), 1, 0, False)
    assert held is not None
    assert (held.load.waiting, held.load.prefill_tokens, held.load.finished) == (1, 2, 0)
    requests.drop(FRONTEND, [1])
    dropped = reporter.report(Load(), 1, 0, False)
    assert dropped is not None
    assert (dropped.load.waiting, dropped.load.finished) == (0, 1)


def test_speed_is_measured_by_kind_and_a_mixed_step_is_split_by_tokens() -> None:
    _, reporter = fresh()
    reporter.measure(Stepped((), Load(), False, prefilled_tokens=100, seconds=0.5), 0.0)
    report = reporter.report(Load(), 1, 0, False)
    assert report is not None
    assert (report.load.prefill_rate, report.load.decode_rate) == (pytest.approx(200), 0.0)
    _, reporter = fresh()
    reporter.measure(Stepped((), Load(), True, prefilled_tokens=75, decoded_tokens=25, seconds=1.0), 0.0)
    report = reporter.report(Load(), 1, 0, False)
    assert report is not None
    assert (report.load.prefill_rate, report.load.decode_rate) == (pytest.approx(100), pytest.approx(100))


def test_a_dummy_step_is_no_measure() -> None:
    _, reporter = fresh()
    reporter.report(Load(), 0, 0, False)
    reporter.measure(Stepped((), Load(), False, seconds=3.0), 0.0)
    assert reporter.report(Load(), 1, 0, False) is None


def test_what_a_step_costs_is_reported() -> None:
    _, reporter = fresh()
    for prefilled in (100, 400, 200, 300):
        reporter.measure(Stepped((), Load(), False, prefilled, 1, 0.01 + prefilled / 1000), 0.0)
    report = reporter.report(Load(), 1, 0, False)
    assert report is not None
    load = report.load
    assert load.step_s + 250 * load.prompt_token_s + load.answer_token_s == pytest.approx(0.26, rel=0.01)


# What a rank learns of its steps: the costs of each kind of token, the pace of the machine ----------
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
