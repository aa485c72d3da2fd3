"""Bytes to messages and back: whatever arrives is a message of its direction or a BadMessage, and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings, strategies as st

from paceline.core import codec, messages
from paceline.core.codec import BadMessage
from paceline.core.load import Load
from paceline.core.requests import AddRequest, SamplingParams
from tests.net.peers import BAD_FRAMES
from tests.pace import examples

DECODERS = {
    "rank → coordinator": codec.from_rank(),
    "coordinator → ranks": codec.to_rank(),
    "front-end → coordinator": codec.from_frontend(),
    "coordinator → front-ends": codec.to_frontend(),
    "front-end → rank": codec.request(),
    "rank → front-end": codec.outputs(),
}
CLASSES = {direction: list(getattr(union, "__args__", ()) or (union,)) for direction, union in codec.UNIONS.items()}
EVERY_CLASS = [(direction, kind) for direction, kinds in CLASSES.items() for kind in kinds]


def values(kind: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Valid values of a msgspec type, as its own description has it."""
    match kind:
        case msgspec.inspect.StructType(cls, fields):
            return st.builds(cls, *(values(field.type, field.name) for field in fields))
        case msgspec.inspect.IntType(gt, ge, lt, le):
            if name == "version":
                return st.just(messages.PROTOCOL_VERSION)
            low = ge if ge is not None else (gt + 1 if gt is not None else -(2**63))
            high = le if le is not None else (lt - 1 if lt is not None else 2**63 - 1)
            return st.integers(int(low), int(high))
        case msgspec.inspect.FloatType(gt, ge, lt, le):
            low, high = ge if ge is not None else gt, le if le is not None else lt
            return st.floats(low, high, exclude_min=gt is not None, allow_nan=False, allow_infinity=False)
        case msgspec.inspect.StrType(min_length, max_length):
            alphabet = st.characters(codec="utf-8")
            if name == "address":
                return st.text(alphabet, max_size=20).map("tcp://{}".format)
            return st.text(alphabet, min_size=min_length or 0, max_size=min(max_length or 20, 20))
        case msgspec.inspect.ListType(item):
            return st.lists(values(item), max_size=4)
        case msgspec.inspect.DictType(key, value):
            return st.dictionaries(values(key), values(value), max_size=4)
        case msgspec.inspect.TupleType(items):
            return st.tuples(*map(values, items))
        case msgspec.inspect.UnionType(types):
            return st.one_of(*map(values, types))
        case msgspec.inspect.LiteralType(literals):
            return st.sampled_from(literals)
        case msgspec.inspect.BytesType():
            return st.binary(max_size=8)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
    raise AssertionError(f"no strategy for {kind}")


def messages_of(kind: type) -> st.SearchStrategy[Any]:
    return values(msgspec.inspect.type_info(kind))


any_message = st.one_of(*(st.tuples(st.just(direction), messages_of(kind)) for direction, kind in EVERY_CLASS))


def refusal(direction: str, frame: bytes) -> BadMessage:
    with pytest.raises(BadMessage) as caught:
        DECODERS[direction].decode(frame)
    assert str(caught.value) == f"{caught.value.kind}: {caught.value.detail}"
    return caught.value


def frame_of(tag: str, *elements: object) -> bytes:
    return msgspec.msgpack.encode([tag, *elements])


# What is valid --------------------------------------------------------------------------------
def test_there_is_a_decoder_for_every_direction() -> None:
    assert list(DECODERS) == list(codec.UNIONS)


@settings(max_examples=examples(300))
@given(any_message)
def test_every_message_comes_out_as_it_went_in(case: tuple[str, Any]) -> None:
    direction, message = case
    frame = codec.encode(message)
    assert DECODERS[direction].decode(frame) == message
    assert DECODERS[direction].decode(memoryview(frame)) == message


@pytest.mark.parametrize(("direction", "kind"), EVERY_CLASS, ids=lambda v: getattr(v, "__name__", None))
@settings(max_examples=examples(5))
@given(st.data())
def test_a_direction_refuses_the_messages_of_the_others(direction: str, kind: type, data: st.DataObject) -> None:
    frame = codec.encode(data.draw(messages_of(kind)))
    for other in DECODERS:
        if other == direction:
            DECODERS[other].decode(frame)
        else:
            assert refusal(other, frame).kind == "malformed"


@settings(max_examples=examples(200))
@given(any_message, st.one_of(st.integers(-5, 5), st.text(max_size=3), st.lists(st.none(), max_size=2), st.none()))
def test_an_element_that_a_newer_version_appended_is_ignored(case: tuple[str, Any], extra: object) -> None:
    direction, message = case
    frame = msgspec.msgpack.encode([*msgspec.msgpack.decode(codec.encode(message), strict=False), extra])
    assert DECODERS[direction].decode(frame) == message


def test_a_trailing_field_that_an_older_version_lacks_has_its_default() -> None:
    report = messages.RankReport(1, 2, 3, 4, True, Load(5))
    assert codec.from_rank().decode(frame_of("rank-report", 1, 2, 3, 4, True, [5])) == report
    assert codec.to_rank().decode(frame_of("start-dp-wave", 7)) == messages.StartDPWave(7, None)
    assert codec.to_frontend().decode(frame_of("load-view", 1, 2, 3, False)) == messages.LoadView(1, 2, 3, False, None)
    decode = codec.from_rank().decode
    assert decode(frame_of("rank-hello", 1, 2, 3, "ipc://a", True)) == messages.RankHello(1, 2, 3, "ipc://a", True)


@pytest.mark.parametrize(("direction", "kind"), EVERY_CLASS, ids=lambda v: getattr(v, "__name__", None))
def test_a_field_without_a_default_must_be_there(direction: str, kind: type) -> None:
    assert refusal(direction, frame_of(str(codec.tag_of(kind)))).kind == "malformed"


# What is not ----------------------------------------------------------------------------------
def decode_anywhere(frame: bytes) -> None:
    """Every decoder gives a message or a BadMessage of a known kind."""
    for decoder in DECODERS.values():
        try:
            decoder.decode(frame)
        except BadMessage as error:
            assert error.kind in {"malformed", "version", "value"}


@settings(max_examples=examples(500))
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00")
@example(b"\xc1")
@example(b"\xdd\xff\xff\xff\xff")
def test_random_bytes_are_a_bad_message(frame: bytes) -> None:
    decode_anywhere(frame)
    decode_anywhere(b"\x93" + frame)


@settings(max_examples=examples(500))
@given(any_message, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_a_valid_frame_with_some_bytes_changed_is_a_message_or_a_bad_one(
    case: tuple[str, Any], changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    frame = bytearray(codec.encode(case[1]))
    for place, byte in changes:
        frame[place % len(frame)] = byte
    decode_anywhere(bytes(frame))
    cut = data.draw(st.integers(0, len(frame)))
    decode_anywhere(bytes(frame[:cut] + frame[cut + 1 :]))


@settings(max_examples=examples(100))
@given(any_message)
def test_a_truncated_frame_is_malformed(case: tuple[str, Any]) -> None:
    direction, message = case
    frame = codec.encode(message)
    for length in range(len(frame)):
        assert refusal(direction, frame[:length]).kind == "malformed"


@pytest.mark.parametrize("kind", [messages.FrontendLeaving, messages.FrontendHello], ids=lambda v: v.__name__)
def test_two_messages_in_one_frame_are_malformed(kind: type) -> None:
    frame = frame_of(str(codec.tag_of(kind)), 1, 1)
    DECODERS["front-end → coordinator"].decode(frame)
    assert refusal("front-end → coordinator", frame + frame).kind == "malformed"


def test_a_frame_over_the_limit_is_too_large_and_one_at_the_limit_is_not() -> None:
    frame = codec.encode(messages.StartWave(1, 2, 3))
    assert codec.Decoder(messages.StartWave, len(frame)).decode(frame) == messages.StartWave(1, 2, 3)
    with pytest.raises(BadMessage) as caught:
        codec.Decoder(messages.StartWave, len(frame) - 1).decode(frame)
    assert caught.value.kind == "too-large"


@pytest.mark.parametrize("direction", DECODERS)
def test_the_limit_of_every_direction_holds(direction: str) -> None:
    limit = codec.MAX_REQUEST_BYTES if direction.count("rank") == direction.count("front-end") else None
    assert refusal(direction, bytes((limit or codec.MAX_CONTROL_BYTES) + 1)).kind == "too-large"
    assert refusal(direction, bytes(limit or codec.MAX_CONTROL_BYTES)).kind == "malformed"


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\x00", b"\xdc\x00\x01"])
@pytest.mark.parametrize("direction", DECODERS)
def test_a_frame_nested_a_hundred_thousand_deep_is_malformed(direction: str, opening: bytes) -> None:
    for kind in CLASSES[direction]:
        beginning = frame_of(str(codec.tag_of(kind)))
        # As an element that no field takes, after 14 that some do.
        frame = b"\x9f" + beginning[1:] + b"\x01" * 13 + opening * 100_000 + b"\x00"
        assert refusal(direction, frame).kind == "malformed"


@pytest.mark.parametrize("claimed", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
def test_a_frame_that_claims_four_billion_elements_is_malformed(claimed: bytes) -> None:
    frame = b"\x93" + msgspec.msgpack.encode("send-notice") + b"\x01" + claimed
    assert refusal("front-end → coordinator", frame).kind == "malformed"
    frame = b"\x98" + frame_of("rank-report", 1, 2, 3, 4, True, [])[1:] + claimed
    assert refusal("rank → coordinator", frame).kind == "malformed"


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ("rank → coordinator", messages.RankHello(2, 0, 1, "a", True)),
        ("coordinator → ranks", messages.Identify(0, 1)),
        ("front-end → coordinator", messages.FrontendHello(messages.PROTOCOL_VERSION + 1, 1)),
        ("coordinator → front-ends", messages.Members(99, 1, 0, False, [])),
    ],
)
def test_another_protocol_version_is_named(direction: str, message: Any) -> None:
    error = refusal(direction, codec.encode(message))
    assert error.kind == "version"
    assert str(message.version) in error.detail


REPORT = messages.RankReport(1, 2, 3, 4, True, Load())
REQUEST = AddRequest(1, 1, 1, 0, [1], SamplingParams(1))
NUMBERS = [
    *((REPORT, "load", name) for name in ("prefill_rate", "decode_rate")),
    *((REQUEST, "params", name) for name in (
        "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"
    )),
]  # fmt: skip


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("message", "part", "name"), NUMBERS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_number_that_is_not_finite_is_refused(message: Any, part: str, name: str, number: float) -> None:
    replace = msgspec.structs.replace
    direction = "rank → coordinator" if message is REPORT else "front-end → rank"
    bad = replace(message, **{part: replace(getattr(message, part), **{name: number})})
    in_range = name.endswith("presence_penalty") or name.endswith("frequency_penalty")
    in_range = in_range or (number > 0 and name not in {"top_p", "min_p"})
    # Where the field's own range excludes it, the frame is malformed; else the value is refused.
    assert refusal(direction, codec.encode(bad)).kind in ({"value"} if in_range else {"malformed", "value"})


def test_a_bias_that_is_not_finite_is_refused() -> None:
    params = SamplingParams(1, logit_bias={7: float("nan")})
    assert refusal("front-end → rank", codec.encode(msgspec.structs.replace(REQUEST, params=params))).kind == "value"


def test_a_load_view_with_an_infinite_rate_is_refused() -> None:
    view = messages.LoadView(1, 1, 0, False, [messages.RankView(0, 1, 1, Load(decode_rate=float("inf")))])
    assert refusal("coordinator → front-ends", codec.encode(view)).kind == "value"


@pytest.mark.parametrize(
    ("direction", "largest"),
    [
        ("rank → coordinator", messages.StartWave(65535, 2**63 - 1, 2**53 - 1)),
        ("rank → coordinator", messages.RankLeaving(65535, 2**63 - 1)),
        ("coordinator → ranks", messages.StartDPWave(2**53 - 1, 65535)),
        ("front-end → coordinator", messages.WakeNotice(2**63 - 1, 65535, 2**48 - 1)),
    ],
)
def test_numbers_out_of_their_range_are_malformed(direction: str, largest: Any) -> None:
    assert DECODERS[direction].decode(codec.encode(largest)) == largest
    for name in largest.__struct_fields__:
        for number in (getattr(largest, name) + 1, -1, 2**64 - 1):
            bad = msgspec.structs.replace(largest, **{name: number})
            assert refusal(direction, codec.encode(bad)).kind == "malformed"


def test_numbers_out_of_their_range_are_malformed_inside_a_message_too() -> None:
    for token in (-1, 2**31):
        bad = msgspec.structs.replace(REQUEST, prompt_token_ids=[1, token])
        assert refusal("front-end → rank", codec.encode(bad)).kind == "malformed"
    members = messages.Members(messages.PROTOCOL_VERSION, 1, 0, False, [messages.Member(0, 1, "x" * 513)])
    assert refusal("coordinator → front-ends", codec.encode(members)).kind == "malformed"


@pytest.mark.parametrize("address", ["", "rank-0", "file:///etc/passwd", " tcp://a:1"])
def test_an_address_that_no_rank_has_is_refused(address: str) -> None:
    hello = messages.RankHello(messages.PROTOCOL_VERSION, 0, 1, address, True)
    assert refusal("rank → coordinator", codec.encode(hello)).kind == "value"


def test_text_that_is_no_utf8_is_malformed() -> None:
    frame = frame_of("rank-hello", 1, 0, 1, "address", True).replace(b"address", b"\xff" * 7)
    assert refusal("rank → coordinator", frame).kind == "malformed"


# Presence topics ------------------------------------------------------------------------------
@given(st.integers(0, 2**63 - 1), st.integers(0, 65535))
def test_presence_topics_name_what_they_are_made_of(identity: int, rank: int) -> None:
    frontend, of_rank = codec.frontend_topic(identity), codec.rank_topic(rank, identity)
    assert codec.read_frontend_topic(frontend) == identity
    assert codec.read_rank_topic(of_rank) == (rank, identity)
    assert codec.read_rank_topic(frontend) is None
    assert codec.read_frontend_topic(of_rank) is None


@given(st.binary(max_size=12), st.sampled_from([b"", codec.FRONTEND_TOPIC, codec.RANK_TOPIC]))
@example(b"\xff" * 8, codec.FRONTEND_TOPIC)
@example(b"\xff" * 10, codec.RANK_TOPIC)
def test_any_other_topic_names_nobody(rest: bytes, beginning: bytes) -> None:
    topic = beginning + rest
    frontend, of_rank = codec.read_frontend_topic(topic), codec.read_rank_topic(topic)
    assert frontend is None or codec.frontend_topic(frontend) == topic
    assert of_rank is None or codec.rank_topic(*of_rank) == topic


@settings(max_examples=examples(100))
@given(any_message)
def test_no_message_begins_as_a_presence_topic_does(case: tuple[str, Any]) -> None:
    assert codec.encode(case[1])[:1] not in {codec.FRONTEND_TOPIC, codec.RANK_TOPIC, b"\x00", b"\x01"}


# Whose report a frame is, read without decoding it --------------------------------------------------


RANKS = [0, 1, 127, 128, 255, 256, 65535]
LIVES = [0, 1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63 - 1]


def frame(rank: int, incarnation: int, step: int = 0) -> bytes:
    return codec.encode(messages.RankReport(rank, incarnation, step, step % 3, False, Load(step), {7: step}))


def test_all_reports_of_a_life_begin_alike_and_no_others_do() -> None:
    found: set[bytes] = set()
    for rank, incarnation in itertools.product(RANKS, LIVES):
        whose = {codec.whose_report(frame(rank, incarnation, step)) for step in (0, 1, 200, 70_000, 2**40)}
        (only,) = whose
        assert only is not None
        assert only not in found
        found.add(only)


@pytest.mark.parametrize(
    "message",
    [messages.RankHello(1, 0, 7, "ipc:///rank", True), messages.WaveComplete(0, 7, 3), messages.RankLeaving(0, 7)],
)
def test_nothing_else_is_a_report(message: messages.FromRank) -> None:
    assert codec.whose_report(codec.encode(message)) is None


def test_what_is_cut_short_or_no_frame_is_nobodys() -> None:
    whole = frame(300, 2**40, 5)
    for end in range(len(whole)):
        whose = codec.whose_report(whole[:end])
        assert whose is None or whole.startswith(whose)
    for bad in BAD_FRAMES:
        codec.whose_report(bad)
