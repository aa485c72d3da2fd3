"""What front-ends ask of the coordinator (suspend, resume), each call served once however often it is repeated.

A front-end repeats a call until it is answered, since the coordinator may have been away. A repeat is no new call:
it gets the answer that the first one got, also where somebody has asked for the contrary meanwhile. And a new
coordinator answers nobody before it has heard the ranks: what it would say of a suspension that it does not know
would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from paceline.protocol.messages import ControlRequest
from paceline.protocol.sampling import ControlAction

ANSWERS_KEPT = 4096


class Calls:
    """The calls that wait, and the answers given."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], ControlRequest] = {}
        self._answered: dict[tuple[int, int], int] = {}

    def request(self, request: ControlRequest) -> None:
        """A front-end asks, or repeats what it asked."""
        self._waiting[(request.front_end, request.call)] = request

    def forget_front_end(self, front_end: int) -> None:
        """The front-end is gone; what it asked for stays asked for."""
        self._answered = {key: number for key, number in self._answered.items() if key[0] != front_end}

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    def serve(self, ask: Callable[[ControlAction], int], current: int) -> list[tuple[int, int, int]]:
        """The answers, as (front-end, call, number); to be called once the ranks were heard.

        `ask` does what is asked and returns the number for it; `current`: the suspension's number before.
        """
        waiting, self._waiting = self._waiting, {}
        answers = []
        for key, request in waiting.items():
            number = self._answered.get(key, request.answered or None)
            if number is None or number > current:
                # Never answered, or by a coordinator of whose suspension nobody knows any more.
                current = number = ask(request.action)
            self._answered[key] = number
            answers.append((*key, number))
        while len(self._answered) > ANSWERS_KEPT:
            del self._answered[next(iter(self._answered))]
        return answers
