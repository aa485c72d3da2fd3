"""A numbered transaction over the whole deployment: pausing it, and changing its size, are the same machinery.

One counter says it all. An odd number is a transaction under way (a pause in force, a change of the size), the even
number behind it says how it ended; the higher number is the newer word, whoever brings it, so that messages may come
late, twice or crosswise. Nothing is saved: a new coordinator takes up the highest number that it hears. What everybody
must know is repeated until everybody has said so.

What is asked for is a *call* of a front-end, which repeats it until it is served, since the coordinator may have been
away. A repeat is no new call: each is served once, also where somebody has asked for the contrary meanwhile.
"""

from __future__ import annotations

from paceline.core.load import plausible
from paceline.core.retry import Retry

ANSWERS_KEPT = 4096


class Transaction:
    """The coordinator's side: a number, calls that are served once, and a word that is repeated."""

    def __init__(self) -> None:
        self.served = ServedCalls()
        self._retry = Retry()

    @property
    def number(self) -> int:
        """The newest that is known."""
        raise NotImplementedError

    @property
    def due(self) -> float | None:
        """When the word must be said (again); None while all have heard it."""
        return self._retry.due

    def is_news(self, number: int) -> bool:
        """Whether somebody who names this number knows more, as far as that can be."""
        return number > self.number and plausible(number, self.number)


class ServedCalls:
    """Calls that were served, by front-end and the front-end's number for it; each with the number it was served by."""

    def __init__(self) -> None:
        self._served: dict[tuple[int, int], int] = {}
        self._newest: dict[int, int] = {}

    def number(self, frontend: int, call: int) -> int | None:
        """What it was served by; None where it is new, or too old to be known."""
        return self._served.get((frontend, call))

    def newest(self, frontend: int) -> int:
        """The front-end's newest call that was served; -1 before the first."""
        return self._newest.get(frontend, -1)

    def serve(self, frontend: int, call: int, number: int) -> None:
        """It is served, or was by a coordinator before this one."""
        self._served[frontend, call] = number
        self._newest[frontend] = max(call, self.newest(frontend))
        while len(self._served) > ANSWERS_KEPT:
            del self._served[next(iter(self._served))]

    def forget_frontend(self, frontend: int) -> None:
        """The front-end is gone; what it asked for stays asked for."""
        self._newest.pop(frontend, None)
        self._served = {key: number for key, number in self._served.items() if key[0] != frontend}
