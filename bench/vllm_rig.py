"""The rig of `make bench-vllm`: three coordinators, and the sockets of vLLM's ranks and front-ends around each.

`stock` is vLLM's own process, `ours` a watchdog with the coordinator under it, `echo` the floor: a process that answers
a front-end's frame with a wake to all ranks and does nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
from tests.serving import cpu_s, memory_mb
from tests.vllm.pairs import Context, StockCoordinators

from paceline.vllm.plugin import VllmCoordinator

KEYS: dict[str, Any] = {
    "num_skipped_waiting_reqs": 0, "num_kv_fetch_reqs_by_stage": {}, "iteration_details": None,
    "prefix_cache_stats": {
        "reset": False, "requests": 0, "queries": 0, "hits": 0, "preempted_requests": 0, "preempted_queries": 0,
        "preempted_hits": 0, "hits_by_source": {},
    },
    "connector_prefix_cache_stats": None, "kv_cache_eviction_events": [], "spec_decoding_stats": None,
    "kv_connector_stats": None, "ec_connector_stats": None, "waiting_lora_adapters": {}, "running_lora_adapters": {},
    "cudagraph_stats": None, "perf_stats": None,
}  # fmt: skip
"""What vLLM 0.32 sends beside the counts: a report is as long as a real one."""


def report(rank: int, waiting: int, running: int, wave: int, step: int) -> bytes:
    stats = {"num_running_reqs": running, "num_waiting_reqs": waiting, "step_counter": step, "current_wave": wave,
             "kv_cache_usage": 0.5} | KEYS  # fmt: skip
    return _said(rank, stats)


def start(rank: int, wave: int) -> bytes:
    return _said(rank, None, None, wave)


def complete(wave: int) -> bytes:
    return _said(0, None, wave)


def _said(rank: int, stats: object, end: int | None = None, begin: int | None = None) -> bytes:
    return msgspec.msgpack.encode([rank, [], stats, time.monotonic(), None, None, end, begin, None])


class Rig:
    """One coordinator and its neighbours. `pids`: its processes."""

    def __init__(
        self, context: Context, senders: Context, addresses: tuple[str, str, str], pids: list[int], size: int,
        frontends: int, waves: bool,
    ) -> None:  # fmt: skip
        front, output, publish = addresses
        self.pids = pids
        self.size = size
        self.waves = waves
        self.outputs = [_connected(senders, zmq.PUSH, output) for _ in range(size)]
        self.inputs = [_connected(context, zmq.XSUB, publish) for _ in range(size)]
        self.frontends = [_connected(context, zmq.XSUB, front) for _ in range(frontends)]
        for endpoint in (*self.inputs, *self.frontends):
            endpoint.send(b"\x01")
        self.wave = self.step = 0

    def greeted(self) -> Rig:
        for endpoint in self.inputs:
            assert endpoint.poll(30_000), "no READY"
            assert endpoint.recv() == b"READY"
        return self

    def cpu_s(self) -> float:
        return sum(map(cpu_s, self.pids))

    def memory_mb(self) -> float:
        return sum(map(memory_mb, self.pids))

    def drain(self) -> None:
        _empty(*self.inputs, *self.frontends)

    def views(self) -> Iterator[tuple[float, Any, int, bool]]:
        """What has come to the first front-end: when it was read, counts, wave, running. The others are emptied."""
        _empty(*self.frontends[1:])
        with contextlib.suppress(zmq.Again):
            while True:
                frame = self.frontends[0].recv(zmq.NOBLOCK)
                yield time.monotonic(), *msgspec.msgpack.decode(frame)

    def close(self) -> None:
        for endpoint in (*self.outputs, *self.inputs, *self.frontends):
            endpoint.close()


def _empty(*endpoints: zmq.Socket[bytes]) -> None:
    for endpoint in endpoints:
        with contextlib.suppress(zmq.Again):
            while True:
                endpoint.recv_multipart(zmq.NOBLOCK)


def _connected(context: Context, kind: int, address: str) -> zmq.Socket[bytes]:
    endpoint = context.socket(kind)
    endpoint.linger = 0
    if kind == zmq.PUSH:
        endpoint.sndhwm = 0
    endpoint.connect(address)
    return endpoint


def config(size: int) -> SimpleNamespace:
    return SimpleNamespace(data_parallel_size=size, data_parallel_size_local=size, data_parallel_master_ip="127.0.0.1")


def start_and_memory() -> dict[str, tuple[float, float, float]]:
    """Of each: seconds from starting it until its addresses are known, and until its ranks are greeted; megabytes
    then.
    """
    begin = time.monotonic()
    stock = StockCoordinators()
    with tempfile.TemporaryDirectory() as folder:
        # Not the fork that the rigs use: a process of its own, as vLLM's launcher spawns it.
        (_, _, publish), pid = stock.start(folder, 2, True, fork=False)
        bound = time.monotonic() - begin
        greet(publish, 2)
        theirs = (bound, time.monotonic() - begin, memory_mb(pid))
        stock.close()
    begin = time.monotonic()
    ours = VllmCoordinator(config(2))
    bound = time.monotonic() - begin
    greet(ours.get_engine_socket_addresses()[0], 2)
    mine = (bound, time.monotonic() - begin, sum(map(memory_mb, _pids(ours))))
    ours.shutdown()
    return {"stock": theirs, "ours": mine}


def greet(publish: str, size: int) -> None:
    with zmq.Context() as context:
        ranks = [_connected(context, zmq.XSUB, publish) for _ in range(size)]
        for rank in ranks:
            rank.send(b"\x01")
        for rank in ranks:
            assert rank.poll(30_000), "no READY"
            rank.close()


def _pids(ours: VllmCoordinator) -> list[int]:
    watchdog = int(ours.proc.pid or 0)
    child = subprocess.run(["pgrep", "-P", str(watchdog)], capture_output=True, check=True).stdout.split()[0]
    return [watchdog, int(child)]


@contextlib.contextmanager
def rigs(stock: StockCoordinators, size: int, frontends: int, *, waves: bool, echo: bool) -> Iterator[dict[str, Rig]]:
    # Reports go out by a thread of their own, so that a backlog of them does not delay what is timed.
    context: Context = zmq.Context()
    senders: Context = zmq.Context()
    context.max_sockets = senders.max_sockets = 8192
    made: dict[str, Rig] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        addresses, pid = stock.start(folder, size, waves)
        stack.callback(os.kill, pid, signal.SIGKILL)
        made["stock"] = Rig(context, senders, addresses, [pid], size, frontends, waves)
        ours = VllmCoordinator(config(size), waves)
        stack.callback(ours.shutdown)
        back_publish, back_output = ours.get_engine_socket_addresses()
        mine = (ours.get_stats_publish_address(), back_output, back_publish)
        made["ours"] = Rig(context, senders, mine, _pids(ours), size, frontends, waves)
        if echo:
            floor = (f"ipc://{folder}/echo-front", f"ipc://{folder}/echo-output", f"ipc://{folder}/echo-publish")
            process = get_context("spawn").Process(target=echo_process, args=(*floor, size), daemon=True)
            process.start()
            stack.callback(process.kill)
            made["echo"] = Rig(context, senders, floor, [int(process.pid or 0)], size, frontends, waves)
        try:
            for rig in made.values():
                rig.greeted()
            yield made
        finally:
            for rig in made.values():
                rig.close()
            context.destroy(linger=0)
            senders.destroy(linger=0)


def echo_process(front: str, output: str, publish: str, size: int) -> None:
    """The floor: a frame from a front-end comes out at all ranks, as two."""
    context: Context = zmq.Context()
    sockets = [context.socket(kind) for kind in (zmq.XPUB, zmq.PULL, zmq.XPUB)]
    for endpoint, address in zip(sockets, (front, output, publish), strict=True):
        if endpoint.type == zmq.XPUB:
            endpoint.setsockopt(zmq.XPUB_VERBOSE, 1)
        endpoint.bind(address)
    for _ in range(size):
        sockets[2].recv()
    sockets[2].send(b"READY")
    poller = zmq.Poller()
    poller.register(sockets[0], zmq.POLLIN)
    poller.register(sockets[1], zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sockets[1] in ready:
            sockets[1].recv()
        if sockets[0] in ready:
            frame = sockets[0].recv()
            if frame[0] > 1:
                sockets[2].send_multipart([b"\x02", frame])
