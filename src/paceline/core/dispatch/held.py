"""Up to which delta it is known what each rank holds, and who is asked to say it anew.

Deltas of one life of a rank apply one after the other (`rank/kv.py`). Where one is missing, or the rank's hello names
one that was never heard, nothing of that rank is believed to be missing or there by what comes behind it: it is asked,
again and again, until it says all. So what is known is exact after any loss, as of the last delta.
"""

from __future__ import annotations

from msgspec import Struct

from paceline.core.messages import KvAsk, KvDelta

REPEAT_S = 0.5


class Heard(Struct):
    """Of one life of a rank. `number`: of the last delta that applied. `due`: when it is asked, None where in step."""

    incarnation: int
    number: int = 0
    due: float | None = None


class HeldNumbers:
    """Of all ranks."""

    def __init__(self) -> None:
        self._heard: dict[int, Heard] = {}

    @property
    def due(self) -> float | None:
        return min((one.due for one in self._heard.values() if one.due is not None), default=None)

    def hello(self, rank: int, incarnation: int, number: int, now: float) -> None:
        """The rank's last delta had this number; 0 for none."""
        one = self._of(rank, incarnation)
        if number > one.number and one.due is None:
            one.due = now

    def take(self, delta: KvDelta, now: float) -> bool:
        """Returns whether it applies."""
        one = self._of(delta.rank, delta.incarnation)
        if delta.number <= one.number:
            return False
        if delta.whole:
            one.due = None
        elif one.due is not None:
            return False
        elif delta.number != one.number + 1:
            one.due = now
            return False
        one.number = delta.number
        return True

    def again(self, rank: int) -> None:
        """What was known of it has been forgotten: it is asked at once."""
        one = self._heard.get(rank)
        if one is not None and one.number:
            one.due = float("-inf")

    def all_again(self) -> None:
        for rank in self._heard:
            self.again(rank)

    def forget(self, rank: int) -> None:
        """That life is over."""
        self._heard.pop(rank, None)

    def asks(self, now: float) -> list[KvAsk]:
        """Who is asked now."""
        found = []
        for rank, one in self._heard.items():
            if one.due is not None and now >= one.due:
                one.due = now + REPEAT_S
                found.append(KvAsk(rank, one.incarnation))
        return found

    def _of(self, rank: int, incarnation: int) -> Heard:
        one = self._heard.get(rank)
        if one is None or one.incarnation != incarnation:
            one = self._heard[rank] = Heard(incarnation)
        return one
