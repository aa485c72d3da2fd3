"""The messages themselves: what may be appended and what must stay, tag by tag; absurd numbers are not taken up."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from paceline.core import binding, codec, messages
from paceline.core.coordinator.events import FrontendSaid, RankSaid, ToFrontends, ToRanks
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend.events import CoordinatorSaid as FrontendHears, Submit
from paceline.core.frontend.machine import Frontend
from paceline.core.load import FAR, NEAR, Load, plausible
from paceline.core.rank.events import CoordinatorSaid, Formed, FormGroup, Loaded, ToCoordinator, Turn
from paceline.core.rank.machine import Rank
from paceline.core.requests import (
    LARGEST_STAMP,
    Message,
    Output,
    PositionLogprobs,
    SamplingParams,
    StructuredOutput,
    Timing,
    TokenLogprob,
    Weights,
    WeightsOfRank,
)
from paceline.core.routing.least import LeastLoad

PARTS = [
    binding.Descriptor, binding.Grant, binding.Share, binding.Shares, Load, messages.Member, messages.GroupMember,
    messages.Stall, messages.SuspensionState, messages.OnTheWire, Output, messages.RankView, binding.Send,
    SamplingParams, Timing, TokenLogprob, PositionLogprobs, StructuredOutput, Weights, WeightsOfRank,
]  # fmt: skip
WHOLE = [kind for union in codec.UNIONS.values() for kind in (getattr(union, "__args__", ()) or (union,))]

# Version 1 of the protocol. A line here may only grow at its end, by fields with defaults; for anything else
# there is a new PROTOCOL_VERSION.
VERSION_1 = {
    "rank-hello": (
        "version rank incarnation address ready wave running suspension mode held group_address generation told"
    ),
    "rank-report": "rank incarnation step wave running load taken",
    "start-wave": "rank incarnation wave",
    "wave-complete": "rank incarnation wave",
    "rank-leaving": "rank incarnation",
    "kv-delta": "rank incarnation number stored removed whole",
    "kv-ask": "rank incarnation",
    "identify": "version coordinator",
    "suspension": "number mode released",
    "form": "generation wave members suspension",
    "control": "frontend call action answered",
    "stall": "rank incarnation step ranks collective kind seconds",
    "Stall": "rank step collective kind seconds waiting",
    "control-answer": "coordinator frontend call number",
    "GroupMember": "rank incarnation address",
    "SuspensionState": "number mode settled waiting_for",
    "admit": "rank incarnation wave suspension",
    "start-dp-wave": "wave exclude",
    "front-end-hello": "version frontend suspension mode",
    "wake-notice": "frontend rank wave",
    "send-notice": "frontend sends told",
    "front-end-leaving": "frontend",
    "ask": "frontend told edition descriptors whole",
    "withdraw": "frontend told requests",
    "return-shares": "frontend edition",
    "scaling": "number size target hosts frontend call drain_ms startup_ms waiting_for outcome why",
    "scale": "frontend call size drain_ms startup_ms",
    "node-hello": "version node ranks scaling own_frontends fixed",
    "rank-failed": "node number rank why",
    "grants": "coordinator grants asked queued recall",
    "Descriptor": "request tokens answer_tokens priority waited_ms",
    "Grant": "frontend request rank incarnation",
    "Share": "rank incarnation requests tokens kv_tokens",
    "Shares": "frontend edition shares",
    "members": "version coordinator wave running members missing ended stalls",
    "load-view": "coordinator number wave running ranks heard suspension",
    "add": "request number incarnation wave prompt_token_ids params priority",
    "abort": "requests",
    "call": "call incarnation method arguments",
    "revive": "frontend ranks",
    "start-again": "ranks",
    "refused": "rank incarnation holder size",
    "outputs": "rank incarnation outputs",
    "update-weights": "frontend call action version source keep_kv commit timeout_ms answered known",
    "Weights": ("number current version source next next_version next_source keep_kv commit timeout_ms outcome why"),
    "WeightsOfRank": "known has ready failed why",
    "Load": (
        "waiting running slots prefill_tokens kv_used kv_total prefill_rate decode_rate finished step_s prompt_token_s "
        "answer_token_s step_tokens decoding kv_reserved answers_left first_end answer_tokens"
    ),
    "Member": "rank incarnation address",
    "OnTheWire": "frontend last requests tokens",
    "Output": "request token_ids text finish_reason stop_reason logprobs error",
    "Timing": "waited_us computed_us",
    "RankView": "rank incarnation step load taken on_the_wire",
    "Send": "rank incarnation number tokens",
    "SamplingParams": (
        "max_tokens temperature top_p top_k min_p seed frequency_penalty presence_penalty repetition_penalty "
        "logit_bias stop stop_token_ids include_stop_str_in_output ignore_eos logprobs skip_special_tokens"
    ),
    "StructuredOutput": "kind text",
    "TokenLogprob": "token_id piece logprob",
    "PositionLogprobs": "chosen top",
}


def name_of(kind: Any) -> str:
    return codec.tag_of(kind) or kind.__name__


@pytest.mark.parametrize("kind", [*WHOLE, *PARTS], ids=name_of)
def test_fields_are_only_ever_appended_and_have_defaults(kind: Any) -> None:
    assert messages.PROTOCOL_VERSION == 1
    expected = VERSION_1[name_of(kind)].split()
    fields = msgspec.structs.fields(kind)
    assert [field.name for field in fields[: len(expected)]] == expected
    assert not any(field.required for field in fields[len(expected) :])


def test_all_messages_of_version_1_are_there() -> None:
    assert {name_of(kind) for kind in [*WHOLE, *PARTS]} >= set(VERSION_1)


def test_a_tag_is_one_message_in_one_direction() -> None:
    tags = [codec.tag_of(kind) for kind in WHOLE]
    assert None not in tags
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", PARTS, ids=name_of)
def test_a_part_of_a_message_has_no_tag(kind: Any) -> None:
    assert codec.tag_of(kind) is None


@pytest.mark.parametrize("kind", [*WHOLE, *PARTS], ids=name_of)
def test_a_message_is_an_immutable_array_with_a_docstring(kind: Any) -> None:
    assert issubclass(kind, Message)
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.array_like
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


def test_what_is_on_the_wire_is_an_array_that_begins_with_the_tag() -> None:
    assert codec.encode(messages.StartWave(3, 5, 7)) == b"\x94\xaastart-wave\x03\x05\x07"
    assert codec.encode(messages.StartDPWave(2)) == b"\x93\xadstart-dp-wave\x02\xc0"


def test_messages_that_say_the_same_are_equal_and_a_default_is_shared_by_none() -> None:
    first, second = messages.RankView(0, 1, 2, Load()), messages.RankView(0, 1, 2, Load())
    assert first == second
    assert first.taken is not second.taken
    assert first.on_the_wire is not second.on_the_wire


# Absurd numbers: nobody takes them up, and what is said after them can still be heard ---------------


LARGEST = 2**53 - 1
LIFE = 11


def hello(**fields: Any) -> messages.RankHello:
    return messages.RankHello(messages.PROTOCOL_VERSION, 0, LIFE, "tcp://rank", True, **fields)


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
        messages.RankReport(0, LIFE, 1, LARGEST, True, Load()),
        messages.StartWave(0, LIFE, LARGEST),
        messages.WaveComplete(0, LIFE, LARGEST),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_the_coordinator_takes_up_no_absurd_number(said: Any) -> None:
    machine = Coordinator(1, 7, 0.0)
    decoders = {ToRanks: codec.to_rank(), ToFrontends: codec.to_frontend()}
    all_said = [hello(group_address="ipc://group"), said, hello(group_address="ipc://group", generation=1, told=1)]
    for now, message in enumerate([*all_said, messages.StartWave(0, LIFE, 3), messages.WaveComplete(0, LIFE, 3)]):
        for effect in machine.handle(RankSaid(message), float(now)):
            if type(effect) in decoders:
                decoders[type(effect)].decode(codec.encode(effect.message))  # type: ignore[union-attr]
    known = machine.statistics()
    assert (known["wave"], known["suspension"], known["generation"]) == (4, 0, 1)


def test_a_frontend_does_not_move_the_pause_out_of_reach() -> None:
    machine = Coordinator(1, 7, 0.0)
    machine.handle(FrontendSaid(messages.FrontendHello(messages.PROTOCOL_VERSION, 5, FAR - 1)), 0.0)
    assert plausible(int(str(machine.statistics()["suspension"])) + 1000, 0)


MEMBERS = [messages.GroupMember(0, LIFE, "ipc://group")]


@pytest.mark.parametrize(
    "said",
    [
        messages.Admit(0, LIFE, LARGEST),
        messages.Admit(0, LIFE, 0, messages.Suspension(LARGEST, "keep")),
        messages.Form(LARGEST, 0, MEMBERS),
        messages.Form(1, LARGEST, MEMBERS),
        messages.Form(1, 0, MEMBERS, messages.Suspension(LARGEST, "keep")),
        messages.Suspension(LARGEST, "wait"),
        messages.StartDPWave(LARGEST),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_a_rank_takes_up_no_absurd_number(said: Any) -> None:
    machine = Rank(0, LIFE, "tcp://rank", lockstep=True, group_address="ipc://group")
    decode = codec.from_rank().decode
    events = [
        Loaded(),
        CoordinatorSaid(said),
        CoordinatorSaid(messages.Form(2, 1, MEMBERS)),
        Turn(Load(), False),
        Formed(2),
    ]
    effects = [machine.handle(event, 1.0) for event in [*events, CoordinatorSaid(messages.StartDPWave(1))]]
    assert [FormGroup(2, MEMBERS)] == effects[3]
    for effect in itertools.chain(*effects):
        if isinstance(effect, ToCoordinator):
            decode(codec.encode(effect.message))
    assert (machine.wave, machine.running, machine.pause.number) == (1, True, 0)


@pytest.mark.parametrize(
    "said",
    [
        messages.Members(messages.PROTOCOL_VERSION, 7, LARGEST, False, []),
        messages.LoadView(7, 2, LARGEST, False),
        messages.LoadView(7, 2, 0, False, suspension=messages.SuspensionState(LARGEST, "abort")),
        messages.LoadView(7, 2, 0, False, [], shares=[binding.Shares(5, LARGEST)]),
    ],
    ids=lambda said: f"{type(said).__name__}",
)
def test_a_frontend_takes_up_no_absurd_number(said: Any) -> None:
    machine = Frontend(5, LeastLoad(0, 1), lockstep=True, relay_sends=True)
    machine.handle(
        FrontendHears(
            messages.Members(messages.PROTOCOL_VERSION, 7, 1, False, [messages.Member(0, LIFE, "tcp://rank")])
        ),
        0.0,
    )
    machine.handle(
        FrontendHears(messages.LoadView(7, 1, 1, False, [messages.RankView(0, LIFE, 1, Load(slots=4))])), 0.0
    )
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
    machine.handle(
        FrontendHears(
            messages.Members(messages.PROTOCOL_VERSION, 7, FAR + 5, False, [messages.Member(0, LIFE, "tcp://rank")])
        ),
        0.0,
    )
    effects = machine.handle(Submit(1, [1, 2], SamplingParams(4)), 2.0)
    stamped = [effect.message.wave for effect in effects if hasattr(effect, "message")]  # type: ignore[union-attr]
    assert (machine.wave, stamped) == (FAR + 5, [LARGEST_STAMP] * 2)
