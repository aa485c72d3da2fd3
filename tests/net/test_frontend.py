"""A front-end's process between a coordinator and a rank that the test plays: bad frames, and what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import zmq

from paceline.core import codec
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, FrontendHello, LoadView, Member, Members, RankView
from paceline.core.requests import AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing.least import LeastLoad
from paceline.net.frontend import FrontendShell
from paceline.process.spawn import spawn
from paceline.process.supervisor import Ready
from paceline.server.process import FrontendSettings, reserve_port, run_frontend
from paceline.settings import DeploymentConfig, EngineConfig, ParallelConfig, ServerConfig
from tests.net.peers import Context, context, receive, send_bad_frames, shout_at
from tests.pace import stretched
from tests.serving import wait_until

pytestmark = pytest.mark.slow

LIFE = 5


class World:
    """The coordinator's and rank 0's sockets, and a front-end's process between them."""

    def __init__(self, zmq_context: Context, folder: Path) -> None:
        self.publish = zmq_context.socket(zmq.XPUB)
        self.rank = zmq_context.socket(zmq.ROUTER)
        self.rank.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.coordinator = f"ipc://{folder}/front-publish"
        self.rank_address = f"ipc://{folder}/rank"
        self.metrics = str(folder / "metrics")
        self.publish.bind(self.coordinator)
        self.rank.bind(self.rank_address)
        reserved = reserve_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{reserved.port}"
        reserved.close()

    def start(self) -> Any:
        """Start the process and announce rank 0 until it serves."""
        reader, writer = get_context("spawn").Pipe(duplex=False)
        config = DeploymentConfig(
            ParallelConfig(data_parallel_size=1), EngineConfig(engine="timed"),
            ServerConfig(bind="arrival", max_body_bytes=100_000, drain_timeout_s=5.0, rank_timeout_s=0.0),
        )  # fmt: skip
        port = int(self.url.rsplit(":", 1)[1])
        settings = FrontendSettings(config, 0, port, self.coordinator, frozenset({0}), self.metrics)
        process = spawn("front-end 0", run_frontend, {"settings": settings, "status": writer})
        writer.close()
        decode = codec.from_frontend().decode
        while (frame := receive(self.publish)[0])[:1] in (b"\x00", b"\x01"):
            pass
        assert isinstance(decode(frame), FrontendHello)
        self.announce(LIFE)
        while not isinstance(reader.recv(), Ready):
            pass
        reader.close()
        return process

    def announce(self, life: int, address: str = "") -> None:
        """Say that rank 0 is ready, in this life of it."""
        members = [Member(0, life, address or self.rank_address)]
        self.publish.send(codec.encode(Members(PROTOCOL_VERSION, 1, 0, False, members)))

    def take(self) -> tuple[bytes, AddRequest]:
        identity, frame = receive(self.rank)
        message = codec.request().decode(frame)
        assert isinstance(message, AddRequest)
        return identity, message

    def answer(self, identity: bytes, add: AddRequest, text: str, life: int = LIFE) -> None:
        output = Output(add.request, [1], text, "stop")
        self.rank.send_multipart([identity, codec.encode(Outputs(0, life, [output]))])

    def post(self, **fields: Any) -> tuple[int, Any]:
        body = json.dumps({"prompt": "a", "max_tokens": 4} | fields).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/v1/completions", body, timeout=stretched(30)) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def statistics(self) -> Any:
        with urllib.request.urlopen(f"{self.url}/health", timeout=stretched(30)) as response:
            return json.load(response)


@contextlib.contextmanager
def frontend(folder: Path) -> Iterator[tuple[World, Any]]:
    with context() as zmq_context:
        world = World(zmq_context, folder)
        process = world.start()
        try:
            yield world, process
        finally:
            process.kill()
            process.join(stretched(10))


def test_bad_frames_on_every_socket(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with frontend(tmp_path) as (world, process), ThreadPoolExecutor() as pool:
        answer = pool.submit(world.post)
        identity, add = world.take()
        send_bad_frames(world.publish)
        send_bad_frames(world.rank, (identity,))
        shout_at(world.url.replace("http", "tcp"))
        world.answer(identity, add, "fine")
        status, body = answer.result(stretched(30))
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "fine")
        assert process.is_alive()
    error = capfd.readouterr().err
    logged = [line for line in error.splitlines() if "dropped a message" in line]
    assert logged
    assert len(logged) == len({line.split("dropped", 1)[1].split(":")[0] for line in logged}), "one line a kind"
    assert "Traceback" not in error


def test_outputs_of_another_life_are_void(tmp_path: Path) -> None:
    with frontend(tmp_path) as (world, _), ThreadPoolExecutor() as pool:
        answer = pool.submit(world.post)
        identity, add = world.take()
        world.answer(identity, add, "from the grave", life=LIFE - 1)
        world.answer(identity, add, "alive")
        assert json.loads(answer.result(stretched(30))[1])["choices"][0]["text"] == "alive"


def test_an_answer_goes_on_at_the_rank_s_next_life(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 4, "stream": True}).encode()
    with frontend(tmp_path) as (world, _), ThreadPoolExecutor() as pool:
        opening = pool.submit(urllib.request.urlopen, f"{world.url}/v1/completions", body, timeout=stretched(30))
        identity, first = world.take()
        begun = Output(first.request, [1], "begun")
        world.rank.send_multipart([identity, codec.encode(Outputs(0, LIFE, [begun]))])
        with opening.result(stretched(30)) as stream:
            while "begun" not in stream.readline().decode():
                pass
            world.announce(LIFE + 1)
            identity, again = world.take()
            assert (again.incarnation, again.number, again.made_token_ids) == (LIFE + 1, 1, [1])
            assert again.request != first.request
            world.answer(identity, first, "from the grave", life=LIFE)
            world.answer(identity, again, ", ended", life=LIFE + 1)
            events = [line.removeprefix("data: ") for line in stream.read().decode().splitlines() if line]
        assert [json.loads(event)["choices"][0]["text"] for event in events[:-1]] == [", ended"]
        assert events[-1] == "[DONE]"


def test_a_life_whose_address_is_none_takes_nothing_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with frontend(tmp_path) as (world, _), ThreadPoolExecutor() as pool:
        answer = pool.submit(world.post)
        world.take()
        world.announce(LIFE + 1, "tcp://nowhere")
        world.announce(LIFE + 2)
        identity, again = world.take()
        world.answer(identity, again, "fine", life=LIFE + 2)
        status, body = answer.result(stretched(30))
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "fine")
    assert "Traceback" not in capfd.readouterr().err


def test_engine_error_reaches_the_client(tmp_path: Path) -> None:
    with frontend(tmp_path) as (world, _), ThreadPoolExecutor() as pool:
        answer = pool.submit(world.post)
        identity, add = world.take()
        failed = Output(add.request, [], finish_reason="error", error="does not fit")
        world.rank.send_multipart([identity, codec.encode(Outputs(0, LIFE, [failed]))])
        status, body = answer.result(stretched(30))
        assert status == 500
        assert "does not fit" in json.loads(body)["error"]["message"]


def test_coordinator_that_comes_back_empty_loses_nothing(tmp_path: Path) -> None:
    with frontend(tmp_path) as (world, _), ThreadPoolExecutor() as pool:
        answer = pool.submit(world.post)
        identity, add = world.take()
        world.publish.send(codec.encode(Members(PROTOCOL_VERSION, 2, 0, False, [], missing=[0])))
        world.publish.send(codec.encode(LoadView(2, 1, 0, False, [RankView(0, LIFE, 9, Load(waiting=3), {})])))
        wait_until(lambda: world.statistics()["waiting"] >= 2, "the new coordinator's view is taken")
        world.answer(identity, add, "still here")
        assert answer.result(stretched(30))[0] == 200
        assert world.statistics()["ready"] == [0]


def test_what_a_rank_sent_before_it_left_counts(tmp_path: Path) -> None:
    """Both are there to be read, and the coordinator's word that the rank has left is read first."""

    async def leave(world: World) -> None:
        shell = FrontendShell(Frontend(7, LeastLoad()), world.coordinator)
        told: list[Any] = []
        while receive(world.publish)[0][:1] in (b"\x00", b"\x01"):
            pass
        world.announce(LIFE)
        while not shell.machine.ready_ranks():
            await shell.wait_changed()
        shell.submit(told.append, [1], SamplingParams(max_tokens=4))
        world.answer(*world.take(), "whole")
        world.publish.send(codec.encode(Members(PROTOCOL_VERSION, 1, 0, False, [], ended=[(0, LIFE)])))
        (rank,) = shell._ranks._sockets.values()
        assert all(one.socket.poll(stretched(10_000)) for one in (rank, shell._coordinator))
        shell._coordinator.drain()
        assert [one.text for one in told if isinstance(one, Output)] == ["whole"]
        assert (shell.machine.ready_ranks(), shell.machine.moved) == ([], 0)
        shell.close()

    with context() as zmq_context:
        world = World(zmq_context, tmp_path)
        asyncio.run(leave(world))
