"""vLLM's own coordinator process and ours, told the same on sockets; what each says is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq

from paceline.vllm.codec import VllmDialect
from paceline.vllm.plugin import VllmCoordinator
from tests.vllm import environment
from tests.vllm.serving import VERSION

SETTLE_S = 0.35
"""Longer than three of vLLM's publishing intervals."""
Context = zmq.Context[zmq.Socket[bytes]]


class StockCoordinators:
    """A process that makes vLLM's coordinators; `sources`: of another version than is installed."""

    def __init__(self, sources: Path | None = None) -> None:
        python = environment.environment_of(VERSION) / "bin" / "python"
        script = Path(__file__).with_name("stock_coordinators.py")
        settings = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        command = [str(python), str(script), *([str(sources)] if sources else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process: subprocess.Popen[str] = subprocess.Popen(command, **pipes, text=True, env=settings)
        self.dialect = msgspec.convert(self._read()["dialect"], VllmDialect)
        """The version's, which its ranks and front-ends speak."""

    def start(self, folder: str, size: int, waves: bool, *, fork: bool = True) -> tuple[tuple[str, str, str], int]:
        """(front publish, back output, back publish) and the process; without `fork` it is the last one."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"folder": folder, "size": size, "waves": waves, "fork": fork}) + "\n")
        self.process.stdin.flush()
        said = self._read()
        return tuple(said["addresses"]), int(said["pid"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    return said
        raise AssertionError("vLLM's coordinators have ended")


class Neighbours:
    """The sockets of ranks and front-ends around one coordinator, as vLLM makes them, and what came."""

    def __init__(self, context: Context, addresses: tuple[str, str, str], size: int, frontends: int = 2) -> None:
        self._context = context
        self._front, output, self._publish = addresses
        self.outputs = [self._socket(zmq.PUSH, output) for _ in range(size)]
        self.inputs: list[zmq.Socket[bytes]] = []
        self.frontends: list[zmq.Socket[bytes]] = []
        self._output = output
        self.wakes: list[list[Any]] = []
        self.greetings = 0
        self.views: list[tuple[Any, int, bool]] = []
        for _ in range(size):
            self.rank_subscribes()
        for _ in range(frontends):
            self.frontend_subscribes()

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        endpoint = self._context.socket(kind)
        endpoint.linger = 0
        endpoint.connect(address)
        return endpoint

    def rank_subscribes(self) -> None:
        self.inputs.append(self._socket(zmq.XSUB, self._publish))
        self.inputs[-1].send(b"\x01")

    def frontend_subscribes(self) -> None:
        self.frontends.append(self._socket(zmq.XSUB, self._front))
        self.frontends[-1].send(b"\x01")

    def rank_says(self, rank: int, stats: object = None, complete: int | None = None, start: int | None = None) -> None:
        while len(self.outputs) <= rank:
            self.outputs.append(self._socket(zmq.PUSH, self._output))
        said = [rank, [], stats, time.monotonic(), None, None, complete, start, None]
        self.outputs[rank].send(msgspec.msgpack.encode(said))

    def frontend_says(self, *said: object) -> None:
        self.frontends[0].send(msgspec.msgpack.encode(said))

    def read(self) -> None:
        """Take in what has come: at the first rank, and the first front-end. All sockets are emptied."""
        for position, endpoint in enumerate(self.inputs):
            for frames in _all_of(endpoint):
                if position == 0:
                    if frames == [b"READY"]:
                        self.greetings += 1
                    else:
                        self.wakes.append(msgspec.msgpack.decode(frames[1]))
        for position, endpoint in enumerate(self.frontends):
            for frames in _all_of(endpoint):
                if position == 0:
                    self.views.append(tuple(msgspec.msgpack.decode(frames[0])))

    def close(self) -> None:
        for endpoint in (*self.outputs, *self.inputs, *self.frontends):
            endpoint.close()

    # What must agree

    def waves_woken(self) -> list[int]:
        """The waves of its wakes; that one was said again is left out."""
        return changes([wave for wave, _ in self.wakes])

    def states(self) -> list[tuple[int, bool]]:
        return changes([(0, False), *((wave, running) for _, wave, running in self.views)])

    def counts(self) -> list[list[float]]:
        last: list[list[float]] = next(counts for counts, _, _ in reversed(self.views) if counts is not None)
        return [[round(value, 6) for value in rank] for rank in last]


def changes(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if index == 0 or values[index - 1] != value]


def _all_of(endpoint: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    with contextlib.suppress(zmq.Again):
        while True:
            yield endpoint.recv_multipart(zmq.NOBLOCK)


@contextlib.contextmanager
def pair(stock: StockCoordinators, size: int, *, waves: bool = True) -> Iterator[tuple[Neighbours, Neighbours]]:
    """The neighbours of vLLM's coordinator, and of ours."""
    config = SimpleNamespace(
        data_parallel_size=size, data_parallel_size_local=size, data_parallel_master_ip="127.0.0.1"
    )
    context: Context = zmq.Context()
    with tempfile.TemporaryDirectory() as folder:
        addresses, pid = stock.start(folder, size, waves)
        ours = type("Ours", (VllmCoordinator,), {"dialect": stock.dialect})(config, waves)
        back_publish, back_output = ours.get_engine_socket_addresses()
        theirs = Neighbours(context, addresses, size)
        mine = Neighbours(context, (ours.get_stats_publish_address(), back_output, back_publish), size)
        try:
            yield theirs, mine
        finally:
            theirs.close()
            mine.close()
            ours.shutdown()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            context.destroy(linger=0)
