"""What one party knows of the deployment's pause: its number, its mode, whether it is over.

One counter for the whole deployment says it all. An odd number is a pause, the even number after it the
resumption; the higher number is the newer word, whoever brings it, so that messages may come late, twice or
crosswise. An even number is in force once it is `released`: every rank has said that it knows it.
"""

from __future__ import annotations

from paceline.core.load import plausible
from paceline.core.messages import Suspension
from paceline.core.requests import SuspendMode

MODES: tuple[SuspendMode, ...] = ("keep", "wait", "abort")


class PauseState:
    """The pause as one party knows it."""

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
