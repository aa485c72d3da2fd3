"""A rank as a process: one thread turns the engine, another carries bytes.

The engine's thread runs the machine and the steps and never touches a socket; the carrier's thread owns all
sockets and never touches the engine. Between them are two queues. A step therefore never waits for the
network, and what a step made is encoded and sent while the next one computes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from paceline.engines.base import Engine, EngineError, EngineRequest
from paceline.engines.group import GenerationEnded as GroupEnded
from paceline.errors import StartupError
from paceline.protocol.messages import Form, ToRank
from paceline.protocol.rank import Phase, Rank
from paceline.protocol.rank_events import (
    IN_MID_STEP,
    Agree,
    CoordinatorSaid,
    Drop,
    DummyStep,
    Effect,
    Event,
    Formed,
    FormGroup,
    GenerationEnded,
    Leave,
    Loaded,
    Step,
    Stepped,
    Take,
    ToCoordinator,
    ToFrontEnd,
    Turn,
    Urge,
    Wait,
)
from paceline.runtime.carrier import Carrier
from paceline.runtime.stall_watch import StallWatch

if TYPE_CHECKING:
    from paceline.runtime.group_seat import GroupSeat  # not needed by independent ranks

logger = logging.getLogger("paceline.rank")

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter while the carrier has something to send."""


class EngineRank:
    """Drives one engine as one rank, until stopped.

    `engine`: anything that meets `Engine`; all calls to it come from the thread that calls `run`.
    `carrier`: the sockets. `seat`: for lockstep engines, its place among its peers; `stall_timeout_s`: how long it
    waits for them before it says so.
    `on_ready`: called once, when the rank takes requests.
    """

    def __init__(
        self,
        engine: Engine,
        machine: Rank,
        carrier: Carrier,
        seat: GroupSeat | None = None,
        stall_timeout_s: float = 30.0,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._carrier = carrier
        self._seat = seat
        self._watch = None if seat is None else StallWatch(stall_timeout_s, seat.waiting, self._decide)
        self._on_ready = on_ready
        self._stopping = False
        # The machine is called by both threads: for the blink of a decision, never while a step computes.
        self._deciding = threading.Lock()
        carrier.on_broadcast = self._on_broadcast

    def stop(self) -> None:
        """Make `run` return after the step it is in. Safe in a signal handler."""
        self._stopping = True
        if self._seat is not None:
            # The step may wait for peers that have stopped already, or never start.
            self._seat.leave()
        self._carrier.inbox.put(None)

    def run(self) -> None:
        """Join the deployment and serve until `stop`. Raises EngineError where the engine fails."""
        self._carrier.start()
        if self._watch is not None:
            self._watch.start()
        self._feed(Loaded())
        while not self._stopping:
            while self._take_in(block_s=0.0):
                pass
            self._feed(Turn(self._engine.load(), self._engine.has_work()))
        self._feed(Leave())
        self._carrier.close()
        if self._seat is not None:
            self._seat.close()
        if self._watch is not None:
            self._watch.stop()
        self._engine.close()

    def _take_in(self, block_s: float | None) -> bool:
        """Handle one thing that arrived, waiting for it up to `block_s` (None: for ever). Returns whether one did."""
        try:
            event = self._carrier.inbox.get(block_s != 0.0, block_s)
        except queue.Empty:
            return False
        if event is not None:
            self._feed(event)
        return True

    def _feed(self, event: Event) -> None:
        for effect in self._decide(event):
            self._perform(effect)
        if self._on_ready is not None and self._machine.phase is Phase.READY:
            self._on_ready()
            self._on_ready = None

    def _decide(self, event: Event) -> list[Effect]:
        """Ask the machine, and send what it says; returns what else is to be done."""
        with self._deciding:
            effects = self._machine.handle(event, time.monotonic())
            # Sent before the other thread's turn to decide: messages go out in the order of decisions.
            return [effect for effect in effects if not self._send(effect)]

    def _send(self, effect: Effect) -> bool:
        match effect:
            case ToFrontEnd(front_end, outputs):
                self._carrier.send_front_end(front_end, outputs)
            case ToCoordinator(message):
                self._carrier.send_coordinator(message)
            case Urge():
                if self._seat is not None:
                    self._seat.urge()
            case _:
                return False
        return True

    def _on_broadcast(self, message: ToRank) -> None:
        """In the carrier's thread."""
        if not isinstance(message, IN_MID_STEP):
            if isinstance(message, Form) and self._seat is not None:
                # Its members may wait in a collective for one that is stopped, or cut off, and not of the new group.
                self._seat.break_off(message.generation)
            self._carrier.inbox.put(CoordinatorSaid(message))
            return
        self._decide(CoordinatorSaid(message))
        # What it changed may be work for the engine's thread, if that sleeps.
        self._carrier.inbox.put(None)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Step(prefill_quota):
                self._engine.limit_prefill(prefill_quota)
                self._step()
            case Take(key, request):
                self._engine.add(
                    EngineRequest(
                        key, request.prompt_token_ids, request.params, request.priority, request.made_token_ids
                    )
                )
            case Drop(key):
                self._engine.abort(key)
            # A stop that was asked for before this has been taken out of the inbox already.
            case Wait(until) if not self._stopping:
                self._take_in(None if until is None else max(0.001, until - time.monotonic()))
            case DummyStep():
                self._dummy_step()
            case Agree():
                self._agree(effect)
            case FormGroup():
                self._form(effect)

    def _form(self, wanted: FormGroup) -> None:
        seat = self._seated()
        try:
            group = seat.form(wanted.generation, wanted.members)
        except StartupError as error:
            logger.warning("rank %d: %s", self._machine.rank, error)
            self._feed(GenerationEnded())
            return
        self._engine.join(group)
        self._feed(Formed(wanted.generation))

    def _agree(self, agree: Agree) -> None:
        seat = self._seated()
        try:
            agreed = seat.agree(agree)
        except GroupEnded as error:
            self._ended(error)
            return
        self._feed(agreed)

    def _seated(self) -> GroupSeat:
        if self._seat is None:
            raise EngineError(f"rank {self._machine.rank}: a lockstep engine without a group")
        return self._seat

    def _ended(self, error: GroupEnded) -> None:
        if not self._stopping:
            logger.warning("rank %d: %s", self._machine.rank, error)
        self._feed(GenerationEnded())

    def _step(self) -> None:
        begin = time.monotonic()
        try:
            result = self._engine.step()
        except GroupEnded as error:
            self._ended(error)
            return
        seconds = time.monotonic() - begin
        load, has_work = self._engine.load(), self._engine.has_work()
        made = (result.prefilled_tokens, result.decoded_tokens, seconds)
        self._feed(Stepped(result.outputs, load, has_work, *made, self._urged()))

    def _dummy_step(self) -> None:
        try:
            self._engine.dummy_step()
        except GroupEnded as error:
            self._ended(error)
            return
        self._feed(Stepped((), self._engine.load(), self._engine.has_work(), urged=self._urged()))

    def _urged(self) -> bool:
        return self._seat is not None and self._seat.urged()
