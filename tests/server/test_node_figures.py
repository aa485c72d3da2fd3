"""Figures that a node's processes make together: told once, added up over those that live, counted by cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.net.links import REFUSED_FOLDER
from paceline.process.ends import CAUSES, Ends, cause_of, restarts
from paceline.process.spawn import AGAIN, HUNG
from paceline.server.node_figures import OTHERS, TENANTS_SHOWN, Once, Queued


def test_whoever_comes_first_tells_and_of_what_is_later_than_all_before(tmp_path: Path) -> None:
    one, other = Once(str(tmp_path), "pause"), Once(str(tmp_path), "pause")
    assert [one.first(2), other.first(2), other.first(4), one.first(4), one.first(2)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert Once(str(tmp_path), "pause").first(6), "also one that has come later"
    assert Once(str(tmp_path), "another").first(2)


def test_tenants_are_added_up_over_those_front_ends_that_live(tmp_path: Path) -> None:
    queued = Queued(str(tmp_path), {"quiet"})
    queued.put({"a": 1})
    assert queued.all({"a": 2}) == {"quiet": 0, "a": 2}, "its own is what it says now"
    (tmp_path / f"tenants-{os.getppid()}").write_text(json.dumps({"a": 3, "": 1}))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = tmp_path / f"tenants-{ended.pid}"
    gone.write_text(json.dumps({"a": 100}))
    assert queued.all({"a": 2}) == {"quiet": 0, "a": 5, "": 1}
    assert not gone.exists()
    many = queued.all({f"t{number}": 2 for number in range(100)})
    assert len(many) == TENANTS_SHOWN + 2
    assert sum(many.values()) == 204
    assert many[OTHERS] == 204 - sum(count for name, count in many.items() if name != OTHERS)


def test_restarts_are_counted_by_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ends().add("rank", -9)
    monkeypatch.setenv(REFUSED_FOLDER, str(tmp_path))
    ends = Ends()
    assert set(restarts(str(tmp_path)).values()) == {0}
    for exit_code in (-9, -9, 1, HUNG, AGAIN, -15):
        ends.add("rank", exit_code)
    ends.add("coordinator", -9)
    found = restarts(str(tmp_path))
    assert {cause: found["rank", cause] for cause in CAUSES["rank"]} == {
        "SIGKILL": 2,
        "failed": 1,
        "hung": 1,
        "group": 1,
    }
    assert (found["rank", "SIGTERM"], found["coordinator", "SIGKILL"], found["front-end", "failed"]) == (1, 1, 0)
    assert cause_of(0) == cause_of(None) == "failed"
