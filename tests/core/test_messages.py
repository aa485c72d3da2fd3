"""The messages themselves: what may be appended and what must stay, tag by tag."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    UNIONS,
    Descriptor,
    Grant,
    GroupMember,
    Member,
    OnTheWire,
    RankView,
    Send,
    Share,
    Shares,
    Stall,
    StartDPWave,
    StartWave,
    SuspensionState,
    tag_of,
)
from paceline.core.requests import Message, Output, PositionLogprobs, SamplingParams, TokenLogprob

PARTS = [
    Descriptor,
    Grant,
    Share,
    Shares,
    Load,
    Member,
    GroupMember,
    Stall,
    SuspensionState,
    OnTheWire,
    Output,
    RankView,
    Send,
    SamplingParams,
    TokenLogprob,
    PositionLogprobs,
]
WHOLE = [kind for union in UNIONS.values() for kind in (getattr(union, "__args__", ()) or (union,))]

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
    "outputs": "rank incarnation outputs",
    "Load": (
        "waiting running slots prefill_tokens kv_used kv_total prefill_rate decode_rate finished step_s prompt_token_s "
        "answer_token_s step_tokens decoding kv_reserved answers_left first_end answer_tokens"
    ),
    "Member": "rank incarnation address",
    "OnTheWire": "frontend last requests tokens",
    "Output": "request token_ids text finish_reason stop_reason logprobs error",
    "RankView": "rank incarnation step load taken on_the_wire",
    "Send": "rank incarnation number tokens",
    "SamplingParams": (
        "max_tokens temperature top_p top_k min_p seed frequency_penalty presence_penalty repetition_penalty "
        "logit_bias stop stop_token_ids include_stop_str_in_output ignore_eos logprobs skip_special_tokens"
    ),
    "TokenLogprob": "token_id piece logprob",
    "PositionLogprobs": "chosen top",
}


def name_of(kind: Any) -> str:
    return tag_of(kind) or kind.__name__


@pytest.mark.parametrize("kind", [*WHOLE, *PARTS], ids=name_of)
def test_fields_are_only_ever_appended_and_have_defaults(kind: Any) -> None:
    assert PROTOCOL_VERSION == 1
    expected = VERSION_1[name_of(kind)].split()
    fields = msgspec.structs.fields(kind)
    assert [field.name for field in fields[: len(expected)]] == expected
    assert not any(field.required for field in fields[len(expected) :])


def test_all_messages_of_version_1_are_there() -> None:
    assert {name_of(kind) for kind in [*WHOLE, *PARTS]} >= set(VERSION_1)


def test_a_tag_is_one_message_in_one_direction() -> None:
    tags = [tag_of(kind) for kind in WHOLE]
    assert None not in tags
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", PARTS, ids=name_of)
def test_a_part_of_a_message_has_no_tag(kind: Any) -> None:
    assert tag_of(kind) is None


@pytest.mark.parametrize("kind", [*WHOLE, *PARTS], ids=name_of)
def test_a_message_is_an_immutable_array_with_a_docstring(kind: Any) -> None:
    assert issubclass(kind, Message)
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.array_like
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


def test_what_is_on_the_wire_is_an_array_that_begins_with_the_tag() -> None:
    assert codec.encode(StartWave(3, 5, 7)) == b"\x94\xaastart-wave\x03\x05\x07"
    assert codec.encode(StartDPWave(2)) == b"\x93\xadstart-dp-wave\x02\xc0"


def test_messages_that_say_the_same_are_equal_and_a_default_is_shared_by_none() -> None:
    first, second = RankView(0, 1, 2, Load()), RankView(0, 1, 2, Load())
    assert first == second
    assert first.taken is not second.taken
    assert first.on_the_wire is not second.on_the_wire
