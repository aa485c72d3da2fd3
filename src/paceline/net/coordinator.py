"""The coordinator as a process: three sockets around its machine.

Imports are kept to pyzmq, msgspec and the standard library: the process is up in well under a quarter of a second and
small. The names, arguments and defaults of `DPCoordinator` and `DPCoordinatorProc` are those of vLLM
(`vllm/v1/engine/coordinator.py`); `docs/reference.md` sets what they do beside vLLM's. The loop is that of every
coordinator (`net/loop.py`). Here are our machine, our codecs, and the two inboxes that read in batches: the more is
said, the less each word of it costs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import zmq

from paceline.core import codec
from paceline.core.coordinator import events
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import FromRank, LoadView, NodeHello, OfRequests, RankFailed, RankReport, StartDPWave
from paceline.errors import StartupError
from paceline.log import note
from paceline.net.handle import ADDRESSES, CoordinatorHandle
from paceline.net.links import BadFrames, new_identity
from paceline.net.loop import CoordinatorLoop, ReportInbox
from paceline.net.sockets import MESSAGES_A_TURN, NOBLOCK, CoordinatorSockets, drain, giving_up_after
from paceline.process.spawn import ChildProcess, stop

if TYPE_CHECKING:
    from paceline.settings import ParallelConfig

logger = logging.getLogger("paceline.coordinator")

PROCESS_NAME = "coordinator"

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
    """What ranks and nodes say to the coordinator. `handle`: the machine's door."""

    def __init__(
        self, socket: zmq.Socket[bytes], bad_frames: BadFrames, handle: Callable[[events.Event], None], *,
        every_report: bool,
    ) -> None:  # fmt: skip
        self._bad_frames = bad_frames
        self._handle = handle
        self._inbox = ReportInbox(
            socket, bad_frames, codec.whose_report, codec.from_rank().decode, self._on_reports, self._on_message,
            parts=1, every_report=every_report, at_once=HANDLED_AT_ONCE,
        )  # fmt: skip
        self.nodes: set[int] = set()
        """Nodes whose presence has appeared; no other is heard, since nobody would learn that it has gone."""

    def read(self, deadline: float) -> None:
        """Read for READ_S at most; what is due at `deadline` (of the monotonic clock) does not wait for it."""
        self._inbox.read_until(min(time.monotonic() + READ_S, deadline))

    def _on_reports(self, messages: list[FromRank]) -> None:
        self._handle(events.RanksReported([message for message in messages if isinstance(message, RankReport)]))

    def _on_message(self, message: FromRank) -> None:
        if isinstance(message, NodeHello | RankFailed) and message.node not in self.nodes:
            self._bad_frames.add("no-presence", f"node {message.node} has not subscribed its presence")
        else:
            self._handle(events.RankSaid(message))


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
    """The coordinator's end of the front-ends' sockets, read in batches. `handle`: the machine's door.

    What a front-end has said is kept until its presence ends. So only those are heard whose presence has appeared: of
    any other nobody would ever learn that it has gone, and ids that somebody invents would be kept for ever.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], bad_frames: BadFrames, handle: Callable[[events.Event], None]
    ) -> None:
        self._socket = socket
        self._bad_frames = bad_frames
        self._handle = handle
        self._decoder = codec.from_frontend()
        self._of_requests: list[OfRequests] = []
        self._present: set[int] = set()

    def read(self) -> None:
        for [frame] in drain(self._socket, self._bad_frames, messages=MESSAGES_A_TURN):
            if frame[:1] in (b"\x00", b"\x01"):
                self._on_subscription(frame)
                continue
            message = self._bad_frames.decoded(self._decoder.decode, frame)
            if message is None:
                continue
            if message.frontend not in self._present:
                self._bad_frames.add("no-presence", f"front-end {message.frontend} has not subscribed its presence")
            elif isinstance(message, OfRequests):
                self._of_requests.append(message)
            else:
                self._flush()
                self._handle(events.FrontendSaid(message))
        self._flush()

    def _flush(self) -> None:
        """Everything is heard in its place."""
        if self._of_requests:
            messages, self._of_requests = self._of_requests, []
            self._handle(events.FrontendsSaid(messages))

    def _on_subscription(self, frame: bytes) -> None:
        self._flush()
        frontend = codec.read_frontend_topic(frame[1:])
        if frame[0] == 1:
            if frontend is not None and len(self._present) >= MAX_PRESENT:
                self._bad_frames.add("too-many", f"{MAX_PRESENT} front-ends are there")
                return
            if frontend is not None:
                self._present.add(frontend)
            self._handle(events.FrontendSubscribed())
        elif frontend is not None:
            self._present.discard(frontend)
            self._handle(events.FrontendGone(frontend))


class DPCoordinator(CoordinatorHandle):
    """Starts a coordinator process and knows its addresses.

    `parallel_config`: any object with the fields of `paceline.settings.ParallelConfig`, vLLM's own included.
    `rank_timeout_s`: how long a rank's process may be silent before it is taken for lost, 0 for ever.
    Raises StartupError where it does not come up within `startup_timeout_s`.
    """

    def __init__(
        self, parallel_config: ParallelConfig, enable_wave_coordination: bool = True,
        logging_config: dict[str, Any] | None = None, startup_timeout_s: float = 30.0, rank_timeout_s: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        external = parallel_config.data_parallel_external_lb
        self._arguments: dict[str, Any] = self._chosen_addresses(parallel_config) | {
            "engine_count": parallel_config.data_parallel_size,
            # vLLM's configuration has neither this nor `most_ranks`.
            "min_stats_update_interval_ms":
                0 if external else getattr(parallel_config, "min_stats_update_interval_ms", 100),
            "publish_loads": not external,
            "most_ranks": getattr(parallel_config, "most_ranks", None),
            "enable_wave_coordination": enable_wave_coordination,
            "rank_timeout_s": rank_timeout_s,
        }  # fmt: skip
        self._log_level = (logging_config or {}).get("level", "info")
        self._startup_timeout_s = startup_timeout_s
        try:
            self._start()
        except StartupError:
            self.shutdown()
            raise

    def restart(self) -> ChildProcess:
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
        target = DPCoordinatorProc.run_coordinator
        self._start_process(
            PROCESS_NAME, target, "zmq_addr_pipe", self._arguments, self._log_level, self._startup_timeout_s
        )
        self._arguments |= dict(zip(ADDRESSES, self._addresses, strict=True)) | {"fresh": False}


class DPCoordinatorProc(CoordinatorLoop):
    """One coordinator: its machine behind its sockets.

    `publish_loads`: False in external mode. `fresh`: False where it takes the place of one that has ended.
    """

    def __init__(
        self, engine_count: int, min_stats_update_interval_ms: int = 100, enable_wave_coordination: bool = True,
        publish_loads: bool = True, fresh: bool = True, rank_timeout_s: float = 0.0, most_ranks: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(logger)
        self._machine = Coordinator(
            engine_count,
            identity=new_identity(),
            interval_s=min_stats_update_interval_ms / 1000,
            lockstep=enable_wave_coordination,
            publish_loads=publish_loads,
            fresh=fresh,
            # Ranks that are not of ours may begin without; a coordinator in another's place must believe no stranger.
            presence=not fresh,
            most_ranks=most_ranks,
        )
        self._engine_count = engine_count
        self._patience = giving_up_after(rank_timeout_s)

    @staticmethod
    def run_coordinator(
        engine_count: int, front_publish_address: str, back_output_address: str, back_publish_address: str,
        min_stats_update_interval_ms: int = 100, zmq_addr_pipe: Connection | None = None, **further: Any,
    ) -> None:  # fmt: skip
        """Bind, report the bound addresses through the pipe, and run until END.

        The pipe gets `(front_publish, back_output, back_publish)` once all three are bound, or a string that says why
        they cannot be. `further`: what else `DPCoordinatorProc` takes.
        """
        process = DPCoordinatorProc(engine_count, min_stats_update_interval_ms, **further)
        process.stop_on_signals()

        def report(addresses: tuple[str, str, str]) -> None:
            if zmq_addr_pipe is not None:
                zmq_addr_pipe.send(addresses)
                zmq_addr_pipe.close()

        try:
            process.process_input_socket(front_publish_address, back_output_address, back_publish_address, report)
        except StartupError as error:
            if zmq_addr_pipe is None:
                raise
            zmq_addr_pipe.send(str(error))

    def process_input_socket(
        self, front_publish_address: str, back_output_address: str, back_publish_address: str,
        on_bound: Callable[[tuple[str, str, str]], None] = lambda addresses: None,
    ) -> None:  # fmt: skip
        """Bind the three sockets, say where each can be reached, and serve until stopped. Raises StartupError."""
        self._sockets = CoordinatorSockets(
            front_publish_address, back_output_address, back_publish_address, kept=reports_kept(self._engine_count),
            front_options={zmq.SNDHWM: views_queued(self._engine_count)}, back_options=self._patience,
        )  # fmt: skip
        front, back_in = self._sockets.front, self._sockets.back_in
        self._front_inbox = FrontendInbox(front, self._bad_from_frontends, self._handle)
        self._inbox = RankInbox(back_in, self._bad_from_ranks, self._handle, every_report=self._machine.lockstep)
        on_bound(self._sockets.addresses())
        self._serve()

    @property
    def deadline(self) -> float:
        return self._machine.deadline

    def _tick(self) -> None:
        self._handle(events.Tick())

    def _read_frontends(self) -> None:
        self._front_inbox.read()

    def _read_ranks(self) -> None:
        self._inbox.read(self._machine.deadline)

    def _on_rank_subscription(self, frame: bytes) -> None:
        life, node = codec.read_rank_topic(frame[1:]), codec.read_node_topic(frame[1:])
        if frame[:1] == b"\x01":
            if node is not None:
                self._inbox.nodes.add(node)
            self._handle(events.RankSubscribed() if life is None else events.RankSubscribed(*life))
        elif frame[:1] == b"\x00":
            if life is not None:
                # What it said before its end counts: that it leaves, for one.
                self._inbox.read(self._machine.deadline)
                self._handle(events.RankGone(*life))
            elif node is not None:
                self._inbox.nodes.discard(node)
                self._handle(events.NodeGone(node))
        else:
            self._bad_from_ranks.add("not-a-subscription", "something was sent up the ranks' broadcast socket")

    def _handle(self, event: events.Event) -> None:
        for effect in self._machine.handle(event, time.monotonic()):
            match effect:
                case events.ToFrontends(message):
                    self._sockets.front.send(codec.encode(message), NOBLOCK)
                    if isinstance(message, LoadView) and logger.isEnabledFor(logging.DEBUG):
                        logger.debug("published, as [waiting, running] by rank: %s", self._get_engine_counts())
                case events.ToRanks(StartDPWave(wave, exclude)):
                    self._send_start_wave(self._sockets.back_out, wave, exclude)
                case events.ToRanks(message):
                    self._sockets.back_out.send(codec.encode(message), NOBLOCK)
                case events.Note():
                    note(logger, effect)

    @staticmethod
    def _send_start_wave(socket: zmq.Socket[bytes], wave: int, exclude_engine_index: int | None) -> None:
        """Broadcast START_DP_WAVE: every paused rank starts running in `wave`, but for the one that runs already."""
        socket.send(codec.encode(StartDPWave(wave, exclude_engine_index)), NOBLOCK)

    def _get_engine_counts(self) -> list[list[int]]:
        """[waiting, running] of each rank, in order; zeros where it has not reported."""
        return self._machine.request_counts()
