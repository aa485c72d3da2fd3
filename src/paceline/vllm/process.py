"""The coordinator under vLLM as a process: the loop of every coordinator, around the translation around the machine.

Its watchdog starts it (`vllm/watchdog.py`, by `vllm/main.py`), with pyzmq, msgspec and the standard library: vLLM is
never imported. What the two tell each other crosses a socket pair as JSON, since the watchdog imports the standard
library alone.

Of a rank's load reports only the last is decoded. Ranks are read for a few milliseconds at a time, so that however many
reports wait, what front-ends say and what is due to be published come in between.
"""

from __future__ import annotations

import gc
import logging
import socket
import time

import msgspec
import zmq
from msgspec import Struct

from paceline.core.coordinator.events import Note
from paceline.log import note, set_up_log
from paceline.net.links import new_identity
from paceline.net.loop import CoordinatorLoop, ReportInbox
from paceline.net.sockets import MESSAGES_A_TURN, NOBLOCK, CoordinatorSockets, drain
from paceline.vllm import codec, translation
from paceline.vllm.codec import Notice, VllmDialect

logger = logging.getLogger("paceline.vllm")

# As a plain number: to combine enumerations takes longer than to send.
SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
REST_S = 0.0002
"""After a wave's first wake, so that what carries it, and what waits for it, need not share the processors with what
else is to be done about it: that takes as long, and can wait.
"""
READ_S = 0.005
"""As long may ranks be read, where they have said that much, before front-ends get their turn."""


class Settings(Struct, frozen=True):
    """The three addresses to bind, how to speak, and what the coordinator before this one remembered.

    `channel`: the file descriptor of the socket pair. `interval_ms`: least time between two publications of loads.
    """

    channel: int
    front_publish_address: str
    back_output_address: str
    back_publish_address: str
    memory: translation.Memory
    dialect: VllmDialect = VllmDialect()
    interval_ms: float = 10.0
    lockstep: bool = True
    publish_loads: bool = True
    restarted: bool = False
    stall_s: float = 30.0
    log_level: str = "info"


class Status(Struct, frozen=True):
    """What `/health` and `/loads` say."""

    health: dict[str, object]
    loads: list[dict[str, object]]


class Said(Struct, frozen=True, omit_defaults=True):
    """One word of the coordinator to its watchdog: what to remember; how things stand. Before these it has said its
    `addresses`, or why there are none (`failed`): `vllm/main.py`.
    """

    memory: translation.Memory | None = None
    status: Status | None = None


class VllmProcess(CoordinatorLoop):
    """One coordinator under vLLM: the translation behind its sockets."""

    def __init__(self, settings: Settings, channel: socket.socket, sockets: CoordinatorSockets) -> None:
        super().__init__(logger)
        self._channel = channel
        self._sockets = sockets
        self._translation = translation.VllmTranslation(
            settings.memory, settings.dialect, identity=new_identity(), interval_s=settings.interval_ms / 1000,
            lockstep=settings.lockstep, publish_loads=settings.publish_loads, restarted=settings.restarted,
            stall_s=settings.stall_s,
        )  # fmt: skip
        self._inbox = ReportInbox(
            sockets.back_in, self._bad_from_ranks, codec.whose_report, codec.read_rank,
            lambda messages: self._handle(translation.RanksReported(messages)),
            lambda message: self._handle(translation.RankSaid(message)),
            parts=None, every_report=False, at_once=codec.MOST_RANKS,
        )  # fmt: skip

    def run(self) -> None:
        """Serve until stopped, or until the watchdog is gone."""
        self._serve(self._channel.fileno(), self._on_watchdog)

    @property
    def deadline(self) -> float:
        return self._translation.deadline

    def _tick(self) -> None:
        self._handle(translation.Tick())

    def _on_watchdog(self) -> None:
        if self._channel.recv(1):
            say(self._channel, Said(status=Status(self._statistics(), self._translation.loads())))
        else:
            self.stop()

    def _statistics(self) -> dict[str, object]:
        bad_frames = {"front_ends": dict(self._bad_from_frontends.counts), "ranks": dict(self._bad_from_ranks.counts)}
        return self._translation.statistics() | {"garbage": bad_frames}

    def _read_ranks(self) -> None:
        now, deadline = time.monotonic(), self.deadline
        # What is due already goes out with what they say now.
        self._inbox.read_until(min(now + READ_S, deadline) if deadline > now else now + READ_S)
        self._ranks_wait_until = self._translation.ranks_may_wait_until(time.monotonic())

    def _on_rank_subscription(self, frame: bytes) -> None:
        if frame == b"\x01":
            self._sockets.back_out.setsockopt(zmq.SUBSCRIBE, b"")
            self._handle(translation.RankSubscribed())
        elif frame == b"\x00":
            self._handle(translation.RankUnsubscribed())
        else:
            self._bad_from_ranks.add("not-a-subscription", "something was sent up the ranks' broadcast socket")

    def _read_frontends(self) -> None:
        for [frame] in drain(self._sockets.front, self._bad_from_frontends, messages=MESSAGES_A_TURN):
            self._on_frontend_frame(frame)

    def _on_frontend_frame(self, frame: bytes) -> None:
        kind = frame[:1]
        if kind == b"\x01":
            self._handle(translation.FrontendSubscribed())
        elif kind != b"\x00" and (message := self._bad_from_frontends.decoded(codec.read_frontend, frame)) is not None:
            sent = self._translation.wake_at_once(message) if isinstance(message, Notice) else None
            if sent is not None:
                self._wake(sent)
                time.sleep(REST_S)
            self._handle(translation.FrontendSaid(message), sent)

    def _wake(self, wake: translation.Wake) -> None:
        kind, what = codec.wake(wake.wave, wake.exclude)
        self._sockets.back_out.send(kind, SEND_MORE)
        self._sockets.back_out.send(what, NOBLOCK)

    def _handle(self, event: translation.Event, sent: translation.Wake | None = None) -> None:
        """The machine's door. `sent`: of the effects, what has been sent already."""
        for effect in self._translation.handle(event, time.monotonic()):
            match effect:
                case translation.View(counts, wave, running):
                    self._sockets.front.send(codec.view(counts, wave, running), NOBLOCK)
                case translation.Wake():
                    if effect != sent:
                        self._wake(effect)
                case translation.Greet():
                    self._sockets.back_out.send(codec.READY, NOBLOCK)
                case translation.Remember(memory):
                    say(self._channel, Said(memory=memory))
                case Note():
                    note(logger, effect)


def say(channel: socket.socket, said: Said) -> None:
    """Tell the watchdog. Where it is gone, the loop will see that."""
    try:
        channel.send(msgspec.json.encode(said), socket.MSG_DONTWAIT)
    except OSError as error:
        logger.debug("the watchdog does not listen: %s", error)


def run(settings_json: str, channel: socket.socket, sockets: CoordinatorSockets) -> None:
    """Serve until stopped, at sockets that are bound and said to be. `settings_json`: Settings."""
    settings = msgspec.json.decode(settings_json, type=Settings)
    set_up_log(settings.log_level, "coordinator")
    process = VllmProcess(settings, channel, sockets)
    process.stop_on_signals()
    # What has been made so far stays: it need not be looked through again and again.
    gc.collect()
    gc.freeze()
    process.run()
