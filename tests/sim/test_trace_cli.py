"""`paceline simulate --trace`: figures, JSON, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from paceline.simulate_cli import simulate_app as app

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 + second},{1 + second}\n" for second in range(60)
)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_figures_for_a_person(trace: str) -> None:
    done = run("--trace", trace, "--ranks", "2", "--lockstep", "--rate-scale", "10")
    assert done.exit_code == 0, done.output
    assert "sticky: 2 lockstep ranks, 1 front-ends" in done.output
    for figure in (
        "throughput",
        "first token",
        "each token after",
        "imbalance",
        "KV memory",
        "prefix cache",
        "barrier",
    ):
        assert f"  {figure}" in done.output


def test_figures_for_a_program(trace: str) -> None:
    done = run("--trace", trace, "--json", "--routing", "least-requests", "--requests", "30", "--front-ends", "2")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert {
        "requests", "throughput_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p99_ms", "imbalance_mean",
        "barrier_share",
    } <= figures.keys()  # fmt: skip
    assert (figures["requests"], figures["ranks"], figures["front_ends"]) == (30, 8, 2)


def test_costs_are_what_was_asked_for(trace: str) -> None:
    flags = ("--trace", trace, "--json", "--requests", "1", "--step-ms", "5", "--prefill-ms", "1", "--decode-ms", "2")
    figures = json.loads(run(*flags, "--delay-ms", "10").stdout)
    assert figures["ttft_p50_ms"] == pytest.approx(10 + 5 + 100 * 1 + 2 + 10, abs=0.1)


def test_a_policy_of_somebody_elses(trace: str) -> None:
    done = run("--trace", trace, "--routing", "examples.split_policy:SplitByLength", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["routing"] == "examples.split_policy:SplitByLength"


@pytest.mark.parametrize(
    "flags",
    [
        ("--routing", "best"), ("--rate-scale", "0"), ("--ranks", "0"), ("--kv-tokens", "1"), ("--losses", "0.1"),
        ("--crashes", "1"), ("--seeds", "0..3"), ("--slots", "0"), ("--bind", "early"), ("--warm-up", "1"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_be_is_named(trace: str, flags: tuple[str, str]) -> None:
    done = run("--trace", trace, *flags)
    assert done.exit_code == 2
    assert done.output.startswith(f"paceline: {flags[0]}: ")
    assert done.output.count("\n") == 1


def test_binding_is_late_for_sticky_and_least_load_alone(trace: str) -> None:
    for bind in ("broker", "late", "arrival"):
        assert run("--trace", trace, "--bind", bind, "--front-ends", "2").exit_code == 0
    done = run("--trace", trace, "--bind", "broker", "--routing", "session")
    assert done.exit_code == 2
    assert done.output == "paceline: --bind: session chooses the rank itself, when a request arrives\n"


def test_what_needs_a_trace_says_so() -> None:
    done = run("--routing", "prefix")
    assert (done.exit_code, done.output) == (2, "paceline: --routing: only with --trace\n")


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(TRACE + "soon,1,2\n")
    done = run("--trace", str(path))
    assert (done.exit_code, done.output) == (
        2,
        f"paceline: --trace: {path}, line 62: Invalid isoformat string: 'soon'\n",
    )


SESSIONS = """{"session":"a","shared_tokens":300,"turns":[[0,1000,5,0],[0.5,1300,3,1000],[1,200000,3,1280]]}
{"session":"b","shared_tokens":300,"turns":[[0,700,4,0],[0.5,900,4,640]]}
"""


@pytest.fixture
def sessions(tmp_path: Path) -> str:
    path = tmp_path / "sessions.jsonl"
    path.write_text(SESSIONS)
    return str(path)


def test_sessions_are_a_closed_loop_whose_turns_find_what_was_computed(sessions: str) -> None:
    done = run(
        "--trace", sessions, "--sessions", "2", "--ranks", "2", "--independent", "--kv-tokens", "10000", "--json"
    )
    found = json.loads(done.output)
    assert found["requests"] == 4, "the third turn does not fit"
    assert {name: turns["count"] for name, turns in found["turns"].items()} == {"first": 2, "2 to 9": 2, "10 on": 0}
    # Each second turn at the rank of its first: 1,000 and 640 tokens, in blocks of 128.
    assert found["prefix_hit_rate"] * 3900 == pytest.approx(896 + 640)
    assert found["recomputed_tokens"] == 3900 - 896 - 640
    assert found["duration_s"] > 0.5
    blind = run("--trace", sessions, "--sessions", "2", "--ranks", "2", "--independent", "--routing", "round-robin")
    assert "turns first" in blind.output
    again = run("--trace", sessions, "--session-rate", "5", "--requests", "9", "--ranks", "2", "--json")
    assert json.loads(again.output)["requests"] == 9, "the file's sessions come again"
    short = run("--trace", sessions, "--sessions", "1", "--max-think", "0.1", "--kv-tokens", "9000", "--json")
    assert json.loads(short.output)["duration_s"] < 1.5


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "--trace: {path}: holds sessions: say how many at once (--sessions) or a second"),
        (("--sessions", "2", "--session-rate", "1"), "--session-rate: not with --sessions"),
        (("--sessions", "2", "--rate-scale", "2"), "--rate-scale: not with sessions, whose turns wait for answers"),
        (("--sessions", "0"), "--sessions: must be between 1 and 100000, not 0"),
        (("--sessions", "1", "--kv-tokens", "100"), "--kv-tokens: the first session does not fit into 100"),
    ],
)
def test_what_sessions_cannot_be_is_named(sessions: str, arguments: tuple[str, ...], error: str) -> None:
    done = run("--trace", sessions, *arguments)
    assert done.exit_code == 2
    assert error.format(path=sessions) in done.output.replace("\n", " ")


def test_a_trace_without_sessions_has_none(trace: str) -> None:
    done = run("--trace", trace, "--sessions", "2")
    assert (done.exit_code, "are for traces of sessions" in done.output) == (2, True)
