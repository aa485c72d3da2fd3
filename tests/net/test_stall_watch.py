"""When the watch speaks: after the timeout, again after each, and when it is over."""

from __future__ import annotations

import threading

from paceline.core.rank.events import Waited
from paceline.engines.group import Waiting
from paceline.net.group import StallWatch
from tests.pace import stretched


def test_it_speaks_after_each_timeout_and_when_it_is_over() -> None:
    now: list[Waiting | None] = [None]
    said: list[Waited] = []
    watch = StallWatch(2.0, lambda: now[0], said.append)

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
