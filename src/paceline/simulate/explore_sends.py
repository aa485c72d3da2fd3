"""A request on its way: what front-ends may believe, what they send then, and which of it comes first."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from paceline.core.frontend.events import CoordinatorSaid, Submit, ToCoordinator, ToRank
from paceline.core.frontend.machine import FrontEnd
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, WakeNotice
from paceline.core.rank.events import Phase
from paceline.core.requests import AddRequest, SamplingParams
from paceline.core.routing.least import LeastLoad
from paceline.simulate.explore_block import FRONT_END
from paceline.simulate.explore_parts import NOW
from paceline.simulate.explore_rank import Blocks


class Sent(NamedTuple):
    """One way for a request to be sent and the first that comes of it. `kind`, `stamp`: of the action.

    `block`: of the rank that it is sent to, afterwards. `read`: the notice that the coordinator reads at once, if any.
    """

    kind: str
    stamp: int
    block: int
    read: int | None = None


def ways_to_send(blocks: Blocks, number: int, published: tuple[int, bool]) -> list[Sent]:
    """All ways, to the rank in block `number`. `published`: the newest (wave, running) that front-ends can know."""
    life = blocks.life(number)
    if life.machine.phase is not Phase.READY:
        # No front-end is connected to this life yet.
        return []
    newest, runs = published
    beliefs = {(0, False), (newest, False)} | ({(newest, True)} if runs else {(newest - 1, True)} - {(-1, True)})
    ways: list[Sent] = []
    for wave, running in sorted(beliefs):
        stamp, notice = front_end_sends(wave, running)
        if notice is None:
            ways += [] if life.busy else [Sent("send", stamp, blocks.arrive(number, stamp))]
            continue
        if not life.busy:
            ways.append(Sent("send-first", stamp, blocks.noticed(blocks.arrive(number, stamp), notice)))
        ways.append(Sent("notice-first", stamp, blocks.sent(number, stamp), notice))
    return ways


def ways_without_notice(blocks: Blocks, number: int, published: tuple[int, bool]) -> list[Sent]:
    """All ways for a request whose notice is lost, or was not sent."""
    life = blocks.life(number)
    if life.machine.phase is not Phase.READY:
        return []
    newest, runs = published
    stamps = sorted({0, newest, max(0, newest - (not runs))})
    if life.busy:
        return [Sent("send-late", stamp, blocks.sent(number, stamp)) for stamp in stamps]
    return [Sent("send-alone", stamp, blocks.arrive(number, stamp)) for stamp in stamps]


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
