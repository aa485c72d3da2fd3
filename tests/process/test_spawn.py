"""Child processes: when they are started again, what they log where nothing can be written, memory given back."""

from __future__ import annotations

import ctypes
import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from paceline.log import LossyFile
from paceline.process.spawn import LONGEST_WAIT_S, LOOK_S, STEADY_S, MallocTrim, Restarts, resident_bytes
from tests.pace import stretched

NOW = 100.0


def wait_s(restarts: Restarts, served_s: float) -> float | None:
    """It has ended: after how long it is started again."""
    due = restarts.ended(served_s, NOW)
    return None if due is None else due - NOW


def test_the_first_restart_is_at_once_and_the_others_ever_later() -> None:
    restarts = Restarts()
    waits = [wait_s(restarts, 1.0) for _ in range(2000)]
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits[-1] == LONGEST_WAIT_S


def test_the_limit_counts_restarts_in_a_row() -> None:
    restarts = Restarts(2)
    assert [wait_s(restarts, 0.0) for _ in range(3)] == [0.0, 0.5, None]
    assert wait_s(restarts, STEADY_S - 1) is None


def test_a_life_that_served_begins_the_count_anew() -> None:
    restarts = Restarts(2)
    for _ in range(10):
        assert wait_s(restarts, STEADY_S) == 0.0
    assert [wait_s(restarts, 1.0) for _ in range(2)] == [0.5, None]


def test_no_restarts_at_all() -> None:
    assert wait_s(Restarts(0), STEADY_S) is None


def test_the_waits_are_what_is_asked_for() -> None:
    restarts = Restarts(first_s=0.25, longest_s=1.0, steady_s=5.0)
    assert [wait_s(restarts, 4.0) for _ in range(5)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert wait_s(restarts, 5.0) == 0.0


MIB = 1 << 20
MESSAGES, MESSAGE_BYTES = 60_000, 1000


@pytest.fixture(autouse=True)
def nothing_to_spare() -> None:
    """What tests before this one have left would be taken first, or given back with the rest."""
    ctypes.CDLL(None).malloc_trim(0)


def burst() -> list[bytes]:
    """What is left of many messages that another thread has taken in: a few, here and there."""
    taken: list[bytes] = []
    thread = threading.Thread(target=lambda: taken.extend(bytes(MESSAGE_BYTES) for _ in range(MESSAGES)))
    thread.start()
    thread.join()
    return taken[::200]


def test_what_a_burst_has_taken_is_given_back() -> None:
    malloc_trim, before = MallocTrim(), resident_bytes()
    left = burst()
    taken = resident_bytes() - before
    assert taken > 20 * MIB
    malloc_trim.look(100.0)
    assert resident_bytes() - before < taken / 2
    assert len(left) == MESSAGES / 200
    assert malloc_trim.times == 1


def test_what_is_in_use_is_no_reason_to_try_again() -> None:
    malloc_trim = MallocTrim()
    used = [bytes(MESSAGE_BYTES) for _ in range(MESSAGES)]
    for turn in range(1, 10):
        malloc_trim.look(turn * LOOK_S)
    assert malloc_trim.times == 1
    assert len(used) == MESSAGES


def test_it_looks_now_and_then() -> None:
    malloc_trim = MallocTrim()
    malloc_trim.look(100.0)
    left = burst()
    malloc_trim.look(100.0 + LOOK_S / 2)
    assert malloc_trim.times == 0
    malloc_trim.look(100.0 + LOOK_S)
    assert malloc_trim.times == 1
    assert left


PROGRAM = """
import logging, sys
from paceline.log import set_up_log
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
