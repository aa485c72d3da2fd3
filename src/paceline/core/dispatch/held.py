"""Up to which delta it is known what each rank holds, and who is asked to say it anew.

Deltas of one life of a rank apply one after the other (`rank/kv.py`). Where one is missing, or the rank's hello names
one that was never heard, nothing of that rank is believed to be missing or there by what comes behind it: it is asked,
again and again, until it says all. So what is known is exact after any loss, as of the last delta.
"""

from __future__ import annotations

from paceline.core.messages import KvAsk, KvDelta

REPEAT_S = 0.5


class HeldNumbers:
    """Of all ranks."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[int, int]] = {}
        """By rank, its life and the number of the last delta that applied."""
        self._due: dict[int, float] = {}
        """When those that are not in step are asked: mostly nobody, so that it costs nothing to look."""

    @property
    def due(self) -> float | None:
        return min(self._due.values()) if self._due else None

    def hello(self, rank: int, incarnation: int, number: int, now: float) -> None:
        """The rank's last delta had this number; 0 for none."""
        if number > self._number(rank, incarnation):
            self._due.setdefault(rank, now)

    def take(self, delta: KvDelta, now: float) -> bool:
        """Returns whether it applies."""
        rank, number = delta.rank, self._number(delta.rank, delta.incarnation)
        if delta.number <= number:
            return False
        if delta.whole:
            self._due.pop(rank, None)
        elif rank in self._due:
            return False
        elif delta.number != number + 1:
            self._due[rank] = now
            return False
        self._heard[rank] = (delta.incarnation, delta.number)
        return True

    def again(self, rank: int) -> None:
        """What was known of it has been forgotten: it is asked at once."""
        if rank in self._heard and self._heard[rank][1]:
            self._due[rank] = float("-inf")

    def all_again(self) -> None:
        for rank in self._heard:
            self.again(rank)

    def forget(self, rank: int) -> None:
        """That life is over."""
        self._heard.pop(rank, None)
        self._due.pop(rank, None)

    def asks(self, now: float) -> list[KvAsk]:
        """Who is asked now."""
        found = [rank for rank, due in self._due.items() if now >= due]
        for rank in found:
            self._due[rank] = now + REPEAT_S
        return [KvAsk(rank, self._heard[rank][0]) for rank in found]

    def _number(self, rank: int, incarnation: int) -> int:
        one = self._heard.get(rank)
        if one is None or one[0] != incarnation:
            self._heard[rank] = (incarnation, 0)
            self._due.pop(rank, None)
            return 0
        return one[1]
