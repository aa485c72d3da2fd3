"""The coordinator's two inboxes on real sockets: what is left out, what is kept in order, what is bounded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from paceline.core import codec
from paceline.core.binding import Ask, Descriptor, SendNotice, Withdraw
from paceline.core.coordinator import events
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    FromFrontend,
    FromRank,
    FrontendHello,
    NodeHello,
    RankFailed,
    RankReport,
    Scaling,
    StartWave,
    WakeNotice,
)
from paceline.net.coordinator import HANDLED_AT_ONCE, LEAST_KEPT, FrontendInbox, RankInbox, reports_kept
from paceline.net.links import BadFrames
from paceline.net.sockets import MESSAGES_A_TURN, open_socket
from tests.pace import stretched

DEADLINE_S = 10.0
FRONTEND = 5


class Pair:
    """A socket of the other side, the inbox's own, and what was handled."""

    def __init__(self, inbox_kind: int, kind: int) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox_socket = open_socket(self.context, inbox_kind, max_bytes=1 << 20, bind="inproc://inbox")
        self.socket = open_socket(self.context, kind, max_bytes=1 << 20, connect="inproc://inbox")
        self.bad_frames = BadFrames(logging.getLogger("test"), "a socket")
        self.events: list[events.Event] = []
        self.turn: Callable[[], None]

    def read(self, count: int) -> list[object]:
        """Read until so much was handled or found to be bad; returns messages and other events in order."""
        until = time.monotonic() + stretched(DEADLINE_S)
        while len(self.handled()) + self.bad_frames.counts.total() < count:
            assert time.monotonic() < until, f"{len(self.handled())} of {count} came"
            self.turn()
        return self.handled()

    def handled(self) -> list[object]:
        found: list[object] = []
        for event in self.events:
            match event:
                case events.RanksReported(several) | events.FrontendsSaid(several):
                    found += several
                case events.RankSaid(message) | events.FrontendSaid(message):
                    found.append(message)
                case _:
                    found.append(event)
        return found


# Ranks --------------------------------------------------------------------------------------------
class Ranks(Pair):
    def __init__(self, *, every_report: bool) -> None:
        super().__init__(zmq.PULL, zmq.PUSH)
        self.inbox = RankInbox(self.inbox_socket, self.bad_frames, self.events.append, every_report=every_report)
        self.turn = lambda: self.inbox.read(time.monotonic() + 1.0)


@pytest.fixture(params=[True, False], ids=["lockstep", "independent"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(every_report=request.param)
    yield ranks
    ranks.context.destroy(linger=0)


def report(step: int, rank: int = 0) -> RankReport:
    return RankReport(rank, 1, step, 0, False, Load(waiting=step))


@pytest.mark.parametrize("ranks", [True], indirect=True)
def test_in_lockstep_every_report_is_handled_in_batches(ranks: Ranks) -> None:
    sent = [report(step) for step in range(3 * HANDLED_AT_ONCE + 1)]
    for message in sent:
        ranks.socket.send(codec.encode(message))
    assert ranks.read(len(sent)) == sent
    assert (
        max(len(event.reports) for event in ranks.events if isinstance(event, events.RanksReported)) <= HANDLED_AT_ONCE
    )


@pytest.mark.parametrize("ranks", [False], indirect=True)
def test_of_an_independent_rank_the_last_report_counts(ranks: Ranks) -> None:
    for step in range(50):
        ranks.socket.send(codec.encode(report(step)))
    until = time.monotonic() + stretched(DEADLINE_S)
    while not ranks.handled() or ranks.handled()[-1] != report(49):
        assert time.monotonic() < until
        ranks.inbox.read(time.monotonic() + 1.0)
    assert len(ranks.handled()) < 50


def test_what_else_a_rank_says_is_heard_in_its_place(ranks: Ranks) -> None:
    sent: list[FromRank] = [report(1), StartWave(0, 1, 5), report(2)]
    for message in sent:
        ranks.socket.send(codec.encode(message))
    assert ranks.read(3) == sent


def test_bad_frames_between_reports_are_counted_and_lose_nothing(ranks: Ranks) -> None:
    good = [report(1), report(2, rank=1)]
    first = codec.encode(good[0])
    ranks.socket.send(first)
    ranks.socket.send(codec.encode(report(1, rank=3))[:-1])
    ranks.socket.send_multipart([first, first])
    ranks.socket.send(b"\xff nonsense")
    ranks.socket.send(codec.encode(good[1]))
    assert ranks.read(5) == good
    assert ranks.bad_frames.counts == {"frames": 1, "malformed": 2}


def test_what_waits_unread_is_bounded_over_all_ranks() -> None:
    assert reports_kept(2) * 2 == reports_kept(64) * 64
    assert reports_kept(1_000_000) == LEAST_KEPT


def test_a_node_is_heard_only_while_it_is_present(ranks: Ranks) -> None:
    hello = NodeHello(PROTOCOL_VERSION, 7, [0], Scaling(4, 1, 1))
    failed = RankFailed(7, 3, 0)
    for message in (hello, failed):
        ranks.socket.send(codec.encode(message))
    assert ranks.read(2) == []
    assert ranks.bad_frames.counts == {"no-presence": 2}
    ranks.inbox.nodes.add(7)
    ranks.socket.send(codec.encode(hello))
    assert ranks.read(3) == [hello]


# Front-ends ---------------------------------------------------------------------------------------
class FrontendEnd(Pair):
    def __init__(self) -> None:
        super().__init__(zmq.XPUB, zmq.XSUB)
        self.turn = FrontendInbox(self.inbox_socket, self.bad_frames, self.events.append).read

    def appear(self) -> None:
        """The front-end's presence appears, and is no event of the test."""
        self.socket.send(b"\x01" + codec.frontend_topic(FRONTEND))
        self.read(1)
        self.events.clear()

    def send(self, *messages: FromFrontend) -> None:
        for message in messages:
            self.socket.send(codec.encode(message))


@pytest.fixture
def frontend() -> Iterator[FrontendEnd]:
    frontend = FrontendEnd()
    yield frontend
    frontend.context.destroy(linger=0)


def ask(request: int) -> Ask:
    return Ask(FRONTEND, request, 0, [Descriptor(request, 10, 10)])


def test_what_is_said_of_requests_is_handled_together(frontend: FrontendEnd) -> None:
    frontend.appear()
    said = [ask(number) for number in range(2 * MESSAGES_A_TURN)]
    frontend.send(*said)
    assert frontend.read(len(said)) == said
    assert len(frontend.events) < len(said)


def test_what_else_a_frontend_says_is_heard_in_its_place(frontend: FrontendEnd) -> None:
    frontend.appear()
    said: list[FromFrontend] = [
        ask(1),
        WakeNotice(FRONTEND, 0, 3),
        SendNotice(FRONTEND, []),
        Withdraw(FRONTEND, 2, [1]),
    ]
    frontend.send(*said)
    assert frontend.read(len(said)) == said


def test_coming_and_going_too(frontend: FrontendEnd) -> None:
    topic = codec.frontend_topic(FRONTEND)
    frontend.socket.send(b"\x01" + topic)
    frontend.send(ask(1))
    frontend.socket.send(b"\x00" + topic)
    assert frontend.read(3) == [events.FrontendSubscribed(), ask(1), events.FrontendGone(FRONTEND)]


def test_a_hello_counts_only_while_its_sender_is_present(frontend: FrontendEnd) -> None:
    topic, hello = codec.frontend_topic(FRONTEND), FrontendHello(PROTOCOL_VERSION, FRONTEND, brokered=True)
    frontend.send(hello)
    frontend.socket.send(b"\x01" + topic)
    frontend.send(hello)
    frontend.socket.send(b"\x00" + topic)
    frontend.send(hello)
    assert frontend.read(5) == [events.FrontendSubscribed(), hello, events.FrontendGone(FRONTEND)]
    assert frontend.bad_frames.counts == {"no-presence": 2}


def test_nobody_is_heard_under_an_invented_name(frontend: FrontendEnd) -> None:
    """What a front-end says is kept until it has gone, and of this one nobody would learn that."""
    frontend.appear()
    invented = FRONTEND + 1
    said = [SendNotice(invented, [], 1), Ask(invented, 1, 0, []), WakeNotice(invented, 0, 0), Withdraw(invented, 1, [])]
    frontend.send(*said, ask(1))
    assert frontend.read(len(said) + 1) == [ask(1)]
    assert frontend.bad_frames.counts == {"no-presence": len(said)}


def test_bad_frames_of_a_frontend_lose_nothing_else(frontend: FrontendEnd) -> None:
    frontend.appear()
    frontend.send(ask(1))
    frontend.socket.send_multipart([codec.encode(ask(2)), b"more"])
    frontend.socket.send(codec.encode(ask(3))[:-1])
    frontend.send(ask(4))
    assert frontend.read(4) == [ask(1), ask(4)]
    assert frontend.bad_frames.counts == {"frames": 1, "malformed": 1}
