"""The coordinator's inbox for front-ends on real sockets: what is handled together, and that nothing changes places."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import zmq

from paceline.core import codec
from paceline.core.coordinator.events import Event, FrontendGone, FrontendSaid, FrontendsSaid, FrontendSubscribed
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Descriptor,
    FromFrontend,
    FrontendHello,
    SendNotice,
    WakeNotice,
    Withdraw,
)
from paceline.net.coordinator import FrontendInbox
from paceline.net.links import BadFrames
from paceline.net.sockets import MESSAGES_A_TURN, open_socket
from tests.pace import stretched

DEADLINE_S = 10.0
FRONTEND = 5


class Pair:
    """A front-end's socket, an inbox, and what was handled."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox_socket = open_socket(self.context, zmq.XPUB, max_bytes=1 << 20, bind="inproc://inbox")
        self.frontend = open_socket(self.context, zmq.XSUB, max_bytes=1 << 20, connect="inproc://inbox")
        self.bad_frames = BadFrames(logging.getLogger("test"), "the front-ends' socket")
        self.events: list[Event] = []
        self.inbox = FrontendInbox(self.inbox_socket, self.bad_frames, self.events.append)

    def appear(self) -> None:
        """The front-end's presence appears, and is no event of the test."""
        self.frontend.send(b"\x01" + codec.frontend_topic(FRONTEND))
        self.read(1)
        self.events.clear()

    def send(self, *messages: FromFrontend) -> None:
        for message in messages:
            self.frontend.send(codec.encode(message))

    def read(self, count: int) -> list[object]:
        """Read until so much was handled or found to be garbage; returns messages and other events in order."""
        until = time.monotonic() + stretched(DEADLINE_S)
        while len(self.handled()) + self.bad_frames.counts.total() < count:
            assert time.monotonic() < until, f"{len(self.handled())} of {count} came"
            self.inbox.read()
        return self.handled()

    def handled(self) -> list[object]:
        found: list[object] = []
        for event in self.events:
            if isinstance(event, FrontendsSaid):
                found += event.messages
            else:
                found.append(event.message if isinstance(event, FrontendSaid) else event)
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.context.destroy(linger=0)


def ask(request: int) -> Ask:
    return Ask(FRONTEND, request, 0, [Descriptor(request, 10, 10)])


def test_what_is_said_of_requests_is_handled_together(pair: Pair) -> None:
    pair.appear()
    said = [ask(number) for number in range(2 * MESSAGES_A_TURN)]
    pair.send(*said)
    assert pair.read(len(said)) == said
    assert len(pair.events) < len(said)


def test_what_else_is_said_is_heard_in_its_place(pair: Pair) -> None:
    pair.appear()
    said: list[FromFrontend] = [
        ask(1),
        WakeNotice(FRONTEND, 0, 3),
        SendNotice(FRONTEND, []),
        Withdraw(FRONTEND, 2, [1]),
    ]
    pair.send(*said)
    assert pair.read(len(said)) == said


def test_coming_and_going_too(pair: Pair) -> None:
    topic = codec.frontend_topic(FRONTEND)
    pair.frontend.send(b"\x01" + topic)
    pair.send(ask(1))
    pair.frontend.send(b"\x00" + topic)
    assert pair.read(3) == [FrontendSubscribed(), ask(1), FrontendGone(FRONTEND)]


def test_a_hello_counts_only_while_its_sender_is_present(pair: Pair) -> None:
    topic, hello = codec.frontend_topic(FRONTEND), FrontendHello(PROTOCOL_VERSION, FRONTEND, brokered=True)
    pair.send(hello)
    pair.frontend.send(b"\x01" + topic)
    pair.send(hello)
    pair.frontend.send(b"\x00" + topic)
    pair.send(hello)
    assert pair.read(5) == [FrontendSubscribed(), hello, FrontendGone(FRONTEND)]
    assert pair.bad_frames.counts == {"no-presence": 2}


def test_nobody_is_heard_under_an_invented_name(pair: Pair) -> None:
    """What a front-end says is kept until it has gone, and of this one nobody would learn that."""
    pair.appear()
    invented = FRONTEND + 1
    said = [SendNotice(invented, [], 1), Ask(invented, 1, 0, []), WakeNotice(invented, 0, 0), Withdraw(invented, 1, [])]
    pair.send(*said, ask(1))
    assert pair.read(len(said) + 1) == [ask(1)]
    assert pair.bad_frames.counts == {"no-presence": len(said)}


def test_garbage_loses_nothing_else(pair: Pair) -> None:
    pair.appear()
    pair.send(ask(1))
    pair.frontend.send_multipart([codec.encode(ask(2)), b"more"])
    pair.frontend.send(codec.encode(ask(3))[:-1])
    pair.send(ask(4))
    assert pair.read(4) == [ask(1), ask(4)]
    assert pair.bad_frames.counts == {"frames": 1, "malformed": 1}
