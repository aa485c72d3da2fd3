"""Bytes to messages and back. Sizes, shapes and versions are checked here and nowhere else.

Decoding is typed by direction: what is not a message of that direction is a `BadMessage` with a short,
countable kind, never another exception. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, TypeVar

import msgspec

from paceline.core import messages
from paceline.core.limits import (
    MAX_CONTROL_BYTES as MAX_CONTROL_BYTES,
    MAX_REQUEST_BYTES as MAX_REQUEST_BYTES,
)
from paceline.core.load import Load
from paceline.core.requests import AddRequest, FromFrontendToRank, Message, ToFrontendFromRank

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


class BadMessage(Exception):
    """A frame that is not a message of its direction. `kind` is one of a few words, to count by."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Decoder(Generic[T]):
    """Frames of one direction to messages.

    `decode` raises BadMessage of kind `too-large`, `malformed`, `version` or `value`.
    """

    def __init__(self, union: object, max_bytes: int) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._max_bytes = max_bytes

    def decode(self, frame: bytes | memoryview) -> T:
        if len(frame) > self._max_bytes:
            raise BadMessage("too-large", f"{len(frame)} bytes, the limit is {self._max_bytes}")
        try:
            message = self._decoder.decode(frame)
        # A hostile frame can nest deeper than the decoder will follow, and text may be no UTF-8.
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadMessage("malformed", str(error)) from None
        check = _CHECKS.get(type(message))
        if check is not None:
            check(message)
        return message


def _check_finite(message: object, floats: Iterable[float]) -> None:
    """Refuse what a range in a type lets through: not-a-number and the infinities."""
    if not all(map(math.isfinite, floats)):
        raise BadMessage("value", f"{type(message).__name__} holds a number that is not finite")


def _check_version(message: messages.RankHello | messages.FrontendHello | messages.Members | messages.Identify) -> None:
    if message.version != messages.PROTOCOL_VERSION:
        raise BadMessage("version", f"protocol version {message.version}, this side speaks {messages.PROTOCOL_VERSION}")


def _check_hello(hello: messages.RankHello) -> None:
    _check_version(hello)
    if not hello.address.startswith(("tcp://", "ipc://")):
        raise BadMessage("value", f"rank {hello.rank}: {hello.address!r} is no address")


def _floats_of(load: Load) -> tuple[float, ...]:
    return (load.prefill_rate, load.decode_rate, load.step_s, load.prompt_token_s, load.answer_token_s)


def _check_report(report: messages.RankReport) -> None:
    load = report.load
    # A sum with one of them is one of them: mostly, one look will do.
    if not math.isfinite(
        load.prefill_rate + load.decode_rate + load.step_s + load.prompt_token_s + load.answer_token_s
    ):
        _check_finite(report, _floats_of(load))


def _check_view(view: messages.LoadView) -> None:
    _check_finite(view, (value for entry in view.ranks or () for value in _floats_of(entry.load)))


def _check_request(request: AddRequest) -> None:
    params = request.params
    _check_finite(request, (
        params.temperature, params.top_p, params.min_p, params.frequency_penalty, params.presence_penalty,
        params.repetition_penalty, *params.logit_bias.values(),
    ))  # fmt: skip


_CHECKS: dict[type, Callable[[Any], None]] = {
    messages.RankHello: _check_hello,
    messages.FrontendHello: _check_version,
    messages.Members: _check_version,
    messages.Identify: _check_version,
    messages.RankReport: _check_report,
    messages.LoadView: _check_view,
    AddRequest: _check_request,
}
"""By type of message; most need none. One look-up, since every message comes by here."""


# A report's frame begins with its tag; the rank and the incarnation follow it.
_REPORT_TAG = b"\xabrank-report"
_REPORT_RANK = 1 + len(_REPORT_TAG)
# The bytes that a msgpack integer of this first byte takes: what is no unsigned one is taken for one byte.
_INTEGER_BYTES = bytes({0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9}.get(first, 1) for first in range(256))


def whose_report(frame: bytes) -> bytes | None:
    """What all reports of one life of a rank begin with, without decoding them; None for any other frame."""
    if frame[1:_REPORT_RANK] != _REPORT_TAG:
        return None
    try:
        incarnation = _REPORT_RANK + _INTEGER_BYTES[frame[_REPORT_RANK]]
        return frame[: incarnation + _INTEGER_BYTES[frame[incarnation]]]
    except IndexError:
        return None


# Each makes the decoder of one direction, named by what is read.
from_rank = partial(Decoder[messages.FromRank], messages.FromRank, MAX_CONTROL_BYTES)
to_rank = partial(Decoder[messages.ToRank], messages.ToRank, MAX_CONTROL_BYTES)
from_frontend = partial(Decoder[messages.FromFrontend], messages.FromFrontend, MAX_CONTROL_BYTES)
to_frontend = partial(Decoder[messages.ToFrontend], messages.ToFrontend, MAX_CONTROL_BYTES)
request = partial(Decoder[FromFrontendToRank], FromFrontendToRank, MAX_REQUEST_BYTES)
outputs = partial(Decoder[ToFrontendFromRank], ToFrontendFromRank, MAX_REQUEST_BYTES)


# Presence: a subscriber also subscribes to a topic that names it. No message starts with these bytes
# (a message is a msgpack array), so nothing is ever delivered on it; but the publisher is told when it
# appears and, by the connection's end, when it goes. That costs no heartbeat and no message.

FRONTEND_TOPIC = b"\xff"
RANK_TOPIC = b"\xfe"
NODE_TOPIC = b"\xfd"


def frontend_topic(frontend: int) -> bytes:
    return FRONTEND_TOPIC + frontend.to_bytes(8, "little")


def rank_topic(rank: int, incarnation: int) -> bytes:
    return RANK_TOPIC + rank.to_bytes(2, "little") + incarnation.to_bytes(8, "little")


def node_topic(node: int) -> bytes:
    return NODE_TOPIC + node.to_bytes(8, "little")


def read_frontend_topic(topic: bytes) -> int | None:
    """The front-end that a topic names, or None where it names none."""
    return _read_topic(topic, FRONTEND_TOPIC)


def read_node_topic(topic: bytes) -> int | None:
    """The node that a topic names, or None where it names none."""
    return _read_topic(topic, NODE_TOPIC)


def _read_topic(topic: bytes, kind: bytes) -> int | None:
    if len(topic) != 9 or topic[:1] != kind:
        return None
    identity = int.from_bytes(topic[1:], "little")
    return identity if identity < 2**63 else None


def read_rank_topic(topic: bytes) -> tuple[int, int] | None:
    """The rank and incarnation that a topic names, or None."""
    if len(topic) != 11 or topic[:1] != RANK_TOPIC:
        return None
    incarnation = int.from_bytes(topic[3:], "little")
    return (int.from_bytes(topic[1:3], "little"), incarnation) if incarnation < 2**63 else None


UNIONS: dict[str, object] = {
    "rank → coordinator": messages.FromRank,
    "coordinator → ranks": messages.ToRank,
    "front-end → coordinator": messages.FromFrontend,
    "coordinator → front-ends": messages.ToFrontend,
    "front-end → rank": FromFrontendToRank,
    "rank → front-end": ToFrontendFromRank,
}
"""Direction to its union, in the order of the table in `docs/PROTOCOL.md`."""


def tag_of(message: type[Message]) -> str | None:
    """The tag of a message class, or None for a part of one (Load, Member, …)."""
    tag = msgspec.inspect.type_info(message).tag  # type: ignore[attr-defined]
    return tag if isinstance(tag, str) else None
