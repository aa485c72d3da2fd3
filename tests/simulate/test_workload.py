"""Arrivals: from a seed, and from both shapes of trace."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.simulate.run import Options, simulate
from paceline.simulate.workload import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS, Arrival, drawn, from_trace

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9151690,396,109
2023-11-16 18:16:00,12,3
"""
JSON_LINES = """{"timestamp": 3000, "input_length": 20, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 1000, "input_length": 10, "output_length": 4, "hash_ids": [0]}
"""


def test_drawn_arrivals_are_in_order_within_bounds_and_come_in_bursts() -> None:
    arrivals = drawn(random.Random(1), 500, 10.0, 4, 3)
    assert len(arrivals) == 500
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert all(
        1 <= a.prompt_tokens <= MAX_PROMPT_TOKENS and 1 <= a.answer_tokens <= MAX_ANSWER_TOKENS for a in arrivals
    )
    assert {a.front_end for a in arrivals} == {0, 1, 2}
    assert {a.rank for a in arrivals} == {None, 0, 1, 2, 3}
    assert any(a.patience_s is not None for a in arrivals)
    gaps = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    assert sum(gap < 0.003 for gap in gaps) > 100
    assert max(gaps) > 0.1


def test_a_csv_trace_is_read_to_the_tenth_of_a_microsecond(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    first, second, third = from_trace(path, 10, 2)
    assert first == Arrival(0.0, 0, 374, 44)
    assert second.at == pytest.approx(4.234579, abs=1e-6)
    assert (second.front_end, second.prompt_tokens, second.answer_tokens) == (1, 396, 109)
    assert third.at == pytest.approx(13.31941, abs=1e-6)


def test_a_json_trace_is_put_in_order_and_can_run_faster(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(JSON_LINES)
    assert from_trace(path, 10, 2, speed=2.0) == [Arrival(0.0, 1, 10, 4), Arrival(1.0, 0, 20, 5)]
    assert len(from_trace(path, 1, 2)) == 1


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "TIME,ContextTokens\n1,2\n", "request 1 is of neither shape"),
        ("a.csv", CSV + "yesterday,1,2\n", "request 4 is of neither shape"),
        ("a.jsonl", JSON_LINES + "[1, 2]\n", "request 3 is of neither shape"),
        ("a.jsonl", "{", "request 1 is of neither shape"),
        ("a.csv", "", "holds no request"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, name: str, text: str, why: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        from_trace(path, 10, 1)
    assert str(caught.value).startswith(f"--trace: {path}")


def test_a_run_serves_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    outcome = simulate(Options(1, ranks=2, requests=3, crashes=0, suspensions=0, trace=str(path)))
    assert outcome.ok, outcome.verdict
    assert (outcome.requests, outcome.finished) == (3, 3)
    assert outcome.virtual_s > 13
