"""The state of a whole deployment, and a move from one to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

State = tuple[int, ...]
"""`(coordinator, common, block of rank 0, block of rank 1, ...)`, each a number."""

COORDINATOR, COMMON, FIRST_BLOCK = 0, 1, 2


class Common(NamedTuple):
    """What belongs to no one party.

    `unsent`: requests that may still be sent. `published`: the newest (wave, running) that front-ends can have heard.
    `losses`, `crashes`: how many more there may be. `calls`: of the operator, how many have been served. `asking`:
    whether one is under way; `told`: whether this life of the coordinator has it; `answered`: its answer, 0 for none.
    `settled`: the number of the suspension that all ranks have said to keep, 0 where none is in force. `stranded`:
    requests whose rank has died, and that their front-ends are to send to another one.
    """

    unsent: int
    published: tuple[int, bool]
    losses: int
    crashes: int
    calls: int = 0
    asking: bool = False
    told: bool = False
    answered: int = 0
    settled: int = 0
    stranded: int = 0


class Action(NamedTuple):
    """One move. `rank`: the block it is about, -1 for none. `detail`, `lost`: see `explore_story`.

    `fair`: it happens by itself, sooner or later; requests, faults, and reading while in a barrier do not.
    """

    kind: str
    rank: int = -1
    detail: int = 0
    lost: int = -1
    fair: bool = True


Moves = Iterator[tuple[Action, State]]
"""What can happen, and the state after it."""
