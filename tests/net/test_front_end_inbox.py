"""The coordinator's inbox for front-ends on real sockets: what is handled together, and that nothing changes places."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import zmq

from paceline.core import codec
from paceline.core.coordinator.events import (
    Event,
    FrontEndGone,
    FrontEndSaid,
    FrontEndsSaid,
    FrontEndSubscribed,
)
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Ask,
    Descriptor,
    FromFrontEnd,
    FrontEndHello,
    SendNotice,
    WakeNotice,
    Withdraw,
)
from paceline.net.coordinator import READ_AT_ONCE, FrontEndInbox
from paceline.net.links import Garbage
from paceline.net.sockets import open_socket

DEADLINE_S = 10.0
FRONT_END = 5


class Pair:
    """A front-end's socket, an inbox, and what was handled."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox_socket = open_socket(self.context, zmq.XPUB, max_bytes=1 << 20, bind="inproc://inbox")
        self.front_end = open_socket(self.context, zmq.XSUB, max_bytes=1 << 20, connect="inproc://inbox")
        self.garbage = Garbage(logging.getLogger("test"), "the front-ends' socket")
        self.events: list[Event] = []
        self.inbox = FrontEndInbox(self.inbox_socket, self.garbage, self.events.append)

    def appear(self) -> None:
        """The front-end's presence appears, and is no event of the test."""
        self.front_end.send(b"\x01" + codec.front_end_topic(FRONT_END))
        self.read(1)
        self.events.clear()

    def send(self, *messages: FromFrontEnd) -> None:
        for message in messages:
            self.front_end.send(codec.encode(message))

    def read(self, count: int) -> list[object]:
        """Read until so much was handled or found to be garbage; returns messages and other events in order."""
        until = time.monotonic() + DEADLINE_S
        while len(self.handled()) + self.garbage.counts.total() < count:
            assert time.monotonic() < until, f"{len(self.handled())} of {count} came"
            self.inbox.read()
        return self.handled()

    def handled(self) -> list[object]:
        found: list[object] = []
        for event in self.events:
            if isinstance(event, FrontEndsSaid):
                found += event.messages
            else:
                found.append(event.message if isinstance(event, FrontEndSaid) else event)
        return found


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.context.destroy(linger=0)


def ask(request: int) -> Ask:
    return Ask(FRONT_END, request, 0, [Descriptor(request, 10, 10)])


def test_what_is_said_of_requests_is_handled_together(pair: Pair) -> None:
    pair.appear()
    said = [ask(number) for number in range(2 * READ_AT_ONCE)]
    pair.send(*said)
    assert pair.read(len(said)) == said
    assert len(pair.events) < len(said)


def test_what_else_is_said_is_heard_in_its_place(pair: Pair) -> None:
    pair.appear()
    said: list[FromFrontEnd] = [
        ask(1),
        WakeNotice(FRONT_END, 0, 3),
        SendNotice(FRONT_END, []),
        Withdraw(FRONT_END, 2, [1]),
    ]
    pair.send(*said)
    assert pair.read(len(said)) == said


def test_coming_and_going_too(pair: Pair) -> None:
    topic = codec.front_end_topic(FRONT_END)
    pair.front_end.send(b"\x01" + topic)
    pair.send(ask(1))
    pair.front_end.send(b"\x00" + topic)
    assert pair.read(3) == [FrontEndSubscribed(), ask(1), FrontEndGone(FRONT_END)]


def test_a_hello_counts_only_while_its_sender_is_present(pair: Pair) -> None:
    topic, hello = codec.front_end_topic(FRONT_END), FrontEndHello(PROTOCOL_VERSION, FRONT_END, brokered=True)
    pair.send(hello)
    pair.front_end.send(b"\x01" + topic)
    pair.send(hello)
    pair.front_end.send(b"\x00" + topic)
    pair.send(hello)
    assert pair.read(5) == [FrontEndSubscribed(), hello, FrontEndGone(FRONT_END)]
    assert pair.garbage.counts == {"no-presence": 2}


def test_nobody_is_heard_under_an_invented_name(pair: Pair) -> None:
    """What a front-end says is kept until it has gone, and of this one nobody would learn that."""
    pair.appear()
    invented = FRONT_END + 1
    said = [SendNotice(invented, [], 1), Ask(invented, 1, 0, []), WakeNotice(invented, 0, 0), Withdraw(invented, 1, [])]
    pair.send(*said, ask(1))
    assert pair.read(len(said) + 1) == [ask(1)]
    assert pair.garbage.counts == {"no-presence": len(said)}


def test_garbage_loses_nothing_else(pair: Pair) -> None:
    pair.appear()
    pair.send(ask(1))
    pair.front_end.send_multipart([codec.encode(ask(2)), b"more"])
    pair.front_end.send(codec.encode(ask(3))[:-1])
    pair.send(ask(4))
    assert pair.read(4) == [ask(1), ask(4)]
    assert pair.garbage.counts == {"frames": 1, "malformed": 1}
