"""A rank's sockets, and a front-end that does not read."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import RankReport, WaveComplete
from paceline.core.rank.events import FrontendGone, FrontendSaid
from paceline.core.requests import AbortRequests, Output, Outputs
from paceline.net.rank import OUTPUTS_QUEUED, RankTransport
from paceline.net.sockets import SEND_QUEUE_MESSAGES
from tests.net.peers import context
from tests.pace import stretched

RANK, LIFE, FRONTEND = 0, 7, 9
STEPS = 4 * OUTPUTS_QUEUED
REPORTS = 2 * SEND_QUEUE_MESSAGES
TEXT = "x" * 2000
"""Large enough that the system's own buffers hold a few hundred."""


class Front:
    """A front-end's socket, which reads nothing by itself."""

    def __init__(self, folder: Path, zmq_context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.reports = zmq_context.socket(zmq.PULL)
        self.reports.rcvhwm = 1
        self.reports.bind(f"ipc://{folder}/o")
        self.transport = RankTransport(RANK, LIFE, f"ipc://{folder}/r", f"ipc://{folder}/b", f"ipc://{folder}/o")
        self.transport.start()
        self.socket = zmq_context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, FRONTEND.to_bytes(8, "little"))
        self.socket.rcvhwm = 1
        self.socket.connect(self.transport.address)
        self.socket.send(codec.encode(AbortRequests([1])))
        assert self.next_event() == FrontendSaid(FRONTEND, AbortRequests([1]))

    def next_event(self) -> object:
        return self.transport.inbox.get(timeout=10.0)

    def steps(self, count: int) -> None:
        for step in range(count):
            outputs = [Output(request, [step], TEXT) for request in (1, 2)]
            self.transport.send_frontend(FRONTEND, Outputs(RANK, LIFE, outputs))

    def backlog(self) -> int:
        """Messages that wait, once all has been sent or put there."""
        until = time.monotonic() + stretched(10.0)
        while self.transport._outbox:
            assert time.monotonic() < until
        return sum(len(backlog) for backlog in self.transport._backlogs.values())


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    with context() as zmq_context:
        front = Front(tmp_path, zmq_context)
        yield front
        front.transport.close()


def test_who_does_not_read_gets_all_of_it_later(front: Front) -> None:
    front.steps(STEPS)
    assert 0 < front.backlog() < 50
    decode = codec.outputs().decode
    got: dict[int, list[int]] = {1: [], 2: []}
    while any(len(tokens) < STEPS for tokens in got.values()):
        assert front.socket.poll(stretched(10) * 1000), f"only {[len(tokens) for tokens in got.values()]} tokens came"
        for output in decode(front.socket.recv()).outputs:
            got[output.request] += output.token_ids
            assert output.text == TEXT * len(output.token_ids)
    assert got == {1: list(range(STEPS)), 2: list(range(STEPS))}
    front.steps(3)
    assert [len(decode(front.socket.recv()).outputs) for _ in range(3)] == [2, 2, 2]
    assert front.backlog() == 0
    with pytest.raises(queue.Empty):
        front.transport.inbox.get_nowait()


def test_a_coordinator_that_does_not_read_gets_the_last_word_later(front: Front) -> None:
    pull = front.reports
    for step in range(REPORTS):
        front.transport.send_coordinator(RankReport(RANK, LIFE, step, 0, False, Load()))
        front.transport.send_coordinator(WaveComplete(RANK, LIFE, step))
    front.backlog()
    decode, got = codec.from_rank().decode, 0
    last: dict[type, object] = {}
    while len(last) < 2 or last[WaveComplete] != WaveComplete(RANK, LIFE, REPORTS - 1):
        assert pull.poll(stretched(10) * 1000), f"the last word did not come: {last}"
        message = decode(pull.recv())
        last[type(message)] = message
        got += 1
    assert last[RankReport] == RankReport(RANK, LIFE, REPORTS - 1, 0, False, Load())
    assert got < 2 * REPORTS


def test_who_dies_without_having_read_is_gone(front: Front) -> None:
    front.steps(STEPS)
    assert front.backlog() > 0
    front.socket.close(linger=0)
    assert front.next_event() == FrontendGone(FRONTEND)
    until = time.monotonic() + stretched(10.0)
    while front.backlog():
        assert time.monotonic() < until
