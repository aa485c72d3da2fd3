"""A rank that was given up: it is missed by name, comes back when asked, and is tried again by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.control import Control, ControlError
from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow


def _give_up(running: Deployment, rank: int) -> None:
    os.kill(running.pid_of(f"rank {rank}"), signal.SIGKILL)
    running.wait_line(f"rank {rank} ended (killed by SIGKILL) once too often")
    wait_until(lambda: running.health()["missing"] == [rank], "the missing rank")


def _paceline(running: Deployment, *arguments: str) -> Any:
    command = [sys.executable, "-m", "paceline", *arguments, "--url", running.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=stretched(90))


def test_a_rank_that_was_given_up_is_missed_and_comes_back_when_asked() -> None:
    with deployment("--engine", "timed", "--max-rank-restarts", "0") as running:
        control = Control(running.url)
        assert control.revive()["revived"] == []
        _give_up(running, 1)
        assert control.loads()["missing"] == [1]
        assert "missing: rank 1" in _paceline(running, "loads").stdout
        scaled = _paceline(running, "scale", "3")
        assert "3 ranks, from 2" in scaled.stdout, scaled.stderr
        assert "; rank 1 of them does not serve" in scaled.stdout
        done = _paceline(running, "revive")
        assert done.stdout.startswith("rank 1 serves after "), done.stderr
        assert running.health()["ready"] == [0, 1, 2]
        assert "asked to start again: rank 1" in running.output
        _give_up(running, 2)
        assert control.revive(2)["revived"] == [2]
        with pytest.raises(ControlError, match="rank: must be 0 to 2, not 7"):
            control.revive(7)


def test_one_that_cannot_come_back_is_said_so(tmp_path: Path) -> None:
    engine = ["--engine", "tests.late_engines:Once", "--max-rank-restarts", "0"]
    with deployment(*engine, variables={"TMPDIR": str(tmp_path)}) as running:
        _give_up(running, 1)
        with pytest.raises(ControlError, match=r"rank 1 is not back after 3 s"):
            Control(running.url).revive(1, 3)
        assert running.health()["ready"] == [0]


def test_it_is_tried_again_by_itself() -> None:
    with deployment("--engine", "timed", "--max-rank-restarts", "0", "--revive-interval", "2") as running:
        _give_up(running, 1)
        wait_until(lambda: running.health()["missing"] == [], "the next life")
        assert "rank 1 is back" in running.output
