"""The coordinator's inbox on real sockets: what is left out, what is kept in order, what is bounded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import zmq

from paceline.core import codec
from paceline.core.coordinator.events import Event, RankSaid, RanksReported
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, FromRank, NodeHello, RankFailed, RankReport, Scaling, StartWave
from paceline.net.coordinator import HANDLED_AT_ONCE, LEAST_KEPT, RankInbox, reports_kept
from paceline.net.links import BadFrames
from paceline.net.sockets import open_socket
from tests.pace import stretched

DEADLINE_S = 10.0


class Pair:
    """A rank's socket, an inbox, and what was handled."""

    def __init__(self, *, every_report: bool) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox_socket = open_socket(self.context, zmq.PULL, max_bytes=1 << 20, bind="inproc://inbox")
        self.rank = open_socket(self.context, zmq.PUSH, max_bytes=1 << 20, connect="inproc://inbox")
        self.bad_frames = BadFrames(logging.getLogger("test"), "the ranks' socket")
        self.events: list[Event] = []
        self.inbox = RankInbox(self.inbox_socket, self.bad_frames, self.events.append, every_report=every_report)

    def read(self, messages: int) -> list[FromRank]:
        """Read until so many messages were handled or found to be garbage; returns the handled ones in order."""
        until = time.monotonic() + stretched(DEADLINE_S)
        while len(self.handled()) + self.bad_frames.counts.total() < messages:
            assert time.monotonic() < until, f"{len(self.handled())} of {messages} came"
            self.inbox.read(time.monotonic() + 1.0)
        return self.handled()

    def handled(self) -> list[FromRank]:
        found: list[FromRank] = []
        for event in self.events:
            found += event.reports if isinstance(event, RanksReported) else []
            found += [event.message] if isinstance(event, RankSaid) else []
        return found

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture(params=[True, False], ids=["lockstep", "independent"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(every_report=request.param)
    yield pair
    pair.close()


def report(step: int, rank: int = 0) -> RankReport:
    return RankReport(rank, 1, step, 0, False, Load(waiting=step))


@pytest.mark.parametrize("pair", [True], indirect=True)
def test_in_lockstep_every_report_is_handled_in_batches(pair: Pair) -> None:
    sent = [report(step) for step in range(3 * HANDLED_AT_ONCE + 1)]
    for message in sent:
        pair.rank.send(codec.encode(message))
    assert pair.read(len(sent)) == sent
    assert max(len(event.reports) for event in pair.events if isinstance(event, RanksReported)) <= HANDLED_AT_ONCE


@pytest.mark.parametrize("pair", [False], indirect=True)
def test_of_an_independent_rank_the_last_report_counts(pair: Pair) -> None:
    for step in range(50):
        pair.rank.send(codec.encode(report(step)))
    until = time.monotonic() + stretched(DEADLINE_S)
    while not pair.handled() or pair.handled()[-1] != report(49):
        assert time.monotonic() < until
        pair.inbox.read(time.monotonic() + 1.0)
    assert len(pair.handled()) < 50


def test_what_else_a_rank_says_is_heard_in_its_place(pair: Pair) -> None:
    sent: list[FromRank] = [report(1), StartWave(0, 1, 5), report(2)]
    for message in sent:
        pair.rank.send(codec.encode(message))
    assert pair.read(3) == sent


def test_garbage_between_reports_is_counted_and_loses_nothing(pair: Pair) -> None:
    good = [report(1), report(2, rank=1)]
    first = codec.encode(good[0])
    pair.rank.send(first)
    pair.rank.send(codec.encode(report(1, rank=3))[:-1])
    pair.rank.send_multipart([first, first])
    pair.rank.send(b"\xff nonsense")
    pair.rank.send(codec.encode(good[1]))
    assert pair.read(5) == good
    assert pair.bad_frames.counts == {"frames": 1, "malformed": 2}


def test_what_waits_unread_is_bounded_over_all_ranks() -> None:
    assert reports_kept(2) * 2 == reports_kept(64) * 64
    assert reports_kept(1_000_000) == LEAST_KEPT


def test_a_node_is_heard_only_while_it_is_present(pair: Pair) -> None:
    """An invented one could give the deployment another size."""
    hello = NodeHello(PROTOCOL_VERSION, 7, [0], Scaling(4, 1, 1))
    failed = RankFailed(7, 3, 0)
    for message in (hello, failed):
        pair.rank.send(codec.encode(message))
    assert pair.read(2) == []
    assert pair.bad_frames.counts == {"no-presence": 2}
    pair.inbox.nodes.add(7)
    pair.rank.send(codec.encode(hello))
    assert pair.read(3) == [hello]
