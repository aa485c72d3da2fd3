"""What a rank reports: all that is new, nothing twice, and how fast it works."""

from __future__ import annotations

import pytest

from paceline.core.load import Load
from paceline.core.messages import RankReport
from paceline.core.rank.events import Stepped
from paceline.core.rank.reporting import LoadReporter
from paceline.core.rank.requests import RankRequests
from paceline.core.requests import AddRequest, SamplingParams

LIFE, FRONTEND = 33, 100


def request(number: int) -> AddRequest:
    return AddRequest(number, number, LIFE, 0, [1, 2], SamplingParams(4))


def fresh() -> tuple[RankRequests, LoadReporter]:
    requests = RankRequests(3, LIFE)
    return requests, LoadReporter(requests)


def test_the_first_report_says_all_and_the_same_is_not_said_twice() -> None:
    _, reporter = fresh()
    load = Load(1, 2, 8, 30, 40, 50)
    assert reporter.report(load, 7, 2, True) == RankReport(3, LIFE, 7, 2, True, load)
    assert reporter.report(load, 8, 2, True) is None, "a step alone is no news"


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


def test_who_asks_anew_is_told_all() -> None:
    _, reporter = fresh()
    first = reporter.report(Load(1), 1, 0, False)
    reporter.forget()
    assert reporter.report(Load(1), 1, 0, False) == first


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
