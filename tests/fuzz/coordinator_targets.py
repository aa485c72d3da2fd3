"""The coordinator's three sockets, and its machine behind them."""

from __future__ import annotations

import itertools
import logging
import random
from typing import Any

from paceline.core import codec
from paceline.core.binding import SendNotice
from paceline.core.coordinator.events import Event, Note, RankGone, RankSubscribed, Tick, ToFrontends, ToRanks
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, FrontendHello, LoadView, Members, RankHello, RankReport
from paceline.net.coordinator import FrontendInbox, RankInbox
from paceline.net.links import BadFrames
from tests.fuzz.corpus import classes_of
from tests.fuzz.target import Frames, Target, said_well

RANKS = 4
LIVES = [2**40 + rank for rank in range(RANKS)]
FRONTENDS = [2**41 + index for index in range(2)]
REAL_RANKS = [{"rank": rank, "incarnation": life} for rank, life in enumerate(LIVES)]
REAL_FRONTENDS = [{"frontend": frontend} for frontend in FRONTENDS]
logger = logging.getLogger("fuzz")
logger.setLevel(logging.CRITICAL)


class CoordinatorTarget(Target):
    """A coordinator of four ranks and two front-ends who are what they should be, in lockstep or not."""

    largest = 5_000

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._identities = itertools.count(1)
        self._to_ranks, self._to_frontends = codec.to_rank(), codec.to_frontend()

    def begin(self) -> None:
        lockstep = self.draw.random() < 0.5
        self.machine = Coordinator(RANKS, next(self._identities), 0.1, lockstep=lockstep)
        self.said: list[Any] = []
        self.front, self.back = Frames(), Frames()
        self._front_inbox = FrontendInbox(self.front, BadFrames(logger, "front"), self.handle)  # type: ignore[arg-type]
        self._inbox = RankInbox(self.back, BadFrames(logger, "back"), self.handle, every_report=lockstep)  # type: ignore[arg-type]
        for rank, life in enumerate(LIVES):
            self.handle(RankSubscribed(rank, life))
            self.hello(rank)
        for frontend in FRONTENDS:
            self.front.arrive(b"\x01" + codec.frontend_topic(frontend))
            self.front.arrive(codec.encode(FrontendHello(PROTOCOL_VERSION, frontend, brokered=True)))
        self.read()

    def hello(self, rank: int) -> None:
        hello = RankHello(
            PROTOCOL_VERSION, rank, LIVES[rank], f"tcp://rank-{rank}", True, group_address=f"ipc://group-{rank}"
        )
        self.back.arrive(codec.encode(hello))

    def handle(self, event: Event) -> None:
        """The machine's door: what comes out must be heard by those for whom it is."""
        for effect in self.machine.handle(event, self.now):
            match effect:
                case ToRanks(message):
                    said_well(message, self._to_ranks)
                    self.said.append(message)
                case ToFrontends(message):
                    said_well(message, self._to_frontends)
                    self.said.append(message)
                case Note(text):
                    assert "\n" not in text

    def read(self) -> None:
        """As the process does: read all, and do what is due."""
        self.said.clear()
        self._front_inbox.read()
        self._inbox.read(float("inf"))
        self.pass_time()
        if self.now >= self.machine.deadline:
            self.handle(Tick())

    def machines(self) -> list[Any]:
        return [self.machine, self._front_inbox, self._inbox]


class StrangersTarget(CoordinatorTarget):
    """Strangers, who do not know any life's number, talk to the coordinator; the real ones stay known exactly."""

    def check(self) -> None:
        """All four ranks are members with the loads that they report, and the wave is theirs."""
        self.said.clear()
        for rank, life in enumerate(LIVES):
            load = Load(waiting=rank + 1, slots=8)
            self.back.arrive(codec.encode(RankReport(rank, life, 2**40, 0, False, load, {FRONTENDS[0]: 7})))
        self.front.arrive(codec.encode(SendNotice(FRONTENDS[0], [], 7)))
        self._front_inbox.read()
        self._inbox.read(float("inf"))
        for _ in range(3):
            self.now += 5.0
            self.handle(Tick())
        members = [message for message in self.said if isinstance(message, Members)][-1]
        view = [message for message in self.said if isinstance(message, LoadView)][-1]
        assert [(member.rank, member.incarnation) for member in members.members] == list(enumerate(LIVES))
        assert view.ranks is not None
        assert [entry.load.waiting for entry in view.ranks] == [1, 2, 3, 4]
        assert view.heard[FRONTENDS[0]] == 7
        assert (view.wave, view.suspension.number) == (0, 0)


class FromStrangeRanks(StrangersTarget):
    """What is pushed to the ranks' socket by whoever reaches it."""

    name = "coordinator-ranks-strangers"
    corpus = "rank-to-coordinator"
    kinds = classes_of("rank → coordinator")
    known = (0, 1, 2, 3, 4, 99, 98)

    def feed(self, frame: bytes) -> None:
        more = [b"more"] if self.draw.random() < 0.03 else []
        self.back.arrive(frame, *more)
        self.read()


class FromRanks(CoordinatorTarget):
    """The same from those who know the lives' numbers: nothing need be right, all must go on."""

    name = "coordinator-ranks"
    corpus = "rank-to-coordinator"
    kinds = classes_of("rank → coordinator")
    known = (0, 1, 2, 3, *LIVES, *FRONTENDS)
    parties = REAL_RANKS
    feed = FromStrangeRanks.feed


class FromFrontends(CoordinatorTarget):
    """What is sent to the front-ends' socket, subscriptions among it. Who is present may ask for 65,536 ranks."""

    largest = 300_000
    name = "coordinator-front-ends"
    corpus = "front-end-to-coordinator"
    kinds = classes_of("front-end → coordinator")
    known = (0, 1, 2, 3, *LIVES, *FRONTENDS, 103)
    parties = [*REAL_FRONTENDS, *({**one, **REAL_RANKS[0]} for one in REAL_FRONTENDS)]

    def feed(self, frame: bytes) -> None:
        draw = self.draw.random()
        if draw < 0.02:
            frontend = self.draw.choice((*FRONTENDS, 103, 2**62))
            frame = self.draw.choice((b"\x00", b"\x01")) + codec.frontend_topic(frontend)
        self.front.arrive(frame, *([b"more"] if draw > 0.97 else []))
        self.read()


class RankSubscriptions(StrangersTarget):
    """Topics of rank lives: who is connected, and who is not any more."""

    name = "coordinator-subscriptions"
    corpus = "subscriptions"

    def begin(self) -> None:
        super().begin()
        self._there: list[tuple[int, int]] = []

    def feed(self, frame: bytes) -> None:
        life = codec.read_rank_topic(frame)
        codec.read_frontend_topic(frame)
        if life is None or life[1] in LIVES:
            self.handle(RankSubscribed())
        else:
            self.handle(RankSubscribed(*life))
            self._there.append(life)
        # Whoever is connected ends: ZeroMQ says so of every connection.
        if len(self._there) > 50:
            self.handle(RankGone(*self._there.pop(self.draw.randrange(len(self._there)))))
        self.read()
