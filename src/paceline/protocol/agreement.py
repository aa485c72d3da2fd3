"""The step agreement on the wire: one all-reduce of integers, each with a reduction of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paceline.protocol import quota
from paceline.protocol.rank_events import Agree, Agreed

REDUCTIONS: tuple[str, ...] = ("max", "max", "max", *quota.REDUCTIONS)
"""How each integer is reduced over the ranks."""


def integers(agree: Agree) -> list[int]:
    """What a rank puts in."""
    return [int(agree.has_work), agree.wave, agree.suspension, *(agree.quota or quota.UNLIMITED)]


LARGEST = 2**60
"""No integer of ours comes near, also summed over all ranks."""


def outcome(reduced: Sequence[int]) -> Agreed:
    """What all ranks learn of it. Raises ValueError where they cannot have agreed on that."""
    any_work, wave, suspension, *rest = reduced
    if not all(0 <= integer < LARGEST for integer in reduced) or not quota.possible(rest):
        raise ValueError("a rank has put in what no rank of ours does")
    return Agreed(bool(any_work), wave, suspension, rest)


def agreed(entered: Iterable[Agree]) -> Agreed:
    """The outcome where all ranks' parts are in one place: in virtual time."""
    columns = list(zip(*map(integers, entered), strict=True))
    return outcome([max(c) if how == "max" else sum(c) for c, how in zip(columns, REDUCTIONS, strict=True)])
