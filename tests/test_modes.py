"""Internal over two nodes, hybrid and external mode, each with real processes and sockets."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Members, RankHello, RankReport
from paceline.net.coordinator import DPCoordinator
from paceline.settings import ParallelConfig
from tests.pace import stretched
from tests.serving import Command, command, wait_until

pytestmark = pytest.mark.slow

TIMED = ("--engine", "timed", "--engine-option", "step_ms=2")


SPAN = 40
"""Ports that a node may count from its first."""


def free_port() -> str:
    """A port that is free, and those behind it: below the ones that the system gives to connections."""
    while True:
        first = random.randrange(10_000, 32_000 - SPAN)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + SPAN):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return str(first)


@contextlib.contextmanager
def nodes(first: list[str], second: list[str]) -> Iterator[tuple[Command, Command]]:
    """Two nodes of one deployment: the first leads, the second joins it."""
    common = ("serve", "--port", "0", *TIMED, "-dpp", free_port())
    with command(*common, *first) as leading, command(*common, *second) as joining:
        leading.connect()
        if "--headless" not in second:
            joining.connect()
        yield leading, joining


def ranks_used(running: Command, count: int = 24) -> Counter[str]:
    used: Counter[str] = Counter()
    for _ in range(count):
        answer = running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        used[answer.headers["x-data-parallel-rank"]] += 1
    return used


def test_internal_mode_over_two_nodes() -> None:
    common = ["-dp", "4", "-dpl", "2"]
    with nodes(common, [*common, "--data-parallel-start-rank", "2", "--headless"]) as (leading, headless):
        headless.wait_line("ranks 2, 3 of 4 are ready")
        assert set(ranks_used(leading)) == {"0", "1", "2", "3"}


def test_hybrid_mode_balances_over_its_own_ranks() -> None:
    common = ["-dp", "4", "-dpl", "2", "--data-parallel-hybrid-lb"]
    with nodes(common, [*common, "--data-parallel-start-rank", "2"]) as (first, second):
        assert set(ranks_used(first)) == {"0", "1"}
        assert set(ranks_used(second)) == {"2", "3"}
        answer = first.http.post("/v1/completions", json={"prompt": "a"}, headers={"X-data-parallel-rank": "2"})
        assert answer.status_code == 400
        assert first.health()["missing"] == []


def test_external_mode_has_one_rank_each() -> None:
    external = ["-dp", "2", "--data-parallel-rank"]
    with nodes([*external, "0"], [*external, "1"]) as (first, second):
        assert set(ranks_used(first, 5)) == {"0"}
        assert set(ranks_used(second, 5)) == {"1"}


@pytest.mark.parametrize("engine", ["timed", "timed-lockstep"])
@pytest.mark.parametrize("mode", ["hybrid", "external"])
def test_a_head_that_dies_and_comes_back(mode: str, engine: str) -> None:
    """The other node serves meanwhile where its ranks need no others; its ranks are the same ones after it."""
    size, local = (2, 1) if mode == "external" else (4, 2)
    own = ["-dp", str(size), "-dpl", str(local), f"--data-parallel-{mode}-lb"]
    first = "--data-parallel-rank" if mode == "external" else "--data-parallel-start-rank"
    common = ("serve", "--port", "0", "--engine", engine, "--engine-option", "step_ms=2", "-dpp", free_port(), *own)
    with command(*common, first, str(local)) as joining:
        with command(*common, first, "0") as head:
            head.connect()
            joining.connect()
            assert [len(ranks_used(node)) for node in (head, joining)] == [local, local]
            lives = joining.children()
            head.signal(signal.SIGKILL)
            head.wait_end()
        if engine == "timed":
            assert len(ranks_used(joining)) == local
        with command(*common, first, "0") as head:
            head.connect()
            wait_until(lambda: all(node.health()["missing"] == [] for node in (head, joining)), "all ranks", 30)
            assert [len(ranks_used(node)) for node in (head, joining)] == [local, local]
            # All of them still belong to one deployment: what one node is asked for reaches the other's ranks.
            for asked, word in (("/pause", True), ("/resume", False)):
                assert head.http.post(asked, json={}, timeout=stretched(20)).status_code == 200
                wait_until(lambda word=word: joining.http.get("/is_paused").json()["is_paused"] is word, asked)  # type: ignore[misc]
            assert [len(ranks_used(node)) for node in (head, joining)] == [local, local]
            assert joining.children() == lives, "nothing of the other node was started again"


def test_node_that_does_not_fit_is_told_why() -> None:
    port = free_port()
    with command("serve", "--port", "0", *TIMED, "-dpp", port, "-dp", "2", "-dpl", "1"):
        with command("serve", "--port", "0", *TIMED, "-dpp", port, "-dp", "3", "-dpl", "1",
                     "--data-parallel-start-rank", "1", "--headless") as second:  # fmt: skip
            assert second.wait_end() == 1
            assert "--data-parallel-size is 2 there and 3 here" in second.output


@pytest.mark.parametrize("external", [True, False])
def test_no_loads_go_out_in_external_mode(external: bool) -> None:
    """A rank reports load at the coordinator's socket; what comes out at the front-ends' is all that counts."""
    parallel = ParallelConfig(data_parallel_size=2, data_parallel_size_local=1 if external else 2,
                              data_parallel_external_lb=external)  # fmt: skip
    coordinator = DPCoordinator(parallel)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        _, inbox = coordinator.get_engine_socket_addresses()
        frontend, rank = context.socket(zmq.XSUB), context.socket(zmq.PUSH)
        frontend.connect(coordinator.get_stats_publish_address())
        frontend.send(b"\x01")
        rank.connect(inbox)
        assert isinstance(read(frontend), Members)
        assert isinstance(read(frontend), LoadView)
        for frame in rank_frames():
            rank.send(frame)
        views = [message for message in read_until_running(frontend) if isinstance(message, LoadView)]
        reported = [view for view in views if view.ranks and any(entry.load.waiting == 7 for entry in view.ranks)]
        if external:
            assert all(view.ranks is None for view in views)
            assert len(views) <= 3
        else:
            assert reported or read_reported(frontend)
    finally:
        context.destroy(linger=0)
        coordinator.shutdown()


def rank_frames() -> list[bytes]:
    """A rank that is ready, reports loads, and at last that it runs: the change that goes out in every mode."""
    hello = RankHello(PROTOCOL_VERSION, 0, 5, "ipc:///nowhere", True)
    reports = [RankReport(0, 5, step, 0, False, Load(waiting=7, running=step)) for step in range(20)]
    running = RankReport(0, 5, 20, 0, True, Load(waiting=7))
    return [codec.encode(message) for message in (hello, *reports, running)]


def read(socket_: zmq.Socket[bytes]) -> object:
    assert socket_.poll(stretched(10) * 1000), "nothing came from the coordinator"
    return codec.to_frontend().decode(socket_.recv())


def read_until_running(socket_: zmq.Socket[bytes]) -> list[object]:
    messages = [read(socket_)]
    while not (isinstance(messages[-1], LoadView) and messages[-1].running):
        messages.append(read(socket_))
    return messages


def read_reported(socket_: zmq.Socket[bytes]) -> bool:
    def reported() -> bool:
        view = read(socket_)
        return isinstance(view, LoadView) and bool(view.ranks) and view.ranks[0].load.waiting == 7

    return bool(wait_until(reported, "a view with the load"))


def test_wire_is_msgpack_arrays() -> None:
    """What the external test decodes with our codec is what any msgpack reader sees."""
    assert msgspec.msgpack.decode(rank_frames()[0])[0] == "rank-hello"
