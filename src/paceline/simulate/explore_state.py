"""The state of a whole deployment, and a move from one to the next."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from paceline.protocol.frontend import FrontEnd
from paceline.protocol.frontend_events import CoordinatorSaid, Submit, ToCoordinator, ToRank
from paceline.protocol.messages import PROTOCOL_VERSION, AddRequest, LoadView, Member, Members, WakeNotice
from paceline.protocol.routing import LeastLoad
from paceline.protocol.sampling import SamplingParams
from paceline.simulate.explore_block import FRONT_END
from paceline.simulate.explore_parts import NOW

State = tuple[int, ...]
"""`(coordinator, common, block of rank 0, block of rank 1, ...)`, each a number."""

COORDINATOR, COMMON, FIRST_BLOCK = 0, 1, 2


class Common(NamedTuple):
    """What belongs to no one party.

    `unsent`: requests that may still be sent. `published`: the newest (wave, running) that front-ends can have heard.
    `losses`, `crashes`: how many more there may be. `calls`: of the operator, how many have been served. `asking`:
    whether one is under way; `told`: whether this life of the coordinator has it; `answered`: its answer, 0 for none.
    `settled`: the number of the suspension that all ranks have said to keep, 0 where none is in force.
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


class Action(NamedTuple):
    """One move. `rank`: the block it is about, -1 for none. `detail`, `lost`: see `explore_story`.

    `fair`: it happens by itself, sooner or later; requests, faults, and reading while in a barrier do not.
    """

    kind: str
    rank: int = -1
    detail: int = 0
    lost: int = -1
    fair: bool = True


@cache
def front_end_sends(wave: int, running: bool) -> tuple[int, int | None]:
    """What a front-end with this belief sends: the request's stamp and, where it sends a notice too, the notice's."""
    machine = FrontEnd(FRONT_END, LeastLoad(0, 1), lockstep=True)
    members = Members(PROTOCOL_VERSION, 1, 0, False, [Member(0, 1, "rank")])
    machine.handle(CoordinatorSaid(members), NOW)
    machine.handle(CoordinatorSaid(LoadView(1, 1, wave, running)), NOW)
    stamp, notice = 0, None
    for effect in machine.handle(Submit(1, [1], SamplingParams(1), 0), NOW):
        if isinstance(effect, ToRank) and isinstance(effect.message, AddRequest):
            stamp = effect.message.wave
        elif isinstance(effect, ToCoordinator) and isinstance(effect.message, WakeNotice):
            notice = effect.message.wave
    return stamp, notice
