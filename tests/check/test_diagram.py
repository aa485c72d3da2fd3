"""A counterexample as a sequence diagram: who sends what to whom, by the story's own words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.check.cli import app, without_rule
from paceline.check.diagram import Arrow, Mark, diagram, drawn_of

C, F = "coordinator", "front-end"


@pytest.mark.parametrize(
    ("line", "drawn"),
    [
        (
            "A front-end that believes the ranks paused before wave 0 sends rank 0 a request, which is on its way, and "
            "the coordinator a notice, which it reads: the coordinator sends rank 1 StartDPWave (wave 0).",
            [
                Arrow(F, "rank 0", "a request", True), Arrow(F, C, "a notice"),
                Arrow(C, "rank 1", "StartDPWave (wave 0)", True),
            ],
        ),
        (
            "Rank 0 reads StartDPWave (wave 0): rank 0 runs in wave 0; rank 0 says RankHello (version 1).",
            [
                Arrow(C, "rank 0", "StartDPWave (wave 0)"), Mark(["rank 0"], "rank 0 runs in wave 0"),
                Arrow("rank 0", C, "RankHello (version 1)", True),
            ],
        ),
        ("The coordinator reads rank 1's StartWave (wave 0).", [Arrow("rank 1", C, "StartWave (wave 0)")]),
        ("The request stamped 0 arrives at rank 12.", [Arrow(F, "rank 12", "The request")]),
        ("The operator asks for: keep.", [Arrow("operator", F, "asks for: keep")]),
        ("The call (keep) reaches the coordinator.", [Arrow(F, C, "The call (keep)")]),
        ("front-end 0 hears Grants.", [Arrow(C, "front-end 0", "Grants")]),
        ("the coordinator hears Ask of front-end 1.", [Arrow("front-end 1", C, "Ask")]),
        ("All ranks take part in a step.", [Mark(["rank"], "All ranks take part in a step")]),
        ("Rank 1 dies.", [Mark(["rank 1"], "Rank 1 dies")]),
    ],
)  # fmt: skip
def test_who_sends_what_to_whom(line: str, drawn: list[Arrow | Mark]) -> None:
    assert drawn_of(line) == drawn


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["joiner-told-the-wave", "new-coordinator-asks", "suspension-number"])
def test_of_each_rules_story_every_line_is_drawn_and_most_messages_come_from_somebody(rule: str) -> None:
    finding = without_rule(rule)
    drawn = [drawn_of(re.sub(r"^\d+\. ", "", line)) for line in finding.story]
    assert all(one.parties if isinstance(one, Mark) else one.what for line in drawn for one in line)
    marks = [one.what for line in drawn for one in line if isinstance(one, Mark)]
    # Words for messages that no rule of the drawing knows would be marks.
    assert not [what for what in marks if re.search(r"\b(reads|says|sends)\b", what)], marks
    page = diagram(finding.story, finding.violation, [rule])
    assert page.count("<path") == sum(isinstance(one, Arrow) for line in drawn for one in line)


def test_the_file_is_one_that_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "story.html"
    answer = CliRunner().invoke(app, ["--without", "own-report", "--report", str(path)])
    assert answer.exit_code == 1, answer.output
    page = path.read_text()
    assert not re.findall(r"https?:|src=|@import|url\(", page)
    assert "Stuck: rank 0 runs in wave 1" in page
    assert re.findall(r"<b>(.*?)</b>", page) == [F, C, "rank 0", "rank 1"]


def test_where_it_cannot_be_written_that_is_said_first(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["--without", "own-report", "--report", str(tmp_path)])
    assert answer.exit_code == 2
    assert "--report" in answer.output
    assert "states" not in answer.output, "nothing was walked"
