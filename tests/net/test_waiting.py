"""What a member says while it is blocked, and whom all their answers name."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.core.coordinator.epoch import Stalls
from paceline.core.messages import StallReport
from paceline.core.rank.events import Waited
from paceline.engines.group import EpochEnded, RankGroup, Waiting
from paceline.net.rank import StallWatch
from tests.net.groups import Threads, group_path
from tests.pace import stretched
from tests.serving import wait_until

CALLS: dict[str, Callable[[RankGroup], Any]] = {
    "barrier": lambda group: group.barrier(),
    "all_reduce": lambda group: group.all_reduce([1, 2], "sum"),
    "all_to_all": lambda group: group.all_to_all([np.ones(3)] * 4),
}


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Threads]:
    members = Threads([group_path(tmp_path, rank) for rank in range(4)])
    yield members
    members.close()


def culprits(found: dict[int, Waiting]) -> list[int]:
    """Whom the coordinator names, out of what each member says."""
    stalls = Stalls()
    for rank, answer in found.items():
        stalls.report(StallReport(rank, 1, 0, list(answer.ranks), answer.collective, answer.kind, answer.seconds))
    return [stall.rank for stall in stalls.found]


def answers(four: Threads) -> dict[int, Waiting | None]:
    return {rank: group.waiting() for rank, group in enumerate(four.groups)}


@contextmanager
def all_but(late: int, four: Threads, kind: str) -> Iterator[None]:
    """Inside, all are in the same collective but one, who comes at the end."""
    come = threading.Event()

    def run(rank: int) -> None:
        if rank == late:
            come.wait(stretched(60))
        CALLS[kind](four.groups[rank])

    futures = four.start(run)
    try:
        yield
    finally:
        come.set()
        for future in futures:
            future.result(stretched(30))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("late", [0, 2])
def test_late_member_is_named(four: Threads, kind: str, late: int) -> None:
    assert answers(four) == dict.fromkeys(range(4))
    four.each(lambda rank: four.groups[rank].barrier())
    through_first = kind != "all_to_all"
    expected = {rank: (0,) if through_first and rank != 0 else (late,) for rank in range(4) if rank != late}

    def settled() -> dict[int, Waiting] | None:
        found = answers(four)
        waiting = {rank: answer for rank, answer in found.items() if answer is not None}
        return waiting if {rank: answer.ranks for rank, answer in waiting.items()} == expected else None

    with all_but(late, four, kind):
        found = wait_until(settled, f"rank {late} is named")
        assert culprits(found) == [late]
        for answer in found.values():
            assert (answer.collective, answer.kind) == (2, kind)
            assert 0 <= answer.seconds < 60
        wait_until(lambda: four.groups[1].waiting().seconds > found[1].seconds, "time passes")
    assert answers(four) == dict.fromkeys(range(4))


@pytest.mark.slow
def test_who_has_left_waits_for_nobody(four: Threads) -> None:
    blocked = four.pool.submit(four.groups[0].barrier)
    wait_until(lambda: four.groups[0].waiting(), "it waits")
    four.groups[0].leave()
    assert four.groups[0].waiting() is None
    with pytest.raises(EpochEnded):
        blocked.result(stretched(10))
    assert four.groups[0].waiting() is None


@contextmanager
def switching_within_c_code() -> Iterator[None]:
    """Garbage collections that run Python code: any allocation may hand over to another thread."""

    def callback(phase: str, info: dict[str, int]) -> None:
        for _ in range(10):
            pass

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(callback)
    gc.set_threshold(5, 1000, 1000)
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


@pytest.mark.slow
def test_asked_all_the_time_while_collectives_run(four: Threads) -> None:
    done = threading.Event()
    seen: list[tuple[int, Waiting]] = []

    def ask() -> None:
        while not done.is_set():
            seen.extend((rank, answer) for rank, answer in answers(four).items() if answer is not None)

    def run(rank: int) -> None:
        for _ in range(100):
            for call in CALLS.values():
                call(four.groups[rank])

    asker = ThreadPoolExecutor(1)
    asking = asker.submit(ask)
    with switching_within_c_code():
        try:
            four.each(run)
        finally:
            done.set()
            asking.result(stretched(30))
            asker.shutdown()
    kinds = list(CALLS)
    assert seen
    for rank, answer in seen:
        assert answer.kind == kinds[(answer.collective - 1) % len(kinds)]
        assert answer.ranks
        assert rank not in answer.ranks
        assert answer.seconds >= 0


def test_it_speaks_after_each_timeout_and_when_it_is_over() -> None:
    now: list[Waiting | None] = [None]
    said: list[Waited] = []
    watch = StallWatch(2.0, lambda: now[0], lambda event: said.append(event) if isinstance(event, Waited) else None)

    def look(seconds: float | None) -> list[Waited]:
        now[0] = None if seconds is None else Waiting(7, "all_to_all", (3,), seconds)
        said.clear()
        watch.look()
        return said

    assert look(None) == []
    assert look(1.9) == []
    assert look(2.0) == [Waited((3,), 7, "all_to_all", 2.0)]
    assert look(3.9) == []
    assert look(4.0) == [Waited((3,), 7, "all_to_all", 4.0)]
    # Another collective, which has not lasted that long.
    assert look(0.1) == [Waited(())]
    assert look(None) == []


def test_it_watches_until_it_is_stopped() -> None:
    spoken = threading.Event()
    watch = StallWatch(0.01, lambda: Waiting(1, "barrier", (0,), 5.0), lambda waited: spoken.set())
    watch.start()
    assert spoken.wait(stretched(10))
    watch.stop()
    watch._thread.join(stretched(10))
    assert not watch._thread.is_alive()
