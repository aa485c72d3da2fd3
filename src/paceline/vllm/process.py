"""The coordinator under vLLM as a process: three sockets around the translation around the machine.

Its keeper starts it (`vllm_keeper.py`, by `vllm_main.py`), with pyzmq, msgspec and the standard library: vLLM is never
imported.

Of a rank's load reports only the last is decoded. Ranks are read for a few milliseconds at a time, so that however many
reports wait, what front-ends say and what is due to be published come in between.

What the keeper starts a coordinator under vLLM with, and what it hears from it.

Both cross a socket pair between the two processes as JSON: the keeper imports the standard library alone.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq
from msgspec import Struct

from paceline.core.codec import BadMessage
from paceline.core.coordinator.events import Note
from paceline.net.links import BadFrames, new_identity
from paceline.process.log import set_up_log
from paceline.process.spawn import MallocTrim, Wakeup
from paceline.vllm import codec
from paceline.vllm.codec import Notice, RankMessage, VllmDialect
from paceline.vllm.main import VllmSockets
from paceline.vllm.translation import (
    Event,
    FrontendSaid,
    FrontendSubscribed,
    Greet,
    Memory,
    RankSaid,
    RanksReported,
    RankSubscribed,
    RankUnsubscribed,
    Remember,
    Tick,
    View,
    VllmTranslation,
    Wake,
)


class Settings(Struct, frozen=True):
    """The three addresses to bind, how to speak, and what the coordinator before this one remembered.

    `channel`: the file descriptor of the socket pair. `interval_ms`: least time between two publications of loads.
    """

    channel: int
    front_publish_address: str
    back_output_address: str
    back_publish_address: str
    memory: Memory
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
    """One word of the coordinator to its keeper: what to remember; how things stand. Before these it has said its
    `addresses`, or why there are none (`failed`): `vllm_main.py`.
    """

    memory: Memory | None = None
    status: Status | None = None


logger = logging.getLogger("paceline.vllm")

MESSAGES_A_TURN = 256
"""Read from one socket before the others get their turn and what is due is sent."""
# As plain numbers: to combine enumerations takes longer than to send.
NOBLOCK, MORE, POLLIN = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)
REST_S = 0.0002
"""After a wave's first wake, so that who carries it, and who waits for it, need not share the processors with what else
is to be done about it: that takes as long, and can wait.
"""
READ_S = 0.005
"""As long may ranks be read, where they have said that much, before front-ends get their turn."""


class VllmProcess:
    """The sockets and the loop of one coordinator under vLLM."""

    def __init__(self, settings: Settings, channel: socket.socket, sockets: VllmSockets) -> None:
        self._channel = channel
        self._sockets = sockets
        self._front, self._back_in, self._back_out = sockets.front, sockets.back_in, sockets.back_out
        self._translation = VllmTranslation(
            settings.memory, settings.dialect, identity=new_identity(), interval_s=settings.interval_ms / 1000,
            lockstep=settings.lockstep, publish_loads=settings.publish_loads, restarted=settings.restarted,
            stall_s=settings.stall_s,
        )  # fmt: skip
        self._bad_from_frontends = BadFrames(logger, "the front-ends' socket")
        self._bad_from_ranks = BadFrames(logger, "the ranks' socket")
        self._ranks_wait_until = float("-inf")
        self._stopping = False
        self._wakeup = Wakeup()
        self._malloc_trim = MallocTrim()

    def stop(self) -> None:
        """Make `run` return. Safe in a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def run(self) -> None:
        """Serve until stopped, or until the keeper is gone."""
        watchdog, front, ranks = self._channel.fileno(), self._front.fd, self._back_in.fd
        urgent: list[Any] = [front, self._back_out.fd, self._wakeup.fileno(), watchdog]
        all_of_them = [*urgent, ranks]
        ready: list[Any] = []
        self._handle(Tick())
        while not self._stopping:
            # To ask each socket costs a fraction of what a poll does. What front-ends say is the most urgent.
            busy = False
            if front in ready or _has_message(self._front):
                busy = True
                self._read(self._front, self._on_frontend_frame, self._bad_from_frontends)
            if _has_message(self._back_out):
                busy = True
                self._read(self._back_out, self._on_rank_subscription, self._bad_from_ranks)
            now = time.monotonic()
            ranks_wait = now < self._ranks_wait_until
            if not ranks_wait and _has_message(self._back_in):
                busy = True
                self._read_ranks()
                now = time.monotonic()
            if now >= (deadline := self._translation.deadline):
                self._handle(Tick())
                continue
            if not busy:
                self._malloc_trim.look(now)
            until = min(deadline, self._ranks_wait_until) if ranks_wait else deadline
            # ZeroMQ's own poll knows whole milliseconds, too coarse for what is due in this protocol.
            files = urgent if ranks_wait else all_of_them
            ready, _, _ = select.select(files, (), (), 0 if busy else min(max(until - now, 0), 3600.0))
            if watchdog in ready:
                self._on_watchdog()
        self._wakeup.close()
        self._sockets.close()

    def statistics(self) -> dict[str, object]:
        """The machine's figures and the garbage seen."""
        bad_frames = {"front_ends": dict(self._bad_from_frontends.counts), "ranks": dict(self._bad_from_ranks.counts)}
        return self._translation.statistics() | {"garbage": bad_frames}

    def _on_watchdog(self) -> None:
        """The keeper asks how things stand, or is gone."""
        if self._channel.recv(1):
            say(self._channel, Said(status=Status(self.statistics(), self._translation.loads())))
        else:
            self._stopping = True

    def _read(self, endpoint: zmq.Socket[bytes], take: Callable[[bytes], None], bad_frames: BadFrames) -> None:
        for _ in range(MESSAGES_A_TURN):
            try:
                frame = endpoint.recv(NOBLOCK)
            except zmq.Again:
                return
            if endpoint.getsockopt(zmq.RCVMORE):
                _leave_out(endpoint, bad_frames)
            else:
                take(frame)

    def _read_ranks(self) -> None:
        """Read until nothing is there, or something is due."""
        last: dict[bytes, bytes] = {}
        now, deadline = time.monotonic(), self._translation.deadline
        # What is due already goes out with what they say now.
        until = min(now + READ_S, deadline) if deadline > now else now + READ_S
        receive, whose_report, clock = self._back_in.recv, codec.whose_report, time.monotonic
        while True:
            try:
                frame = receive(NOBLOCK)
            except zmq.Again:
                break
            whose = whose_report(frame)
            if whose is not None:
                last[whose] = frame
            elif self._back_in.getsockopt(zmq.RCVMORE):
                _leave_out(self._back_in, self._bad_from_ranks)
            else:
                # What else a rank says is heard in its place.
                self._reported(last.values())
                last.clear()
                if (message := self._decoded(frame)) is not None:
                    self._handle(RankSaid(message))
            if clock() >= until:
                break
        self._reported(last.values())
        self._ranks_wait_until = self._translation.ranks_may_wait_until(time.monotonic())

    def _reported(self, frames: Iterable[bytes]) -> None:
        if frames:
            messages = [message for frame in frames if (message := self._decoded(frame)) is not None]
            self._handle(RanksReported(messages))

    def _decoded(self, frame: bytes) -> RankMessage | None:
        try:
            return codec.read_rank(frame)
        except BadMessage as error:
            self._bad_from_ranks.add(error.kind, error.detail)
            return None

    def _on_rank_subscription(self, frame: bytes) -> None:
        if frame == b"\x01":
            self._back_out.setsockopt(zmq.SUBSCRIBE, b"")
            self._handle(RankSubscribed())
        elif frame == b"\x00":
            self._handle(RankUnsubscribed())
        else:
            self._bad_from_ranks.add("not-a-subscription", "something was sent up the ranks' broadcast socket")

    def _on_frontend_frame(self, frame: bytes) -> None:
        kind = frame[:1]
        if kind == b"\x01":
            self._handle(FrontendSubscribed())
        elif kind != b"\x00":
            try:
                message = codec.read_frontend(frame)
            except BadMessage as error:
                self._bad_from_frontends.add(error.kind, error.detail)
                return
            sent = self._translation.wake_at_once(message) if isinstance(message, Notice) else None
            if sent is not None:
                self._wake(sent)
                time.sleep(REST_S)
            self._handle(FrontendSaid(message), sent)

    def _wake(self, wake: Wake) -> None:
        kind, what = codec.wake(wake.wave, wake.exclude)
        self._back_out.send(kind, MORE)
        self._back_out.send(what, NOBLOCK)

    def _handle(self, event: Event, sent: Wake | None = None) -> None:
        """`sent`: of the effects, what has been sent already."""
        for effect in self._translation.handle(event, time.monotonic()):
            match effect:
                case View(counts, wave, running):
                    self._front.send(codec.view(counts, wave, running), zmq.NOBLOCK)
                case Wake():
                    if effect != sent:
                        self._wake(effect)
                case Greet():
                    self._back_out.send(codec.READY, zmq.NOBLOCK)
                case Remember(memory):
                    say(self._channel, Said(memory=memory))
                case Note(text, urgent):
                    logger.log(logging.WARNING if urgent else logging.INFO, "%s", text)


def _has_message(endpoint: zmq.Socket[bytes]) -> bool:
    return bool(int(endpoint.getsockopt(zmq.EVENTS)) & POLLIN)


def _leave_out(endpoint: zmq.Socket[bytes], bad_frames: BadFrames) -> None:
    """The frames that follow one, where one is a message."""
    bad_frames.add("frames", f"{1 + len(endpoint.recv_multipart())} frames in place of one")


def say(channel: socket.socket, said: Said) -> None:
    """Tell the keeper. Where it is gone, the loop will see that."""
    try:
        channel.send(msgspec.json.encode(said), socket.MSG_DONTWAIT)
    except OSError as error:
        logger.debug("the keeper does not listen: %s", error)


def run(settings_json: str, channel: socket.socket, sockets: VllmSockets) -> None:
    """Serve until stopped, at sockets that are bound and said to be. `settings_json`: Settings."""
    settings = msgspec.json.decode(settings_json, type=Settings)
    set_up_log(settings.log_level, "coordinator")
    process = VllmProcess(settings, channel, sockets)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())
    # What has been made so far stays: it need not be looked through again and again.
    gc.collect()
    gc.freeze()
    process.run()
