"""A rank on real sockets: requests, aborts, reports, bad frames, and a step that waits for nobody."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, Admit, Identify, RankHello, RankLeaving, RankReport, WaveComplete
from paceline.core.rank.events import FrontendGone, FrontendSaid
from paceline.core.rank.machine import Rank
from paceline.core.requests import AbortRequests, AddRequest, Output, Outputs, SamplingParams
from paceline.engines.base import EngineSettings
from paceline.engines.timed import CostModel, TimedEngine, word
from paceline.net.rank import OUTPUTS_QUEUED, EngineRank, RankSettings, RankTransport, run_rank
from paceline.net.sockets import SEND_QUEUE_MESSAGES
from paceline.process.spawn import spawn
from paceline.process.supervisor import Failed, Progressed, Ready
from paceline.settings import DeploymentConfig, EngineConfig
from tests.net.peers import Context, context, receive, send_bad_frames, shout_at
from tests.pace import stretched
from tests.serving import wait_until

pytestmark = pytest.mark.slow

FRONTEND = 77


class World:
    """A coordinator's two sockets and a front-end's one, held by the test."""

    def __init__(self, zmq_context: Context, folder: Path) -> None:
        self.broadcasts = zmq_context.socket(zmq.XPUB)
        self.inbox = zmq_context.socket(zmq.PULL)
        self.frontend = zmq_context.socket(zmq.DEALER)
        self.frontend.setsockopt(zmq.ROUTING_ID, FRONTEND.to_bytes(8, "little"))
        self.coordinator_input = f"ipc://{folder}/back-publish"
        self.coordinator_output = f"ipc://{folder}/back-output"
        self.bind = f"ipc://{folder}/rank"
        self.broadcasts.bind(self.coordinator_input)
        self.inbox.bind(self.coordinator_output)

    def admit(self) -> RankHello:
        """Play the coordinator until the rank is ready; returns its last hello."""
        # As the coordinator does, at every hello: what is sent before the rank has subscribed is lost.
        while not (hello := self.until(RankHello)).ready:
            self.broadcasts.send(codec.encode(Admit(hello.rank, hello.incarnation, 0)))
        self.frontend.connect(hello.address)
        return hello

    def until(self, kind: type[Any]) -> Any:
        """The next message of this kind from the rank to the coordinator."""
        decode = codec.from_rank().decode
        while not isinstance(message := decode(receive(self.inbox)[0]), kind):
            pass
        return message

    def add(self, hello: RankHello, request: int, number: int, tokens: int, prompt: int = 4) -> None:
        add = AddRequest(request, number, hello.incarnation, 0, [1] * prompt, SamplingParams(max_tokens=tokens))
        self.frontend.send(codec.encode(add))

    def outputs(self) -> Outputs:
        return codec.outputs().decode(receive(self.frontend)[0])

    def text(self, request: int) -> str:
        text = ""
        while True:
            for output in self.outputs().outputs:
                if output.request == request:
                    text += output.text
                    if output.finish_reason is not None:
                        return text


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with context() as zmq_context:
        yield World(zmq_context, tmp_path)


def start_rank(world: World, engine: str = "timed", **settings: Any) -> tuple[Any, Any]:
    """A rank's process, and where it says how it goes."""
    reader, writer = get_context("spawn").Pipe(duplex=False)
    config = DeploymentConfig(engine=EngineConfig(engine=engine, **settings))
    about = RankSettings(config, 0, world.bind, world.coordinator_input, world.coordinator_output)
    process = spawn("rank 0", run_rank, {"settings": about, "status": writer})
    writer.close()
    return process, reader


@contextlib.contextmanager
def rank_process(world: World, step_ms: str = "5") -> Iterator[Any]:
    process, reader = start_rank(world, options={"step_ms": step_ms}, max_num_seqs=4)
    yield process
    process.end()
    process.join(stretched(10))
    process.kill()
    reader.close()


@pytest.fixture
def rank(world: World) -> Iterator[Any]:
    with rank_process(world) as process:
        yield process


def test_serves_requests_in_order(world: World, rank: Any) -> None:
    hello = world.admit()
    assert hello.version == PROTOCOL_VERSION
    world.add(hello, 1, 1, 20)
    assert world.text(1) == "".join(word(index) for index in range(20))


def test_one_message_a_step_for_all_of_a_frontend(world: World, rank: Any) -> None:
    hello = world.admit()
    for request in (1, 2, 3):
        world.add(hello, request, request, 50)
    together = [len(world.outputs().outputs) for _ in range(40)]
    assert together.count(3) > 30


def test_reports_load_before_and_after_steps(world: World, rank: Any) -> None:
    hello = world.admit()
    for request in range(1, 7):
        world.add(hello, request, request, 30, prompt=10)
    reports: list[RankReport] = []
    while not (reports and reports[-1].load.finished == 6):
        reports.append(world.until(RankReport))
    assert any(report.load.waiting and report.load.running for report in reports)
    assert all(report.taken.get(FRONTEND, 0) <= 6 for report in reports)
    last = reports[-1]
    assert last.taken == {FRONTEND: 6}
    assert (last.load.waiting, last.load.running, last.load.prefill_tokens, last.load.kv_used) == (0, 0, 0, 0)
    assert last.load.decode_rate > 0
    assert [report.step for report in reports] == sorted(report.step for report in reports)
    for before, after in itertools.pairwise(reports):
        assert (before.load, before.taken) != (after.load, after.taken)


def test_abort_frees_the_kv(world: World, rank: Any) -> None:
    hello = world.admit()
    world.add(hello, 1, 1, 30_000)
    world.outputs()
    world.frontend.send(codec.encode(AbortRequests([1, 99])))
    while world.until(RankReport).load.kv_used:
        pass


def test_answers_a_new_coordinator(world: World, rank: Any) -> None:
    hello = world.admit()
    world.broadcasts.send(codec.encode(Identify(PROTOCOL_VERSION, 2)))
    again = world.until(RankHello)
    assert (again.ready, again.incarnation, again.address) == (True, hello.incarnation, hello.address)


def test_answers_a_new_coordinator_in_the_midst_of_a_step(world: World) -> None:
    """In lockstep a step can wait for ranks that only the new coordinator can wake."""
    with rank_process(world, step_ms="60000") as process:
        hello = world.admit()
        world.add(hello, 1, 1, 5)
        while not world.until(RankReport).load.waiting:
            pass
        for _ in range(3):
            world.broadcasts.send(codec.encode(Identify(PROTOCOL_VERSION, 2)))
            assert world.until(RankHello).ready
        process.kill()


def test_bad_frames_on_every_socket(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    # Started here and not by the fixture: what a process writes goes where capfd pointed when it began.
    with rank_process(world) as process:
        hello = world.admit()
        send_bad_frames(world.frontend)
        send_bad_frames(world.broadcasts)
        stranger = world.frontend.context.socket(zmq.DEALER)
        stranger.connect(hello.address)
        send_bad_frames(stranger)
        stranger.close()
        shout_at(hello.address)
        world.add(hello, 1, 1, 5)
        assert world.text(1) == "".join(word(index) for index in range(5))
        assert process.is_alive()
    logged = [line for line in capfd.readouterr().err.splitlines() if "dropped a message" in line]
    assert logged
    assert len(logged) == len({line.split("dropped", 1)[1].split(":")[0] for line in logged}), "one line a kind"


def test_it_leaves_in_good_order(world: World, rank: Any) -> None:
    hello = world.admit()
    rank.end()
    assert world.until(RankLeaving).incarnation == hello.incarnation
    rank.join(10)
    assert rank.exitcode == 0


def test_frontend_that_is_gone_costs_nothing(world: World, rank: Any) -> None:
    hello = world.admit()
    world.add(hello, 1, 1, 30_000)
    world.outputs()
    while not world.until(RankReport).load.running:
        pass
    world.frontend.close()
    while (report := world.until(RankReport)).load.running:
        pass
    assert (report.load.waiting, report.load.kv_used) == (0, 0)
    # It may be there all the same, and only its connection new.
    assert report.taken == {FRONTEND: 1}


def test_step_never_waits_for_the_network(tmp_path: Path) -> None:
    """Nobody is at the other end of any socket; the steps go on all the same."""
    engine = TimedEngine(EngineSettings(), CostModel(step_ms=0, prefill_ms=0, decode_ms=0))
    transport = RankTransport(0, 1, f"ipc://{tmp_path}/rank", f"ipc://{tmp_path}/nobody", f"ipc://{tmp_path}/neither")
    machine = Rank(0, 1, transport.address)
    running = EngineRank(engine, machine, transport)
    thread = threading.Thread(target=running.run)
    thread.start()
    with context() as zmq_context:
        frontend = zmq_context.socket(zmq.DEALER)
        frontend.setsockopt(zmq.ROUTING_ID, FRONTEND.to_bytes(8, "little"))
        frontend.rcvhwm = 1
        frontend.connect(transport.address)
        add = AddRequest(1, 1, 1, 0, [1], SamplingParams(max_tokens=200_000))
        frontend.send(codec.encode(add))
        # It never reads; far more is made than any queue holds.
        wait_until(lambda: machine.step > 5000, "steps go on")
    running.stop()
    thread.join(stretched(10))
    assert not thread.is_alive()


def test_engine_that_cannot_be_made_says_why(world: World) -> None:
    process, reader = start_rank(world, options={"step_ms": "x"})
    assert "'x' is no number" in wait_for(reader, Failed).why
    process.join(stretched(10))
    assert process.exitcode == 1
    reader.close()


def test_a_rank_that_loads_ends_wherever_it_is(world: World) -> None:
    """An exception would not come out of everything: in some callbacks it is printed, and the rank goes on."""
    process, reader = start_rank(world, "tests.late_engines:InCallback")
    wait_for(reader, Progressed)
    process.end()
    process.join(stretched(10))
    ended = process.exitcode
    process.kill()
    reader.close()
    assert ended == 0


def wait_for(reader: Any, kind: type[Any]) -> Any:
    while not isinstance(message := reader.recv(), kind):
        assert not isinstance(message, Ready)
    return message


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
        said = self.next_event()
        assert isinstance(said, FrontendSaid)
        assert (said.frontend, said.message) == (FRONTEND, AbortRequests([1]))
        assert said.arrived is not None

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
