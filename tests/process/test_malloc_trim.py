"""Memory that a burst has left behind is given back, once."""

from __future__ import annotations

import ctypes
import threading

import pytest

from paceline.process.spawn import LOOK_S, MallocTrim, resident_bytes

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
