"""A front-end's two kinds of sockets, its machine behind them, and its answers behind that."""

from __future__ import annotations

import random
from typing import Any

from paceline.core import codec
from paceline.core.frontend import events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankView
from paceline.core.requests import SamplingParams
from paceline.core.routing.least import LeastLoad
from tests.fuzz.corpus import classes_of
from tests.fuzz.target import Target, said_well

IDENTITY, COORDINATOR = 2**41, 2**42
RANKS = range(4)
LIVES = [2**40 + rank for rank in RANKS]
MOST_UNDER_WAY = 16


class FrontendTarget(Target):
    """A front-end of four ranks, with a few requests under way at all times."""

    largest = 20_000

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._to_coordinator, self._to_rank = codec.from_frontend(), codec.request()

    def begin(self) -> None:
        late_binding = self.draw.random() < 0.5
        self.machine = Frontend(
            IDENTITY, LeastLoad(0, 2), ranks=frozenset(RANKS), max_waiting=64, relay_sends=True,
            lockstep=self.draw.random() < 0.5, late_binding=late_binding, resumes=True,
        )  # fmt: skip
        self.under_way: list[int] = []
        self._next = 1
        self.handle(events.Connected())
        self.introduce(0)

    def introduce(self, number: int) -> None:
        members = [Member(rank, life, f"tcp://rank-{rank}") for rank, life in enumerate(LIVES)]
        self.handle(events.CoordinatorSaid(Members(PROTOCOL_VERSION, COORDINATOR, 0, False, members)))
        views = [RankView(rank, life, number, Load(slots=8)) for rank, life in enumerate(LIVES)]
        self.handle(events.CoordinatorSaid(LoadView(COORDINATOR, number, 0, False, views)))
        for rank in RANKS:
            self.handle(events.LinkUp(rank))

    def handle(self, event: events.Event) -> None:
        for effect in self.machine.handle(event, self.now):
            match effect:
                case events.ToCoordinator(message):
                    said_well(message, self._to_coordinator)
                case events.ToRank(_, message):
                    said_well(message, self._to_rank)
                case events.Deliver(outputs):
                    for output in outputs:
                        if output.finish_reason is not None and output.request in self.under_way:
                            self.under_way.remove(output.request)
                case events.Refuse(request):
                    if request in self.under_way:
                        self.under_way.remove(request)

    def live(self) -> None:
        draw = self.draw
        self.pass_time()
        if draw.random() < 0.3:
            self.under_way.append(self._next)
            self.handle(events.Submit(self._next, [1, 2, 3], SamplingParams(8), draw.choice((None, None, None, 1))))
            self._next += 1
        while len(self.under_way) > MOST_UNDER_WAY:
            self.handle(events.Abandon([self.under_way.pop(0)]))
        if draw.random() < 0.02:
            self.handle(events.Control(self._next, draw.choice(("keep", "wait", "resume"))))
            self.handle(events.ControlGivenUp(self._next))
        if draw.random() < 0.02:
            rank = draw.choice(RANKS)
            self.handle(events.LinkDown(rank))
            self.handle(events.LinkUp(rank))
        if self.now >= self.machine.deadline:
            self.handle(events.Tick())
        self.machine.statistics()
        self.machine.loads()

    def machines(self) -> list[Any]:
        return [self.machine]


class Broadcasts(FrontendTarget):
    """What the coordinator says."""

    name = "front-end-broadcasts"
    corpus = "coordinator-to-front-ends"
    kinds = classes_of("coordinator → front-ends")
    known = (0, 1, 2, 3, IDENTITY, COORDINATOR, *LIVES)
    parties = [
        {"rank": rank, "incarnation": life, "frontend": IDENTITY, "coordinator": COORDINATOR}
        for rank, life in enumerate(LIVES)
    ]
    decode = staticmethod(codec.to_frontend().decode)

    def take(self, message: Any) -> None:
        self.handle(events.CoordinatorSaid(message))
        self.live()


class Tokens(FrontendTarget):
    """What ranks send."""

    name = "front-end-outputs"
    corpus = "rank-to-front-end"
    kinds = classes_of("rank → front-end")
    known = (0, 1, 2, 3, *range(1, 400, 7), 2**62, 2**62 + 1)
    parties = [{"rank": rank, "incarnation": life} for rank, life in enumerate(LIVES)]
    decode = staticmethod(codec.outputs().decode)

    def take(self, message: Any) -> None:
        self.handle(events.RankSaid(message))
        self.live()
