"""What cannot be written to stderr is lost, and nothing else happens."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.process.log import LossyFile
from tests.pace import stretched

PROGRAM = """
import logging, sys
from paceline.process.log import set_up_log
set_up_log("info")
for number in range(3000):
    print("line", number, file=sys.stderr)
    logging.info("line %d", number)
"""


def test_a_write_that_fails_is_as_good_as_done() -> None:
    with LossyFile("/dev/full", "w") as file:
        assert file.write(b"four") == 4
        assert file.write(memoryview(b"three")) == 5


def test_there_may_be_room_again(tmp_path: Path) -> None:
    """Nothing of what was lost is kept: what comes next is whole."""
    read, write = tmp_path / "log", LossyFile(tmp_path / "log", "w")
    text = io.TextIOWrapper(io.BufferedWriter(write), line_buffering=True)
    with text:
        text.write("one\n")
        with open("/dev/full", "w") as full:
            file = LossyFile(full.fileno(), "w", closefd=False)
            lost = io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)
            lost.write("two\n" * 5000)
            lost.close()
        text.write("three\n")
    assert read.read_text() == "one\nthree\n"


@pytest.mark.slow
def test_a_program_with_a_full_disk_ends_as_ever() -> None:
    with open("/dev/full", "w") as full:
        assert (
            subprocess.run([sys.executable, "-c", PROGRAM], stderr=full, timeout=stretched(60), check=False).returncode
            == 0
        )


@pytest.mark.slow
def test_what_can_be_written_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=stretched(60), check=True
    )
    assert len(done.stderr.splitlines()) == 6000
