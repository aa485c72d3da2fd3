"""What a lockstep engine needs of the other ranks: collectives among the members of one epoch.

The engine is handed a `RankGroup`; `net/collective.py` makes one of sockets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.errors import PacelineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
else:
    # A name for annotations alone: a rank of an independent engine catches GenerationEnded and needs no NumPy.
    Array = object
Reduction = str
"""`max`, `sum`, or `and` (all are non-zero)."""

REDUCTIONS: dict[Reduction, Callable[[Sequence[int]], int]] = {
    "max": max,
    "sum": sum,
    "and": lambda values: int(all(values)),
}
MAX_REDUCED = 64
"""Integers in one all-reduce."""


def reduced(rows: Sequence[Sequence[int]], reduction: Reduction | Sequence[Reduction]) -> list[int]:
    """The members' integers, one row each, reduced element by element. Raises ValueError where lengths differ."""
    columns = list(zip(*rows, strict=True))
    if isinstance(reduction, str):
        return [REDUCTIONS[reduction](column) for column in columns]
    return [REDUCTIONS[name](column) for name, column in zip(reduction, columns, strict=True)]


class EpochEnded(PacelineError):
    """A member has left or died, or this one was told to leave: no collective of this epoch completes."""


@dataclass(frozen=True)
class Waiting:
    """A member is blocked in a collective."""

    collective: int
    """Which of its epoch, from 1; the same at all members."""
    kind: str
    """`barrier`, `all_reduce` or `all_to_all`."""
    ranks: tuple[int, ...]
    """The members without whom this one cannot go on: nothing, or not all, has come from them.

    What each can know differs. In an all-to-all every member hears from every other and names who is late. A group
    that reduces through one member (`SocketGroup`: the first) lets only that one know: it names who is late, all
    others name it. So one answer may name a member that itself waits for another; `protocol/coordination/epoch.py`
    combines them.
    """
    seconds: float
    """Since this member began this collective."""


class RankGroup(ABC):
    """The members of one epoch. All members call the same collectives in the same order.

    The collectives block until all members have called them, and raise GenerationEnded within a second of a member's
    end. `leave` and `waiting` may be called by any thread at any time, `leave` also twice.
    """

    def __init__(self, epoch: int, rank: int, members: Sequence[int]) -> None:
        self.epoch = epoch
        self.rank = rank
        self.members = sorted(members)

    def barrier(self) -> None:
        """Wait for all."""
        self.all_reduce([0], "max")

    @abstractmethod
    def all_reduce(self, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        """Reduce small integers (64-bit, at most 64 of them) element by element; all get the result.

        `reduction`: for all of them, or one for each, the same at all members.
        """

    @abstractmethod
    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        """Send `arrays[i]` to the i-th member, get one from each, in the order of members.

        Shapes and types are free; those received are read-only. Raises ValueError for arrays of objects.
        """

    @abstractmethod
    def leave(self) -> None:
        """End this epoch for this member and so for all; blocked calls raise."""

    def urge(self) -> None:
        """Let all members know, with the next all-to-all, that this one wants them to agree. Any thread may call it."""
        return

    def urged(self) -> bool:
        """Whether some member's `urge` has come with an all-to-all since this was last asked.

        Each all-to-all tells all members alike, so if all ask after the same collective, all get the same answer.
        False where the group cannot carry it.
        """
        return False

    def waiting(self) -> Waiting | None:
        """Where this member is blocked, for whom and how long; None while it is not, or where the group cannot say."""
        return None

    def close(self) -> None:
        """Leave, and give back what the group holds. Only for the thread that runs the collectives."""
        self.leave()
