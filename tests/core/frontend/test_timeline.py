"""Timelines of requests: what is told of one, what is kept of many, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core.frontend.events import Moved, Placed, Refuse
from paceline.core.frontend.timeline import STAMPS, Timeline, Timelines, in_words, shown
from paceline.core.requests import Output, Timing
from paceline.explain import remarks
from tests.core.harness import one


def begun(timelines: Timelines, name: str = "abc", request: int = 1, at: float = 100.0) -> Timeline:
    timeline = Timeline(name, "/v1/completions", "10.0.0.1:5", at, at + 0.01, at + 0.03, "cmpl-9")
    timelines.began(timeline)
    timelines.submitted(request, 12, timeline, at + 0.03)
    return timeline


def token(request: int = 1, tokens: int = 1, **fields: Any) -> Output:
    return Output(request, [7] * tokens, "a", **fields)


def answered(timelines: Timelines, name: str, at: float, seconds: float, request: int = 1) -> None:
    """A whole request of so many seconds."""
    timeline = begun(timelines, name, request, at)
    timelines.placed(Placed(request, 0), at + 0.04)
    timelines.outputs([token(request, finish_reason="stop")], at + seconds)
    timelines.ended(timeline, 200, at + seconds)


def told(timelines: Timelines, name: str = "abc", now: float = 200.0) -> dict[str, Any]:
    return shown(one(timelines.find(name)), now, 1_000_000.0)


def test_each_part_of_a_request_is_told_in_seconds_since_it_was_received() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    assert timelines.placed(Placed(1, 3, queued=True, waited_ms=400), 100.53) == pytest.approx(0.5)
    timelines.outputs([token(timing=Timing(20_000, 80_000), cached_tokens=8)], 100.7)
    timelines.outputs([token()], 100.8)
    timelines.outputs([token(finish_reason="stop")], 101.5)
    timelines.ended(timeline, 200, 101.51)
    found = told(timelines)
    assert (found["id"], found["response_id"], found["status"], found["under_way"]) == ("abc", "cmpl-9", 200, False)
    assert (found["read_s"], found["tokenized_s"], found["seconds"]) == (0.01, 0.03, 1.51)
    assert found["received_at"] == 1_000_000.0 - 100
    choice = one(found["choices"])
    assert (choice["queued"], choice["queued_at_coordinator_s"], choice["placed_s"]) == (True, 0.4, 0.53)
    assert (choice["first_token_s"], choice["ended_s"], choice["finish_reason"]) == (0.7, 1.5, "stop")
    assert (choice["prompt_tokens"], choice["cached_tokens"], choice["tokens"]) == (12, 8, 3)
    rank = one(choice["ranks"])
    assert (rank["rank"], rank["until_engine_s"], rank["until_token_s"]) == (3, 0.02, 0.08)
    assert choice["gaps"] == {
        "tokens_each": 1, "seconds": [0.1, 0.7], "longest_s": 0.7, "longest_after_token": 2
    }  # fmt: skip


def test_a_choice_that_no_rank_was_given_to_has_waited_for_no_time_that_the_coordinator_knows() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    choice = one(told(timelines)["choices"])
    assert (choice["queued_at_coordinator_s"], choice["placed_s"]) == (None, None)
    assert remarks(choice)[1] == "  waits for a rank"
    timelines.outputs([token(finish_reason="abort")], 101.5)
    timelines.ended(timeline, 503, 101.51)
    assert remarks(one(told(timelines)["choices"]))[1] == "  was given no rank"


def test_a_move_is_told_with_its_reason_and_what_the_new_rank_measured() -> None:
    timelines = Timelines()
    begun(timelines)
    timelines.placed(Placed(1, 3), 100.04)
    timelines.outputs([token(timing=Timing(0, 1000))], 100.1)
    timelines.moved(Moved(1, 3, 5, 1, "its connection ended"), 100.2)
    step = timelines.outputs([token(timing=Timing(3000, 9000))], 100.4)
    assert (step.rank, step.tokens, step.going_on, list(step.began)) == (5, 1, 1, [])
    found = told(timelines)
    assert found["under_way"]
    first, second = found["choices"][0]["ranks"]
    assert (first["rank"], second["rank"], second["behind_tokens"]) == (3, 5, 1)
    assert (second["why"], second["until_engine_s"]) == ("rank 3: its connection ended", 0.003)
    assert "moved to rank 5 behind 1 tokens (rank 3: its connection ended)" in in_words(timelines.find("abc")[0])


def test_a_step_counts_what_metrics_are_made_of() -> None:
    timelines = Timelines()
    for request in (1, 2):
        begun(timelines, str(request), request)
        timelines.placed(Placed(request, 4), 100.1)
    first = timelines.outputs([token(1), token(2, 3), token(99)], 100.2)
    assert (first.rank, first.tokens, first.going_on) == (4, 5, 0)
    assert [choice.request for choice in first.began] == [1, 2]
    assert timelines.outputs([token(1), token(2)], 100.3).going_on == 2
    last = timelines.outputs([token(2, finish_reason="length")], 100.4)
    assert [choice.reason for choice in last.ended] == ["length"]
    assert told(timelines, "2")["choices"][0]["tokens"] == 5


def test_what_is_refused_and_whose_client_has_gone_is_told() -> None:
    timelines = Timelines()
    begun(timelines, "refused", 1)
    timelines.refused(Refuse(1, "overloaded", "full"), 100.2)
    begun(timelines, "gone", 2)
    assert [choice.request for choice in timelines.gone([2, 7], 100.3)] == [2]
    assert told(timelines, "refused")["choices"][0]["finish_reason"] == "overloaded"
    assert told(timelines, "gone")["choices"][0]["finish_reason"] == "abort"


def test_a_request_is_found_by_its_answers_id_and_a_name_that_was_used_again_newest_first() -> None:
    timelines = Timelines()
    answered(timelines, "abc", 100.0, 1.0)
    answered(timelines, "abc", 200.0, 2.0)
    assert [kept.received for kept in timelines.find("abc")] == [200.0, 100.0]
    assert len(timelines.find("cmpl-9")) == 2
    assert timelines.find("other") == []
    assert [kept.received for kept in timelines.newest(1)] == [200.0]


def test_the_last_are_kept_and_beside_them_the_slowest_of_an_hour() -> None:
    timelines = Timelines(last=3, slowest=2, slow_for_s=3600.0)
    for number, seconds in enumerate((9.0, 1.0, 7.0, 1.0, 2.0, 1.5)):
        answered(timelines, f"r{number}", 100.0 + number, seconds, number)
    assert [kept.name for kept in timelines.slowest(10)] == ["r0", "r2"]
    assert [len(timelines.find(f"r{number}")) for number in range(6)] == [1, 0, 1, 1, 1, 1]
    answered(timelines, "late", 100.0 + 3700, 0.5, 9)
    assert [kept.name for kept in timelines.slowest(10)] == ["late"], "an hour later the slow ones are forgotten"


def test_of_a_long_answer_few_times_are_kept_and_the_longest_gap() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    timelines.placed(Placed(1, 0), 100.1)
    now = 101.0
    for number in range(10 * STAMPS):
        now += 5.0 if number == 1000 else 0.01
        timelines.outputs([token()], now)
    timelines.outputs([token(finish_reason="length")], now)
    timelines.ended(timeline, 200, now)
    choice = told(timelines)["choices"][0]
    gaps = choice["gaps"]
    assert choice["tokens"] == 10 * STAMPS + 1
    assert len(gaps["seconds"]) <= STAMPS
    assert gaps["tokens_each"] * len(gaps["seconds"]) == pytest.approx(10 * STAMPS, abs=gaps["tokens_each"])
    assert (gaps["longest_s"], gaps["longest_after_token"]) == (5.0, 1000)


def test_a_slow_request_is_one_line_with_its_parts() -> None:
    timelines = Timelines(slow_s=2.0)
    timeline = begun(timelines)
    timelines.placed(Placed(1, 3, queued=True), 101.53)
    timelines.outputs([token(timing=Timing(100_000, 400_000))], 102.03)
    timelines.outputs([token(finish_reason="stop")], 103.03)
    _, notes = timelines.ended(timeline, 200, 103.03)
    assert one(notes).request == "abc"
    assert one(notes).text == (
        "slow: request abc: 3.030 s: read 0.010, tokenized 0.020, queued 1.500, at rank 3's door 0.100, to the first "
        "token 0.400, 2 tokens 1.000 (longest gap 1.000 after token 1), 12 prompt tokens, 0 of them cached"
    )
    quick = begun(timelines, "quick", 2)
    assert timelines.ended(quick, 503, 100.5)[1] == []
