"""A finished timeline as spans: parts that leave no time out, fail-overs, and what is said of a request."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from paceline.core.frontend.events import Moved, Placed, Refuse
from paceline.core.frontend.timeline import Timeline, Timelines
from paceline.core.requests import Output, Timing
from paceline.errors import ConfigError
from paceline.server.spans import Asked, Span, spans_of
from paceline.settings import ServerConfig

ASKED = Asked("a-model", 12, 1, 64, 0.5, 0.9, True)


def begun(timelines: Timelines, choices: int = 1) -> Timeline:
    timeline = Timeline("abc", "/v1/completions", "10.0.0.1:5", 100.0, 100.25, 100.5, "cmpl-9")
    timelines.began(timeline)
    for request in range(1, choices + 1):
        timelines.submitted(request, 12, timeline, 100.5)
    return timeline


def token(request: int = 1, **fields: Any) -> Output:
    return Output(request, [7], "a", **fields)


def parts(spans: list[Span]) -> list[tuple[str, float, float]]:
    return [(span.name, span.begin, span.end) for span in spans[1:]]


def test_the_parts_follow_each_other_from_the_first_byte_to_the_last() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    timelines.placed(Placed(1, 3, queued=True, waited_ms=400), 101.0)
    timelines.outputs([token(timing=Timing(250_000, 700_000), cached_tokens=8)], 102.0)
    timelines.outputs([token(finish_reason="stop")], 104.0)
    kept, _ = timelines.ended(timeline, 200, 104.5)
    whole, *rest = spans = spans_of(kept, ASKED)
    assert parts(spans) == [
        ("read", 100.0, 100.25), ("tokenize", 100.25, 100.5), ("queue", 100.5, 101.0), ("send", 101.0, 101.25),
        ("prefill", 101.25, 102.0), ("decode", 102.0, 104.0), ("respond", 104.0, 104.5),
    ]  # fmt: skip
    assert (whole.name, whole.begin, whole.end) == ("POST /v1/completions", 100.0, 104.5)
    assert rest[2].attributes == {"paceline.rank": 3, "paceline.queue.coordinator": 0.4}
    assert whole.attributes == {
        "http.request.method": "POST", "http.route": "/v1/completions", "url.path": "/v1/completions",
        "http.response.status_code": 200, "client.address": "10.0.0.1", "client.port": 5,
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "paceline",
        "gen_ai.request.id": "abc", "gen_ai.response.id": "cmpl-9", "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.request.model": "a-model", "gen_ai.response.model": "a-model", "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9, "gen_ai.request.n": 1,
        "gen_ai.request.choice.count": 1, "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 12, "gen_ai.usage.prompt_tokens": 12, "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.completion_tokens": 2, "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.cache_read.input_tokens": 8, "gen_ai.latency.e2e": 4.5,
        "gen_ai.latency.time_to_first_token": 2.0, "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_in_model_prefill": 0.75, "gen_ai.latency.time_in_model_decode": 2.0,
        "paceline.cached_tokens": 8, "paceline.ranks": [3], "paceline.moves": 0, "paceline.longest_gap": 2.0,
    }  # fmt: skip


def test_a_move_is_an_event_and_the_parts_at_the_next_rank_are_spans() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    timelines.placed(Placed(1, 0), 101.0)
    timelines.outputs([token(timing=Timing(0, 1_000_000))], 102.0)
    timelines.moved(Moved(1, 0, 1, 1, "its connection ended"), 103.0)
    timelines.outputs([token(timing=Timing(250_000, 500_000))], 104.0)
    timelines.outputs([token(finish_reason="length")], 105.0)
    kept, _ = timelines.ended(timeline, 200, 105.0)
    whole, *rest = spans = spans_of(kept, ASKED)
    (move,) = whole.events
    assert (move.name, move.when) == ("paceline.moved", 103.0)
    assert move.attributes == {
        "paceline.rank.before": 0, "paceline.rank": 1, "paceline.tokens.before": 1,
        "paceline.why": "rank 0: its connection ended",
    }  # fmt: skip
    assert parts(spans)[2:] == [
        ("place", 100.5, 101.0), ("send", 101.0, 101.0), ("prefill", 101.0, 102.0), ("decode", 102.0, 103.0),
        ("send", 103.0, 103.25), ("prefill", 103.25, 103.75), ("decode", 103.75, 105.0), ("respond", 105.0, 105.0),
    ]  # fmt: skip
    assert [one.attributes["paceline.tokens"] for one in rest if one.name == "decode"] == [1, 2]
    assert whole.attributes["paceline.moves"] == 1
    assert whole.attributes["paceline.ranks"] == [0, 1]
    assert not whole.failed


@pytest.mark.parametrize(
    ("door_us", "computed_us", "first"), [(9_000_000, 9_000_000, 101.5), (0, 0, 101.5), (400_000, 9_000_000, 101.2)]
)
def test_a_ranks_clock_that_disagrees_with_ours_leaves_no_gap_and_no_time_twice(
    door_us: int, computed_us: int, first: float
) -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    timelines.placed(Placed(1, 0), 101.0)
    timelines.outputs([token(timing=Timing(door_us, computed_us))], first)
    timelines.outputs([token(finish_reason="stop")], 102.0)
    kept, _ = timelines.ended(timeline, 200, 103.0)
    whole, *rest = spans_of(kept, ASKED)
    assert all(before.end == after.begin for before, after in pairwise(rest))
    assert all(span.begin <= span.end for span in rest)
    assert (rest[0].begin, rest[-1].end) == (whole.begin, whole.end)


def test_choices_have_their_own_parts_and_share_the_prompt() -> None:
    timelines = Timelines()
    timeline = begun(timelines, 2)
    for request in (1, 2):
        timelines.placed(Placed(request, request), 101.0)
        timelines.outputs([token(request, timing=Timing(0, 500_000), finish_reason="stop")], 100.5 + request)
    kept, _ = timelines.ended(timeline, 200, 103.0)
    whole, *rest = spans_of(kept, Asked("a-model", 12, 2, 64, 1.0, 1.0, False))
    numbers = [span.attributes["paceline.choice"] for span in rest if span.name == "prefill"]
    assert numbers == [0, 1]
    assert whole.attributes["gen_ai.usage.input_tokens"] == 12
    assert whole.attributes["gen_ai.usage.output_tokens"] == 2
    assert whole.attributes["gen_ai.latency.time_to_first_token"] == 1.5


def test_what_was_never_reached_is_no_part() -> None:
    early = Timeline("abc", "/v1/completions", "10.0.0.1:5", 100.0, 100.25)
    whole, *rest = spans_of(early.kept(100.5, 400), None)
    assert [span.name for span in rest] == ["read", "tokenize"]
    assert rest[-1].end == whole.end == 100.5
    assert whole.attributes["error.type"] == "400"
    assert "gen_ai.request.model" not in whole.attributes
    assert not whole.failed, "the client's mistake is no failure of the server"


def test_a_refusal_and_a_client_that_has_gone() -> None:
    timelines = Timelines()
    timeline = begun(timelines)
    timelines.refused(Refuse(1, "rank_lost", "its rank was lost"), 101.0)
    kept, _ = timelines.ended(timeline, 503, 101.0)
    whole, *rest = spans = spans_of(kept, ASKED)
    assert parts(spans)[2:] == [("queue", 100.5, 101.0), ("respond", 101.0, 101.0)]
    assert (whole.failed, rest[2].failed) == ("HTTP 503", "rank_lost")
    gone = begun(timelines)
    timelines.gone([1], 101.0)
    kept, _ = timelines.ended(gone, 0, 101.0)
    whole = spans_of(kept, ASKED)[0]
    assert whole.attributes["paceline.client_gone"]
    assert "http.response.status_code" not in whole.attributes
    assert not whole.failed


@pytest.mark.parametrize("url", ["collector:4318", "grpc://a:1", "http://", "", "http://a:b/", "http://a b/"])
def test_an_endpoint_that_is_no_url_is_refused_naming_the_flag(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--otlp-traces-endpoint: must be a URL"):
        ServerConfig(otlp_traces_endpoint=url)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("paceline.settings.find_spec", none)
    with pytest.raises(ConfigError, match=r"^--otlp-traces-endpoint: .*pip install 'paceline\[otel\]'"):
        ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318")
