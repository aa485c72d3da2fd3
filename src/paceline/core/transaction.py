"""A numbered transaction over the whole deployment: a pause, a change of its size or of its weights are one machinery.

One counter says it all. An odd number is a transaction under way (a pause in force, a change), the even
number behind it says how it ended; the higher number is the newer word, whoever brings it, so that messages may come
late, twice or crosswise. Nothing is saved: a new coordinator takes up the highest number that it hears. What everybody
must know is repeated until everybody has said so. The even number of a pause is in force once it is `released`: every
rank has said that it knows it.

What is asked for is a *call* of a front-end, which repeats it until it is served, since the coordinator may have been
away. A repeat is no new call: each is served once, also where somebody has asked for the contrary meanwhile.
"""

from __future__ import annotations

from paceline.core.load import plausible
from paceline.core.messages import Suspension
from paceline.core.requests import SuspendMode
from paceline.core.retry import Retry

ANSWERS_KEPT = 4096


class Transaction:
    """The coordinator's side: a number, calls that are served once, and a word that is repeated."""

    def __init__(self) -> None:
        self.served = ServedCalls()
        self._retry = Retry()

    @property
    def number(self) -> int:
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


MODES: tuple[SuspendMode, ...] = ("keep", "wait", "abort")


class PauseState:
    """The pause as one party knows it: its number, its mode, whether it is over."""

    def __init__(self) -> None:
        self.number = 0
        self.mode: SuspendMode = "keep"
        self.released = True
        self.draining = False
        """Whether what is begun may be finished, as `wait` says. Not where there was a pause in force already:
        to finish would mean to go on."""

    @property
    def paused(self) -> bool:
        """Whether the newest word is to pause."""
        return self.number % 2 == 1

    @property
    def over(self) -> bool:
        """Whether work may be started."""
        return not self.paused and self.released

    @property
    def packed(self) -> int:
        """Number and mode as one integer, of which the largest is the newest."""
        return self.number * len(MODES) + MODES.index(self.mode)

    def learn(self, number: int, mode: SuspendMode, released: bool) -> bool:
        """Take in somebody's word. Returns whether it was news."""
        if not plausible(number, self.number):
            return False
        if number > self.number:
            going = self.over or self.draining
            self.number, self.mode = number, mode
            self.draining = going and self.paused and mode == "wait"
            self.released = released and not self.paused
            return True
        if number == self.number and released and not self.released and not self.paused:
            self.released = True
            return True
        return False

    def hear(self, told: Suspension | None) -> None:
        """Take in what the coordinator says, if it says anything."""
        if told is not None:
            self.learn(told.number, told.mode, told.released)

    def learn_packed(self, packed: int) -> bool:
        """Take in what the ranks agreed on. Returns whether it was news."""
        number, mode = divmod(packed, len(MODES))
        return self.learn(number, MODES[mode], False)


def stops(packed: int) -> bool:
    """Whether ranks that have agreed on this pause at once."""
    number, mode = divmod(packed, len(MODES))
    return number % 2 == 1 and MODES[mode] != "wait"
