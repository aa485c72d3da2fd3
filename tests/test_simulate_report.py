"""`paceline simulate --trace … --report`: one file with the lanes, histograms and figures of several rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from paceline.sim.replay import Replay, Setup
from paceline.simulate_cli import simulate_app as app
from paceline.simulate_report import MOST, Lanes
from tests.sim.traces import drawn

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{100 + 40 * second},{1 + 3 * second}\n" for second in range(60)
)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_a_page_compares_several_rules(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    flags = (
        "--trace",
        trace,
        "--ranks",
        "3",
        "--lockstep",
        "--rate-scale",
        "60",
        "--slots",
        "4",
        "--report",
        str(path),
    )
    done = run(*flags, "--routing", "sticky,round-robin")
    assert done.exit_code == 0, done.output
    assert "sticky: 3 lockstep ranks" in done.output
    assert "round-robin: 3 lockstep ranks" in done.output
    page = path.read_text()
    assert not re.findall(r"https?:|src=|@import|url\(", page), "nothing from outside"
    found = re.search(r"const RUNS = (\[.*?\]);\n", page)
    assert found is not None
    runs = json.loads(found[1])
    assert len(runs) == 2
    for one in runs:
        assert {len(did) for did in one["did"]} == {len(full) for full in one["full"]} == {3}
        assert len(one["queued"]) == len(one["wave"]) == len(one["running"]) == len(one["did"])
        assert set("".join(one["did"])) >= {"p", "d"}
        assert any(one["running"])
    assert page.count("<svg") == 3, "a histogram of each time"
    assert page.count('stroke-width="1.5"') == 6, "a line each rule"
    assert len(re.findall("<canvas", page)) == 2 * (3 + 2), "a lane a rank, the queue and the waves"
    assert '<td class="best">' in page


def test_several_rules_are_a_line_each_for_a_program(trace: str) -> None:
    done = run("--trace", trace, "--json", "--requests", "20", "--routing", "least-load, round-robin")
    assert [json.loads(line)["routing"] for line in done.stdout.splitlines()] == ["least-load", "round-robin"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--routing", "sticky,sticky"), "--routing: 'sticky,sticky' names nothing, or something twice"),
        (("--routing", "sticky,"), "--routing: 'sticky,' names nothing"),
        (("--report", "/nowhere/run.html"), "--report: /nowhere/run.html: No such file or directory"),
    ],
)
def test_a_mistake_is_told_in_a_line(trace: str, flags: tuple[str, ...], told: str) -> None:
    done = run("--trace", trace, *flags)
    assert done.exit_code == 2
    assert told in done.output
    assert "Traceback" not in done.output


def test_a_report_is_of_a_trace() -> None:
    done = run("--report", "x.html")
    assert done.exit_code == 2
    assert "--report: only with --trace" in done.output


def test_a_long_run_keeps_so_many_samples_of_all_of_its_time() -> None:
    played = Replay(Setup(ranks=2), drawn(20, 10.0))
    lanes = Lanes()
    played.start().ready()
    for _ in range(5 * MOST):
        lanes.look(played)
    assert MOST <= len(lanes.queued) < 2 * MOST
    assert len(lanes.did) == len(lanes.full) == len(lanes.wave) == len(lanes.running) == len(lanes.queued)
