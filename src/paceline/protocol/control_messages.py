"""Suspending and resuming the deployment, and who holds it up (`suspension.py` and `stalls.py` have the rules)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from paceline.protocol.sampling import ControlAction, Count, Identity, Message, RankNumber, StampedWave, SuspendMode


class Suspension(Message, frozen=True, tag="suspension"):
    """Suspend (odd `number`) or resume (even): the highest number counts. Each rank answers with a RankHello.

    `mode`: what becomes of requests: `keep` them as they are, `wait` until they are finished, `abort` them.
    `released`: work starts again, since all ranks know the even number (in lockstep), or without waiting for that.
    """

    number: Count
    mode: SuspendMode
    released: bool = False


class SuspensionState(Message, frozen=True):
    """The suspension in force, or the last one. Odd `number`: suspended; even: resumed; 0: there was none.

    `settled`: every rank has said so. `waiting_for`: the ranks that have not.
    """

    number: Count = 0
    mode: SuspendMode = "keep"
    settled: bool = True
    waiting_for: list[RankNumber] = []


class ControlRequest(Message, frozen=True, tag="control"):
    """Suspend in this mode, or resume. Repeated until it is answered; `call` is the front-end's number for it.

    `answered`: the number that a coordinator answered it with before, 0 for none. `known`, `mode`: of the newest
    suspension that the front-end has heard of, since the coordinator may be new and the ranks, too.
    """

    front_end: Identity
    call: Identity
    action: ControlAction
    answered: Count = 0
    known: StampedWave = 0
    mode: SuspendMode = "keep"


class ControlAnswer(Message, frozen=True, tag="control-answer"):
    """What a ControlRequest asks for holds once the suspension's number is at least `number` and settled."""

    coordinator: Identity
    front_end: Identity
    call: Identity
    number: Count


class StallReport(Message, frozen=True, tag="stall"):
    """This rank has waited for others for longer than the stall timeout; repeated while it does.

    `ranks`: those whose part it lacks, empty once it has gone on. `collective`: its number in the generation,
    `kind`: which one ("all_reduce"). `seconds`: how long it has waited.
    """

    rank: RankNumber
    incarnation: Identity
    step: Count
    ranks: list[RankNumber] = []
    collective: Count = 0
    kind: Annotated[str, Meta(max_length=32)] = ""
    seconds: Annotated[float, Meta(ge=0)] = 0.0


class Stall(Message, frozen=True):
    """A rank that holds others up: in which step and collective of theirs, and for how long they have waited.

    `waiting`: the ranks that wait.
    """

    rank: RankNumber
    step: Count
    collective: Count
    kind: str
    seconds: float
    waiting: list[RankNumber]
