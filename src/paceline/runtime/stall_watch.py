"""Watches how long a lockstep rank has been waiting for its peers, and says so when it is too long.

A thread of its own, since the engine's thread is what waits. It decides nothing: whom the ranks wait for goes to
the coordinator, which finds out of all answers who holds the group up (`protocol/coordination/stalls.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from paceline.engines.group import Waiting
from paceline.protocol.rank_events import Waited

LOOKS_A_TIMEOUT = 5
LONGEST_LOOK_S = 5.0


class StallWatch:
    """Says `Waited` after `timeout_s` of waiting, again after each `timeout_s`, and when it is over.

    `waiting`: what `RankGroup.waiting` says; `say`: called in the watch's thread.
    """

    def __init__(
        self, timeout_s: float, waiting: Callable[[], Waiting | None], say: Callable[[Waited], object]
    ) -> None:
        self._timeout_s = timeout_s
        self._waiting = waiting
        self._say = say
        self._stopping = threading.Event()
        self._said_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._stopping.set()

    def look(self) -> None:
        """Look once, and say what is new."""
        waiting = self._waiting()
        if waiting is None or waiting.seconds < self._timeout_s:
            if self._said_at_s is not None:
                self._said_at_s = None
                self._say(Waited(()))
        elif self._said_at_s is None or waiting.seconds >= self._said_at_s + self._timeout_s:
            self._said_at_s = waiting.seconds
            self._say(Waited(waiting.ranks, waiting.collective, waiting.kind, waiting.seconds))

    def _run(self) -> None:
        while not self._stopping.wait(min(LONGEST_LOOK_S, self._timeout_s / LOOKS_A_TIMEOUT)):
            self.look()
