"""A rank's two sockets, what its peers put into an agreement, and its machine behind them."""

from __future__ import annotations

import random
import struct
from typing import Any

from paceline.core import codec
from paceline.core.messages import PROTOCOL_VERSION, Admit, Identify
from paceline.core.rank import events
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import AUTO, REDUCTIONS, integers, outcome
from paceline.core.requests import AddRequest, SamplingParams
from paceline.engines.timed import CostModel
from paceline.sim.engine import VirtualEngine
from tests.fuzz.corpus import classes_of
from tests.fuzz.target import Target, said_well

RANK, LIFE = 2, 2**40 + 2
FRONTENDS = [2**41, 2**41 + 1]


class RankTarget(Target):
    """One rank that is ready, with an engine that computes nothing; in lockstep its peers do as it does."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._from_rank, self._outputs = codec.from_rank(), codec.outputs()

    def begin(self) -> None:
        lockstep = self.draw.random() < 0.6
        group = "ipc://group" if lockstep and self.draw.random() < 0.5 else ""
        self.machine = Rank(
            RANK, LIFE, "tcp://rank", lockstep=lockstep, sync_interval=3, group_address=group, prefill_quota=AUTO
        )
        self.engine = VirtualEngine(CostModel(), slots=8, budget=512)
        self.handle(events.Loaded())
        self.handle(events.CoordinatorSaid(Identify(PROTOCOL_VERSION, 1)))
        self.handle(events.CoordinatorSaid(Admit(RANK, LIFE, 0)))
        assert self.machine.phase is events.Phase.READY

    def handle(self, event: events.Event) -> None:
        """The machine's door, and what follows from it at once."""
        for effect in self.machine.handle(event, self.now):
            match effect:
                case events.ToCoordinator(message):
                    said_well(message, self._from_rank)
                case events.ToFrontend(frontend, outputs):
                    frontend.to_bytes(8, "little")
                    said_well(outputs, self._outputs)
                case events.Take(key, request):
                    self.engine.add(key, request)
                case events.Drop(key):
                    self.engine.abort(key)
                case events.Step(quota):
                    self.engine.plan(quota)
                    self.handle(self.engine.step())
                case events.DummyStep():
                    self.handle(events.Stepped((), self.engine.load(), self.engine.has_work()))
                case events.Agree():
                    self.agree(effect)
                case events.FormGroup(generation):
                    self.handle(events.EpochEnded() if self.draw.random() < 0.3 else events.Formed(generation))
                case events.Again():
                    self.turn()

    def agree(self, own: events.Agree) -> None:
        self.handle(outcome(integers(own)))

    def turn(self) -> None:
        self.pass_time()
        self.handle(events.Turn(self.engine.load(), self.engine.has_work()))

    def machines(self) -> list[Any]:
        return [self.machine]


class FromCoordinator(RankTarget):
    """The coordinator's broadcasts."""

    name = "rank-broadcasts"
    corpus = "coordinator-to-ranks"
    kinds = classes_of("coordinator → ranks")
    known = (0, 1, 2, 3, RANK, LIFE)
    parties = ({"rank": RANK, "incarnation": LIFE},)
    decode = staticmethod(codec.to_rank().decode)

    def take(self, message: Any) -> None:
        self.handle(events.CoordinatorSaid(message))
        self.turn()


class Requests(RankTarget):
    """What front-ends send, of whom some end; those that stay number their requests."""

    name = "rank-requests"
    corpus = "front-end-to-rank"
    kinds = classes_of("front-end → rank")
    known = (0, 1, 2, 3, RANK, LIFE, 2**62)
    parties = ({"incarnation": LIFE, "max_tokens": 2, "wave": 0}, {"incarnation": LIFE})
    decode = staticmethod(codec.request().decode)

    def take(self, message: Any) -> None:
        draw = self.draw
        frontend = draw.choice((*FRONTENDS, draw.getrandbits(63)))
        self.handle(events.FrontendSaid(frontend, message))
        self.turn()
        if frontend not in FRONTENDS or draw.random() < 0.01:
            self.handle(events.FrontendGone(frontend))


class Agreements(RankTarget):
    """What comes out of an agreement in which a peer puts anything."""

    name = "rank-agreements"
    corpus = "collective"

    def begin(self) -> None:
        super().begin()
        self._row = b""
        self._sent = 0

    def feed(self, frame: bytes) -> None:
        self._row = frame[13:]
        # Where a peer has it suspended, it holds what it gets.
        if not self.engine.has_work() and not self.machine.requests.kept_back:
            self._sent += 1
            request = AddRequest(self._sent, self._sent, LIFE, 0, [1, 2, 3], SamplingParams(2))
            self.handle(events.FrontendSaid(FRONTENDS[0], request))
        for _ in range(4):
            self.turn()

    def agree(self, own: events.Agree) -> None:
        mine = integers(own)
        row = self._row[: 8 * len(mine)].ljust(8 * len(mine), self.draw.choice((b"\x00", b"\x00", b"\xff", b"\x7f")))
        theirs = struct.unpack(f"<{len(mine)}q", row)
        try:
            agreed = outcome(
                [max(a, b) if how == "max" else a + b for a, b, how in zip(mine, theirs, REDUCTIONS, strict=True)]
            )
        except ValueError:
            self.handle(events.EpochEnded())
            return
        self.handle(agreed)
