"""What a lockstep engine needs of the other ranks: collectives among the members of one generation.

The engine is handed a `RankGroup`; `runtime/collective.py` makes one of sockets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


class GenerationEnded(PacelineError):
    """A member has left or died, or this one was told to leave: no collective of this generation completes."""


class RankGroup(ABC):
    """The members of one generation. All members call the same collectives in the same order.

    Every method but `leave` blocks until all members have called it, and raises GenerationEnded within a second
    of a member's end. `leave` may be called by any thread at any time, also twice.
    """

    def __init__(self, generation: int, rank: int, members: Sequence[int]) -> None:
        self.generation = generation
        self.rank = rank
        self.members = sorted(members)

    def barrier(self) -> None:
        """Wait for all."""
        self.all_reduce([0], "max")

    @abstractmethod
    def all_reduce(self, values: Sequence[int], reduction: Reduction) -> list[int]:
        """Reduce small integers (64-bit, at most 64 of them) element by element; all get the result."""

    @abstractmethod
    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        """Send `arrays[i]` to the i-th member, get one from each, in the order of members.

        Shapes and types are free; those received are read-only. Raises ValueError for arrays of objects.
        """

    @abstractmethod
    def leave(self) -> None:
        """End this generation for this member and so for all; blocked calls raise."""
