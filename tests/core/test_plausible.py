"""Absurd numbers: nobody takes them up, and what is said after them can still be heard."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from paceline.core import codec
from paceline.core.coordinator.events import FrontendSaid, RankSaid, ToFrontends, ToRanks
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend.events import CoordinatorSaid as FrontendHears, Submit
from paceline.core.frontend.machine import Frontend
from paceline.core.load import FAR, NEAR, Load, plausible
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Admit,
    Form,
    FrontendHello,
    GroupMember,
    LoadView,
    Member,
    Members,
    RankHello,
    RankReport,
    RankView,
    Shares,
    StartDPWave,
    StartWave,
    Suspension,
    SuspensionState,
    WaveComplete,
)
from paceline.core.rank.events import CoordinatorSaid, Formed, FormGroup, Loaded, ToCoordinator, Turn
from paceline.core.rank.machine import Rank
from paceline.core.requests import LARGEST_STAMP, SamplingParams
from paceline.core.routing.least import LeastLoad

LARGEST = 2**53 - 1
LIFE = 11


def hello(**fields: Any) -> RankHello:
    return RankHello(PROTOCOL_VERSION, 0, LIFE, "tcp://rank", True, **fields)


def test_what_can_have_been_counted() -> None:
    assert plausible(5, 0)
    assert plausible(FAR, 0)
    assert plausible(FAR + 2 * NEAR, FAR + NEAR)
    assert not plausible(FAR + NEAR + 1, 0)
    assert not plausible(LARGEST, FAR)


@pytest.mark.parametrize(
    "said",
    [
        hello(wave=LARGEST),
        hello(suspension=LARGEST),
        hello(group_address="ipc://group", generation=LARGEST),
        hello(group_address="ipc://group", told=LARGEST),
        RankReport(0, LIFE, 1, LARGEST, True, Load()),
        StartWave(0, LIFE, LARGEST),
        WaveComplete(0, LIFE, LARGEST),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_the_coordinator_takes_up_no_absurd_number(said: Any) -> None:
    machine = Coordinator(1, 7, 0.0)
    decoders = {ToRanks: codec.to_rank(), ToFrontends: codec.to_frontend()}
    messages = [hello(group_address="ipc://group"), said, hello(group_address="ipc://group", generation=1, told=1)]
    for now, message in enumerate([*messages, StartWave(0, LIFE, 3), WaveComplete(0, LIFE, 3)]):
        for effect in machine.handle(RankSaid(message), float(now)):
            if type(effect) in decoders:
                decoders[type(effect)].decode(codec.encode(effect.message))  # type: ignore[union-attr]
    known = machine.statistics()
    assert (known["wave"], known["suspension"], known["generation"]) == (4, 0, 1)


def test_a_frontend_does_not_move_the_suspension_out_of_reach() -> None:
    machine = Coordinator(1, 7, 0.0)
    machine.handle(FrontendSaid(FrontendHello(PROTOCOL_VERSION, 5, FAR - 1)), 0.0)
    assert plausible(int(str(machine.statistics()["suspension"])) + 1000, 0)


MEMBERS = [GroupMember(0, LIFE, "ipc://group")]


@pytest.mark.parametrize(
    "said",
    [
        Admit(0, LIFE, LARGEST),
        Admit(0, LIFE, 0, Suspension(LARGEST, "keep")),
        Form(LARGEST, 0, MEMBERS),
        Form(1, LARGEST, MEMBERS),
        Form(1, 0, MEMBERS, Suspension(LARGEST, "keep")),
        Suspension(LARGEST, "wait"),
        StartDPWave(LARGEST),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_a_rank_takes_up_no_absurd_number(said: Any) -> None:
    machine = Rank(0, LIFE, "tcp://rank", lockstep=True, group_address="ipc://group")
    decode = codec.from_rank().decode
    events = [Loaded(), CoordinatorSaid(said), CoordinatorSaid(Form(2, 1, MEMBERS)), Turn(Load(), False), Formed(2)]
    effects = [machine.handle(event, 1.0) for event in [*events, CoordinatorSaid(StartDPWave(1))]]
    assert [FormGroup(2, MEMBERS)] == effects[3]
    for effect in itertools.chain(*effects):
        if isinstance(effect, ToCoordinator):
            decode(codec.encode(effect.message))
    assert (machine.wave, machine.running, machine.pause.number) == (1, True, 0)


@pytest.mark.parametrize(
    "said",
    [
        Members(PROTOCOL_VERSION, 7, LARGEST, False, []),
        LoadView(7, 2, LARGEST, False),
        LoadView(7, 2, 0, False, suspension=SuspensionState(LARGEST, "abort")),
        LoadView(7, 2, 0, False, [], shares=[Shares(5, LARGEST)]),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_a_frontend_takes_up_no_absurd_number(said: Any) -> None:
    machine = Frontend(5, LeastLoad(0, 1), lockstep=True, relay_sends=True)
    machine.handle(FrontendHears(Members(PROTOCOL_VERSION, 7, 1, False, [Member(0, LIFE, "tcp://rank")])), 0.0)
    machine.handle(FrontendHears(LoadView(7, 1, 1, False, [RankView(0, LIFE, 1, Load(slots=4))])), 0.0)
    machine.handle(FrontendHears(said), 1.0)
    assert machine.wave == 1
    assert machine.suspension.number == 0
    directions = {"ToRank": codec.request(), "ToCoordinator": codec.from_frontend()}
    sent = 0
    for effect in machine.handle(Submit(1, [1, 2], SamplingParams(4)), 2.0):
        if (decoder := directions.get(type(effect).__name__)) is not None:
            decoder.decode(codec.encode(effect.message))  # type: ignore[union-attr]
            sent += 1
    assert sent == 3


def test_a_wave_beyond_what_can_be_stamped_is_said_as_the_last_that_can() -> None:
    machine = Frontend(5, LeastLoad(0, 1), lockstep=True)
    machine.handle(FrontendHears(Members(PROTOCOL_VERSION, 7, FAR + 5, False, [Member(0, LIFE, "tcp://rank")])), 0.0)
    effects = machine.handle(Submit(1, [1, 2], SamplingParams(4)), 2.0)
    stamped = [effect.message.wave for effect in effects if hasattr(effect, "message")]  # type: ignore[union-attr]
    assert (machine.wave, stamped) == (FAR + 5, [LARGEST_STAMP] * 2)
