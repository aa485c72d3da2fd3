"""The state of a whole deployment, and a move from one to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

State = tuple[int, ...]
"""`(coordinator, common, block of rank 0, block of rank 1, ...)`, each a number."""

COORDINATOR, COMMON, FIRST_BLOCK = 0, 1, 2


class Scale(NamedTuple):
    """Scaling, as far as it belongs to no rank and not to the coordinator (`explore_scaling`).

    `left`: changes that may still be asked for. `alike`: ranks below this have always been alike. `node`: the node with
    its links. `published`, `known`: the newest Scaling that front-ends can hear of, and have heard of. `untold`:
    whether they have still to tell the coordinator. `call`: of the last that asked; `target`: what for, 0 where that is
    over. `late`: whether its time was up. `leaver`: the rank that is to have the number `alike`, -1 for none.
    """

    left: int
    alike: int
    node: int
    published: int = 0
    known: int = 0
    untold: bool = True
    call: int = 0
    target: int = 0
    late: bool = False
    leaver: int = -1


class Common(NamedTuple):
    """What belongs to no one party.

    `unsent`: requests that may still be sent. `published`: the newest (wave, running) that front-ends can have heard.
    `losses`, `crashes`: how many more there may be. `calls`: of the operator, how many have been served. `asking`:
    whether one is under way; `told`: whether this life of the coordinator has it; `answered`: its answer, 0 for none.
    `settled`: the number of the suspension that all ranks have said to keep, 0 where none is in force. `stranded`:
    requests whose rank has died, and that their front-ends are to send to another one. `scale`: where ranks may come
    and go.
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
    scale: Scale | None = None


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
