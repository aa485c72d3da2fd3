"""The coordinator as a process: three sockets around its machine.

Imports are kept to pyzmq, msgspec and the standard library: the process is up in well under a quarter of
a second and small. The names, arguments and defaults of `DPCoordinator` and `DPCoordinatorProc` are those
of vLLM (`vllm/v1/engine/coordinator.py`), so that an engine that starts its coordinator can start this one.

What ranks say to the coordinator, read in batches: a report costs little, and what is due is not late for it.

What front-ends say to the coordinator, read in batches: the more they say, the less each of it costs.
"""

from __future__ import annotations

import logging
import multiprocessing
import select
import signal
import time
import weakref
from collections.abc import Callable, Iterable
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

import zmq

from paceline.core import codec
from paceline.core.coordinator.events import (
    Event,
    FrontendGone,
    FrontendSaid,
    FrontendsSaid,
    FrontendSubscribed,
    NodeGone,
    Note,
    RankGone,
    RankSaid,
    RanksReported,
    RankSubscribed,
    Tick,
    ToFrontends,
    ToRanks,
)
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import FromFrontend, FromRank, NodeHello, OfRequests, RankFailed, RankReport
from paceline.errors import StartupError
from paceline.net.links import BadFrames, SocketFolder, new_identity
from paceline.net.sockets import bound_address, giving_up_after, open_socket, tcp_address
from paceline.process.spawn import MallocTrim, Wakeup, spawn, stop

if TYPE_CHECKING:
    from paceline.settings import ParallelConfig

READ_S = 0.002
"""As long may be read before what has come is handled."""
HANDLED_AT_ONCE = 128
"""Reports: what is due must not wait for more of them than take a fraction of a millisecond."""
REPORTS_KEPT, LEAST_KEPT = 32_768, 16
"""Messages of all ranks, and at least of each, that wait unread. Each costs up to a kilobyte."""


def reports_kept(ranks: int) -> int:
    """How many messages of one rank wait here; the rank keeps what is beyond, and drops what is too old for it."""
    return max(LEAST_KEPT, REPORTS_KEPT // ranks)


class RankInbox:
    """The coordinator's end of the ranks' PUSH sockets. `handle`: the machine's door.

    `every_report`: in lockstep a view wants one step's loads, so none is left out. Else a rank's last one says all.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], bad_frames: BadFrames, handle: Callable[[Event], None], *, every_report: bool
    ) -> None:
        self._socket = socket
        self._bad_frames = bad_frames
        self._handle = handle
        self._every_report = every_report
        self._decoder = codec.from_rank()
        self.nodes: set[int] = set()
        """Nodes whose presence has appeared; no other is heard, since nobody would learn that it has gone."""

    def read(self, deadline: float) -> None:
        """Read until nothing is there, or something is due (`deadline`, by the monotonic clock)."""
        until = min(time.monotonic() + READ_S, deadline)
        reports: dict[bytes | int, bytes] = {}
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if self._socket.getsockopt(zmq.RCVMORE):
                frames = 1 + len(self._socket.recv_multipart())
                self._bad_frames.add("frames", f"{frames} frames in place of one")
                continue
            whose = codec.whose_report(frame)
            if whose is None:
                # What else a rank says is heard in its place.
                self._reported(reports.values())
                reports.clear()
                self._said(frame)
            elif self._every_report:
                reports[len(reports)] = frame
                if len(reports) == HANDLED_AT_ONCE:
                    self._reported(reports.values())
                    reports.clear()
            else:
                reports[whose] = frame
            if time.monotonic() >= until:
                break
        self._reported(reports.values())

    def _reported(self, frames: Iterable[bytes]) -> None:
        remaining = iter(frames)
        while chunk := list(islice(remaining, HANDLED_AT_ONCE)):
            messages = [self._decoded(frame) for frame in chunk]
            self._handle(RanksReported([message for message in messages if isinstance(message, RankReport)]))

    def _said(self, frame: bytes) -> None:
        message = self._decoded(frame)
        if isinstance(message, NodeHello | RankFailed) and message.node not in self.nodes:
            self._bad_frames.add("no-presence", f"node {message.node} has not subscribed its presence")
        elif message is not None:
            self._handle(RankSaid(message))

    def _decoded(self, frame: bytes) -> FromRank | None:
        try:
            return self._decoder.decode(frame)
        except codec.BadMessage as error:
            self._bad_frames.add(error.kind, error.detail)
            return None


READ_AT_ONCE = 256
"""Messages that are read before others get their turn and what is due is sent."""

MAX_PRESENT = 65536
"""Front-ends that are heard at once: in external mode each of as many ranks as there can be has one."""


MOST_QUEUED, LEAST_QUEUED = 1_000, 64
QUEUED_BYTES, VIEW_BYTES_A_RANK = 64 << 20, 512


def views_queued(ranks: int) -> int:
    """How many messages wait for a front-end that does not read; it loses what is beyond, and the next view says all.

    Those that wait for several are there once.
    """
    return max(LEAST_QUEUED, min(MOST_QUEUED, QUEUED_BYTES // (ranks * VIEW_BYTES_A_RANK)))


class FrontendInbox:
    """The coordinator's end of the front-ends' sockets. `handle`: the machine's door.

    What a front-end has said is kept until its presence ends. So only those are heard whose presence has appeared: of
    any other nobody would ever learn that it has gone, and ids that somebody invents would be kept for ever.
    """

    def __init__(self, socket: zmq.Socket[bytes], bad_frames: BadFrames, handle: Callable[[Event], None]) -> None:
        self._socket = socket
        self._bad_frames = bad_frames
        self._handle = handle
        self._decoder = codec.from_frontend()
        self._of_requests: list[OfRequests] = []
        self._present: set[int] = set()

    def read(self) -> None:
        """Read what is there, up to READ_AT_ONCE."""
        for _ in range(READ_AT_ONCE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 1 or not frames[0]:
                self._bad_frames.add("frames", f"{len(frames)} frames in place of one")
            elif frames[0][0] in (0, 1):
                self._on_subscription(frames[0])
            else:
                message = self._decoded(frames[0])
                if message is None:
                    continue
                if message.frontend not in self._present:
                    self._bad_frames.add("no-presence", f"front-end {message.frontend} has not subscribed its presence")
                elif isinstance(message, OfRequests):
                    self._of_requests.append(message)
                else:
                    self._flush()
                    self._handle(FrontendSaid(message))
        self._flush()

    def _flush(self) -> None:
        """Everything is heard in its place."""
        if self._of_requests:
            messages, self._of_requests = self._of_requests, []
            self._handle(FrontendsSaid(messages))

    def _on_subscription(self, frame: bytes) -> None:
        self._flush()
        frontend = codec.read_frontend_topic(frame[1:])
        if frame[0] == 1:
            if frontend is not None and len(self._present) >= MAX_PRESENT:
                self._bad_frames.add("too-many", f"{MAX_PRESENT} front-ends are there")
                return
            if frontend is not None:
                self._present.add(frontend)
            self._handle(FrontendSubscribed())
        elif frontend is not None:
            self._present.discard(frontend)
            self._handle(FrontendGone(frontend))

    def _decoded(self, frame: bytes) -> FromFrontend | None:
        try:
            return self._decoder.decode(frame)
        except codec.BadMessage as error:
            self._bad_frames.add(error.kind, error.detail)
            return None


logger = logging.getLogger("paceline.coordinator")

PROCESS_NAME = "coordinator"
MESSAGES_A_TURN = 256
"""Read from one socket before the others get their turn and what is due is sent."""


class DPCoordinator:
    """Starts a coordinator process and knows its addresses.

    `parallel_config`: any object with the fields of `paceline.settings.ParallelConfig`, vLLM's own included.
    `rank_timeout_s`: how long a rank's process may be silent before it is taken for lost, 0 for ever.
    Raises StartupError where it does not come up within `startup_timeout_s`.
    """

    def __init__(
        self,
        parallel_config: ParallelConfig,
        enable_wave_coordination: bool = True,
        logging_config: dict[str, Any] | None = None,
        startup_timeout_s: float = 30.0,
        rank_timeout_s: float = 0.0,
    ) -> None:
        self._folder = SocketFolder()
        self._arguments = _process_arguments(parallel_config, self._folder)
        self._arguments["enable_wave_coordination"] = enable_wave_coordination
        self._arguments["rank_timeout_s"] = rank_timeout_s
        self._log_level = (logging_config or {}).get("level", "info")
        self._startup_timeout_s = startup_timeout_s
        self._processes: list[SpawnProcess] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, self._folder)
        try:
            self._start()
        except StartupError:
            self.shutdown()
            raise

    @property
    def proc(self) -> SpawnProcess:
        """The process that runs now."""
        return self._processes[-1]

    def restart(self) -> SpawnProcess:
        """Start another in place of one that has ended, at the same addresses.

        Raises StartupError, after which it can be called again.

        Nothing has to be handed over: it asks the ranks, and front-ends keep what it does not know yet.
        """
        stop(self._processes, 0.0)
        self._processes.clear()
        self._start()
        return self.proc

    def resized(self, size: int) -> None:
        """The deployment has so many ranks by now: the next process begins with that."""
        self._arguments["engine_count"] = size

    def _start(self) -> None:
        reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
        kwargs = self._arguments | {"zmq_addr_pipe": writer}
        self._processes.append(spawn(PROCESS_NAME, DPCoordinatorProc.run_coordinator, kwargs, self._log_level))
        writer.close()
        try:
            addresses = _read_addresses(reader, self._startup_timeout_s)
        finally:
            reader.close()
        self._front_publish, self._back_output, self._back_publish = addresses
        names = ("front_publish_address", "back_output_address", "back_publish_address")
        self._arguments |= dict(zip(names, addresses, strict=True)) | {"fresh": False}

    def get_stats_publish_address(self) -> str:
        """Where front-ends connect."""
        return self._front_publish

    def get_engine_socket_addresses(self) -> tuple[str, str]:
        """Where ranks connect: (their input, the coordinator's broadcasts; their output, its inbox)."""
        return self._back_publish, self._back_output

    def shutdown(self, timeout: float | None = None) -> None:
        """End the process, waiting up to `timeout` seconds before it is killed. May be called twice."""
        if self._finalizer.detach():
            _end(self._processes, self._folder, timeout)


class DPCoordinatorProc:
    """The sockets and the loop of one coordinator."""

    def __init__(
        self,
        engine_count: int,
        min_stats_update_interval_ms: int = 100,
        enable_wave_coordination: bool = True,
        publish_loads: bool = True,
        fresh: bool = True,
        rank_timeout_s: float = 0.0,
        most_ranks: int | None = None,
    ) -> None:
        self._machine = Coordinator(
            engine_count,
            identity=new_identity(),
            interval_s=min_stats_update_interval_ms / 1000,
            lockstep=enable_wave_coordination,
            publish_loads=publish_loads,
            fresh=fresh,
            # Ranks that are not of ours may begin without; who takes another's place must believe no stranger.
            presence=not fresh,
            most_ranks=most_ranks,
        )
        self._engine_count = engine_count
        self._patience = giving_up_after(rank_timeout_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._bad_from_frontends = BadFrames(logger, "the front-ends' socket")
        self._bad_from_ranks = BadFrames(logger, "the ranks' socket")
        self._stopping = False
        self._wakeup = Wakeup()
        self._malloc_trim = MallocTrim()

    @staticmethod
    def run_coordinator(
        engine_count: int,
        front_publish_address: str,
        back_output_address: str,
        back_publish_address: str,
        zmq_addr_pipe: Connection | None = None,
        min_stats_update_interval_ms: int = 100,
        enable_wave_coordination: bool = True,
        publish_loads: bool = True,
        fresh: bool = True,
        rank_timeout_s: float = 0.0,
        most_ranks: int | None = None,
    ) -> None:
        """Bind, report the bound addresses through the pipe, and run until SIGTERM.

        The pipe gets `(front_publish, back_output, back_publish)` once all three are bound, or a string
        that says why they cannot be. `fresh`: False where it takes the place of one that has ended.
        """
        interval_ms, waves = min_stats_update_interval_ms, enable_wave_coordination
        process = DPCoordinatorProc(engine_count, interval_ms, waves, publish_loads, fresh, rank_timeout_s, most_ranks)
        process.stop_on_signals()
        try:
            addresses = process.bind(front_publish_address, back_output_address, back_publish_address)
        except StartupError as error:
            if zmq_addr_pipe is None:
                raise
            zmq_addr_pipe.send(str(error))
            return
        if zmq_addr_pipe is not None:
            zmq_addr_pipe.send(addresses)
            zmq_addr_pipe.close()
        process.run()

    def bind(self, front_publish: str, back_output: str, back_publish: str) -> tuple[str, str, str]:
        """Bind the three sockets; returns where each can be reached. Raises StartupError."""
        limit = codec.MAX_CONTROL_BYTES
        queued = {zmq.SNDHWM: views_queued(self._engine_count)}
        self._front = open_socket(self._context, zmq.XPUB, bind=front_publish, max_bytes=limit, options=queued)
        self._front_inbox = FrontendInbox(self._front, self._bad_from_frontends, self._handle)
        kept = reports_kept(self._engine_count)
        self._back_in = open_socket(self._context, zmq.PULL, bind=back_output, max_bytes=limit, kept=kept)
        self._inbox = RankInbox(self._back_in, self._bad_from_ranks, self._handle, every_report=self._machine.lockstep)
        patience = self._patience
        self._back_out = open_socket(self._context, zmq.XPUB, bind=back_publish, max_bytes=limit, options=patience)
        return bound_address(self._front), bound_address(self._back_in), bound_address(self._back_out)

    def stop_on_signals(self) -> None:
        """Let SIGTERM, and Ctrl-C where it is not ignored, end `run`."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda *_: self.stop())

    def stop(self) -> None:
        """Make `run` return. Safe in a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def run(self) -> None:
        """Serve until stopped."""
        poller = zmq.Poller()
        for socket in (self._front, self._back_in, self._back_out):
            poller.register(socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        files: list[Any] = [self._front.fd, self._back_in.fd, self._back_out.fd, self._wakeup.fileno()]
        while not self._stopping:
            ready = dict(poller.poll(0))
            if not ready and (now := time.monotonic()) < self._machine.deadline:
                self._malloc_trim.look(now)
                # ZeroMQ's poll knows whole milliseconds, too coarse for what is due in this protocol.
                select.select(files, (), (), max(0.0, self._machine.deadline - time.monotonic()))
                ready = dict(poller.poll(0))
            if self._back_out in ready:
                self._read_subscriptions()
            if self._front in ready:
                self._front_inbox.read()
            if self._back_in in ready:
                self._inbox.read(self._machine.deadline)
            self._handle(Tick())
        self._wakeup.close()
        self._context.destroy(linger=0)

    def statistics(self) -> dict[str, object]:
        """The machine's figures and the garbage seen."""
        bad_frames = {"front_ends": dict(self._bad_from_frontends.counts), "ranks": dict(self._bad_from_ranks.counts)}
        return self._machine.statistics() | {"garbage": bad_frames}

    def _read_subscriptions(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            try:
                frames = self._back_out.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_rank_subscription(frames)

    def _on_rank_subscription(self, frames: list[bytes]) -> None:
        frame = frames[0] if len(frames) == 1 else b""
        life, node = codec.read_rank_topic(frame[1:]), codec.read_node_topic(frame[1:])
        if frame[:1] == b"\x01":
            if node is not None:
                self._inbox.nodes.add(node)
            self._handle(RankSubscribed() if life is None else RankSubscribed(*life))
        elif frame[:1] == b"\x00":
            if life is not None:
                self._handle(RankGone(*life))
            elif node is not None:
                self._inbox.nodes.discard(node)
                self._handle(NodeGone(node))
        else:
            self._bad_from_ranks.add("not-a-subscription", "something was sent up the ranks' broadcast socket")

    def _handle(self, event: Event) -> None:
        for effect in self._machine.handle(event, time.monotonic()):
            match effect:
                case ToFrontends(message):
                    self._front.send(codec.encode(message), zmq.NOBLOCK)
                case ToRanks(message):
                    self._back_out.send(codec.encode(message), zmq.NOBLOCK)
                case Note(text, urgent):
                    logger.log(logging.WARNING if urgent else logging.INFO, "%s", text)


def _process_arguments(config: ParallelConfig, folder: SocketFolder) -> dict[str, Any]:
    """Addresses and interval as the reference chooses them."""
    host = config.data_parallel_master_ip
    external = config.data_parallel_external_lb
    front_local = not (external or getattr(config, "data_parallel_hybrid_lb", False))
    back_local = config.data_parallel_size == config.data_parallel_size_local

    def address(local: bool, name: str) -> str:
        return folder.address(name) if local else tcp_address(host)

    return {
        "engine_count": config.data_parallel_size,
        "front_publish_address": address(front_local, "front-publish"),
        "back_output_address": address(back_local, "back-output"),
        "back_publish_address": address(back_local, "back-publish"),
        # vLLM's configuration has neither this nor the last one.
        "min_stats_update_interval_ms": 0 if external else getattr(config, "min_stats_update_interval_ms", 100),
        "publish_loads": not external,
        "most_ranks": getattr(config, "most_ranks", None),
    }


def _read_addresses(reader: Connection, timeout_s: float) -> tuple[str, str, str]:
    try:
        if not reader.poll(timeout_s):
            raise StartupError(f"the coordinator did not report its addresses within {timeout_s:g} s")
        answer = reader.recv()
    except EOFError:
        raise StartupError("the coordinator ended before it was up") from None
    if isinstance(answer, str):
        raise StartupError(f"coordinator: {answer}")
    addresses: tuple[str, str, str] = answer
    return addresses


def _end(processes: list[SpawnProcess], folder: SocketFolder, timeout_s: float | None = None) -> None:
    stop(processes, 2.0 if timeout_s is None else timeout_s)
    folder.close()
