"""A rank on real sockets: requests, aborts, reports, garbage, and a step that waits for nobody."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.core import codec
from paceline.core.messages import PROTOCOL_VERSION, Admit, Identify, RankHello, RankLeaving, RankReport
from paceline.core.rank.machine import Rank
from paceline.core.requests import AbortRequests, AddRequest, Outputs, SamplingParams
from paceline.engines.base import EngineSettings
from paceline.engines.timed import CostModel, TimedEngine, word
from paceline.net.rank import EngineRank, RankSettings, RankTransport, run_rank
from paceline.process.spawn import spawn
from paceline.process.supervisor import Failed, Progressed, Ready
from tests.net.peers import Context, context, receive, send_garbage, shout_at
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
        """The next message from the rank to the front-end."""
        return codec.outputs().decode(receive(self.frontend)[0])

    def text(self, request: int) -> str:
        """Read until the request has finished; its text."""
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


@contextlib.contextmanager
def rank_process(world: World, step_ms: str = "5") -> Iterator[Any]:
    reader, writer = get_context("spawn").Pipe(duplex=False)
    settings = RankSettings("timed", EngineSettings(options={"step_ms": step_ms}, max_num_seqs=4), world.bind,
                            world.coordinator_input, world.coordinator_output)  # fmt: skip
    process = spawn("rank 0", run_rank, {"settings": settings, "status": writer})
    writer.close()
    yield process
    process.terminate()
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


def test_garbage_on_every_socket(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    # Started here and not by the fixture: what a process writes goes where capfd pointed when it began.
    with rank_process(world) as process:
        hello = world.admit()
        send_garbage(world.frontend)
        send_garbage(world.broadcasts)
        stranger = world.frontend.context.socket(zmq.DEALER)
        stranger.connect(hello.address)
        send_garbage(stranger)
        stranger.close()
        shout_at(hello.address)
        world.add(hello, 1, 1, 5)
        assert world.text(1) == "".join(word(index) for index in range(5))
        assert process.is_alive()
    logged = [line for line in capfd.readouterr().err.splitlines() if "dropped a message" in line]
    assert logged
    assert len(logged) == len({line.split("dropped", 1)[1].split(":")[0] for line in logged}), "one line a kind"


def test_sigterm_leaves_in_good_order(world: World, rank: Any) -> None:
    hello = world.admit()
    rank.terminate()
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
    reader, writer = get_context("spawn").Pipe(duplex=False)
    settings = RankSettings("timed", EngineSettings(options={"step_ms": "x"}), world.bind,
                            world.coordinator_input, world.coordinator_output)  # fmt: skip
    process = spawn("rank 0", run_rank, {"settings": settings, "status": writer})
    writer.close()
    assert "'x' is no number" in wait_for(reader, Failed).why
    process.join(stretched(10))
    assert process.exitcode == 1
    reader.close()


def test_a_rank_that_loads_ends_wherever_it_is(world: World) -> None:
    """An exception would not come out of everything: in some callbacks it is printed, and the rank goes on."""
    reader, writer = get_context("spawn").Pipe(duplex=False)
    settings = RankSettings("tests.late_engines:InCallback", EngineSettings(), world.bind,
                            world.coordinator_input, world.coordinator_output)  # fmt: skip
    process = spawn("rank 0", run_rank, {"settings": settings, "status": writer})
    writer.close()
    wait_for(reader, Progressed)
    process.terminate()
    process.join(stretched(10))
    ended = process.exitcode
    process.kill()
    reader.close()
    assert ended == 0


def wait_for(reader: Any, kind: type[Any]) -> Any:
    while not isinstance(message := reader.recv(), kind):
        assert not isinstance(message, Ready)
    return message
