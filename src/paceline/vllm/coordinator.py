"""The keeper: what vLLM watches as its coordinator, and what starts the coordinator again when that dies.

vLLM ends a deployment when its coordinator's process ends. This process is small enough not to: it imports the standard
library alone, holds no socket of the protocol, and remembers for the coordinator the few values that ranks cannot be
asked for again. A coordinator that dies is started anew at the same addresses at once, and when that fails, again and
again. The coordinator ends when the keeper does, and the keeper with its parent.

It also serves `/health` and `/loads`, which it asks the coordinator for: so they answer while there is none.

What vLLM's launcher makes and uses in place of its own `DPCoordinator`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import msgspec

from paceline.errors import ConfigError, StartupError
from paceline.net.links import SocketFolder, Wakeup
from paceline.net.sockets import tcp_address
from paceline.process.spawn import spawn, stop
from paceline.vllm.codec import VllmDialect
from paceline.vllm.process import Settings
from paceline.vllm.translation import Memory

logger = logging.getLogger("paceline.vllm")

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0
LIVED_S = 1.0
"""Who lived so long did not fail at its start."""
ANSWER_S = 1.0
"""How long `/health` waits for the coordinator, and for its client."""
MOST_BYTES = 1 << 20


class Keeper:
    """Keeps one coordinator running.

    `settings`: its Settings as a dict, without the channel, changed by what it says; the module that it is
    (`program`); and where to answer questions (`status_address`), if anywhere.

    `report`: gets the addresses once bound, or a string that says why they cannot be.
    """

    def __init__(self, settings: dict[str, Any], report: Connection | None) -> None:
        self._settings = settings
        self._program = settings.pop("program")
        self._report = report
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._started_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._due: float | None = None
        self._restarts = 0
        self._stopping = False
        self._wakeup = Wakeup()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None

    def run(self) -> None:
        """Keep it until stopped. Raises SystemExit where the first one does not come up."""
        if address := self._settings.pop("status_address", ""):
            self._listen(address)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._start()
        while not self._stopping:
            wait_s = None if self._due is None else max(0.0, self._due - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self._channel:
                    self._read()
                elif key.fileobj is self._listener:
                    self._serve()
            if self._due is not None and time.monotonic() >= self._due:
                self._due = None
                self._start()
        self._end()

    def stop(self) -> None:
        """Make `run` return. Safe in a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector.register(self._channel, selectors.EVENT_READ, None)
        self._started_at = time.monotonic()
        with theirs:
            settings = json.dumps(self._settings | {"channel": theirs.fileno()})
            command = [sys.executable, "-m", self._program, settings]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])

    def _read(self) -> None:
        """A word of the coordinator, or its end."""
        assert self._channel is not None
        try:
            packet = self._channel.recv(MOST_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # An answer of `/health` came in between and read it.
            return
        except OSError:
            packet = b""
        if not packet:
            self._on_end()
            return
        self._take(json.loads(packet))

    def _take(self, said: dict[str, Any]) -> None:
        if "memory" in said:
            self._settings["memory"] = said["memory"]
        if "addresses" in said:
            names = ("front_publish_address", "back_output_address", "back_publish_address")
            self._settings |= dict(zip(names, said["addresses"], strict=True))
            self._settings["restarted"] = True
            if self._report is not None:
                self._report.send(tuple(said["addresses"]))
                self._report = None
                logger.info("Paceline's coordinator is up, for %s ranks", self._settings["memory"]["size"])
        if "failed" in said:
            if self._report is not None:
                self._report.send(said["failed"])
                self._end()
                sys.exit(1)
            logger.error("the coordinator cannot start again: %s", said["failed"])

    def _on_end(self) -> None:
        status = self._close()
        if self._report is not None:
            self._report.send(f"it ended at its start (exit status {status})")
            sys.exit(1)
        if time.monotonic() >= self._started_at + LIVED_S:
            self._pause_s = FIRST_PAUSE_S
        self._restarts += 1
        self._due = time.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        logger.warning("the coordinator has ended (%s) and is started again", status)

    def _close(self) -> int:
        """The channel has ended, so the process has or is about to."""
        assert self._channel is not None
        assert self._child is not None
        self._selector.unregister(self._channel)
        self._channel.close()
        self._channel = None
        try:
            return self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def _end(self) -> None:
        if self._channel is not None:
            assert self._child is not None
            self._child.terminate()
            self._close()
        if self._listener is not None:
            self._listener.close()

    # Status -----------------------------------------------------------------------------------

    def _listen(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._listener = socket.create_server((host.strip("[]"), int(port)), backlog=16)
        except (OSError, ValueError, OverflowError) as error:
            # Not worth a deployment.
            logger.error("PACELINE_VLLM_STATUS: cannot listen at %s: %s", address, error)
            return
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def _serve(self) -> None:
        """One short answer a connection: the smallest HTTP that curl, a probe and `paceline loads` need."""
        assert self._listener is not None
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            with client:
                client.settimeout(ANSWER_S)
                client.sendall(self._answer(client.recv(8192)))

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b" ", 2)
        path = words[1].partition(b"?")[0] if len(words) == 3 and words[0] == b"GET" else b""
        if path not in (b"/health", b"/loads"):
            return _response("404 Not Found", _error("GET /health or /loads"))
        known = self._ask()
        if known is None:
            return _response("503 Service Unavailable", _error("the coordinator is being started again"))
        if path == b"/loads":
            return _response("200 OK", {"ranks": known["loads"]})
        health = known["health"] | {"restarts": self._restarts}
        return _response("503 Service Unavailable" if health["stalls"] else "200 OK", health)

    def _ask(self) -> dict[str, Any] | None:
        """What the coordinator knows now; None where it does not answer in time."""
        if self._channel is None:
            return None
        end = time.monotonic() + ANSWER_S
        try:
            self._channel.send(b"?")
            while (left_s := end - time.monotonic()) > 0:
                if not select.select([self._channel], (), (), left_s)[0]:
                    return None
                packet = self._channel.recv(MOST_BYTES)
                if not packet:
                    return None
                said: dict[str, Any] = json.loads(packet)
                if "status" in said:
                    status: dict[str, Any] = said["status"]
                    return status
                self._take(said)
        except OSError:
            pass
        return None


def _response(status: str, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def run_keeper(settings: dict[str, Any], report: Connection) -> None:
    """The keeper process."""
    keeper = Keeper(settings, report)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    keeper.run()


NAME = "Paceline_DP_Coordinator"
INTERVAL_MS = 10.0
STARTUP_TIMEOUT_S = 60.0


class VllmCoordinator:
    """A keeper with a coordinator under it; names and arguments are those of vLLM's `DPCoordinator`.

    `parallel_config`: vLLM's. `logging_config`: vLLM's, of which nothing is used. Raises StartupError where it does not
    come up, ConfigError for a variable of the environment that cannot be.
    """

    dialect = VllmDialect()
    """The installed vLLM's; the plugin sets it."""
    program = "paceline.vllm.main"
    """The module that the coordinator runs as."""

    def __init__(
        self, parallel_config: Any, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self._folder = SocketFolder()
        self._processes: list[SpawnProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, self._folder)
        try:
            settings = _settings(parallel_config, enable_wave_coordination, self.dialect, self._folder)
            self._addresses = self._start(settings | {"program": self.program})
        except (StartupError, ConfigError):
            self.shutdown()
            raise

    @property
    def proc(self) -> SpawnProcess:
        """The keeper's process, which vLLM watches."""
        return self._processes[0]

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect."""
        return self._addresses[0]

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """Where ranks connect: (their input, the coordinator's broadcasts; their output, its inbox)."""
        return self._addresses[2], self._addresses[1]

    def shutdown(self, timeout: float | None = None) -> None:
        """End both, waiting up to `timeout` seconds. May be called twice."""
        if self._finalizer.detach():
            _end(self._processes, self._folder, timeout)

    def _start(self, settings: dict[str, Any]) -> tuple[str, str, str]:
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        with reader:
            kwargs = {"settings": settings, "report": writer}
            self._processes.append(spawn(NAME, run_keeper, kwargs, settings["log_level"]))
            writer.close()
            try:
                if not reader.poll(STARTUP_TIMEOUT_S):
                    raise StartupError(f"the coordinator did not report its addresses within {STARTUP_TIMEOUT_S:g} s")
                answer = reader.recv()
            except EOFError:
                raise StartupError("the coordinator's keeper ended before it was up") from None
        if isinstance(answer, str):
            raise StartupError(f"coordinator: {answer}")
        addresses: tuple[str, str, str] = answer
        return addresses


def _settings(config: Any, waves: bool, dialect: VllmDialect, folder: SocketFolder) -> dict[str, Any]:
    """The coordinator's Settings, but for the channel. Addresses are chosen as vLLM chooses them."""
    environment = os.environ
    size = config.data_parallel_size
    external = bool(getattr(config, "data_parallel_external_lb", False))
    front_local = not (external or getattr(config, "data_parallel_hybrid_lb", False))
    back_local = size == config.data_parallel_size_local and not getattr(config, "enable_elastic_ep", False)

    def address(local: bool, name: str) -> str:
        return folder.address(name) if local else tcp_address(config.data_parallel_master_ip)

    settings = Settings(
        channel=-1,
        front_publish_address=address(front_local, "front-publish"),
        back_output_address=address(back_local, "back-output"),
        back_publish_address=address(back_local, "back-publish"),
        memory=Memory(size),
        dialect=dialect,
        interval_ms=_number(environment, "PACELINE_VLLM_INTERVAL_MS", INTERVAL_MS),
        lockstep=waves,
        publish_loads=not external,
        stall_s=_number(environment, "PACELINE_VLLM_STALL_TIMEOUT", 30.0),
        log_level=environment.get("PACELINE_VLLM_LOG_LEVEL", "info"),
    )
    made: dict[str, Any] = msgspec.to_builtins(settings)
    del made["channel"]
    return made | {"status_address": environment.get("PACELINE_VLLM_STATUS", "")}


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value <= 3_600_000:
        raise ConfigError(f"{name}: must be a number above 0 and at most 3600000, not {text!r}")
    return value


def _end(processes: list[SpawnProcess], folder: SocketFolder, timeout_s: float | None = None) -> None:
    stop(processes, 2.0 if timeout_s is None else timeout_s)
    folder.close()
