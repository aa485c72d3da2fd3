"""vLLM's frames to values and back, without vLLM: what its ranks and front-ends say to a coordinator, and hear.

Every version from 0.10 on says the same in slightly different frames. A rank's message is a msgpack array that grew at
its end, so a shorter one lacks what it did not know; the statistics in it are a map of which five keys are read, so
other keys do not matter and a missing one is zero. What goes out depends on the version (`VllmDialect`): it is told.

Nothing here is unpickled, and a frame that is none of these is a `BadMessage` of a countable kind.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from paceline.protocol.codec import MAX_CONTROL_BYTES, BadMessage
from paceline.protocol.sampling import Count, RankNumber, Wave

READY = b"READY"
START_DP_WAVE = b"\x02"
"""First frame of a wake: vLLM's request type of that name."""
SCALE = "SCALE_ELASTIC_EP"
IDENTITY_BYTES = 2
"""A rank's ZeroMQ identity in vLLM: its number, little-endian."""
MOST_RANKS = 65536
MOST_SCALED_TO = 1024
"""To begin anew with as many ranks takes half a second, and eight times as many would take a minute."""
MOST_KV_USE = 1000.0
"""A share; what is beyond is no share of anything."""

_EMPTY = b"\x90"
_NIL = b"\xc0"


class RankStats(Struct, frozen=True, gc=False):
    """What of a rank's statistics matters here: requests, the step in the wave, the wave, the used share of KV."""

    num_waiting_reqs: Count = 0
    num_running_reqs: Count = 0
    step_counter: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    current_wave: Wave = 0
    kv_cache_usage: Annotated[float, Meta(ge=0, le=MOST_KV_USE)] = 0.0


class RankMessage(Struct, frozen=True, array_like=True, gc=False):
    """One message of a rank: statistics, the end of a wave, or the start of one."""

    engine_index: RankNumber
    outputs: msgspec.Raw = msgspec.Raw(_EMPTY)
    scheduler_stats: RankStats | None = None
    timestamp: float = 0.0
    utility_output: msgspec.Raw = msgspec.Raw(_NIL)
    finished_requests: msgspec.Raw = msgspec.Raw(_NIL)
    wave_complete: Wave | None = None
    start_wave: Wave | None = None


class Notice(Struct, frozen=True):
    """A front-end sent a request, stamped `wave`, while it believed the ranks paused.

    `exclude`: what it sent as the rank that has the request, passed on as it is; `rank`: that, read; None where it
    names none.
    """

    exclude: bytes | int | None
    rank: int | None
    wave: int


class Scale(Struct, frozen=True):
    """From now on there are so many ranks."""

    size: int


_rank_decoder = msgspec.msgpack.Decoder(RankMessage)
_front_end_decoder = msgspec.msgpack.Decoder(Any)
_encoder = msgspec.msgpack.Encoder()


def read_rank(frame: bytes) -> RankMessage:
    """A rank's message. Raises BadMessage of kind `too-large`, `malformed` or `value`."""
    message: RankMessage = _decode(_rank_decoder, frame)
    if bytes(message.outputs) != _EMPTY or bytes(message.utility_output) != _NIL:
        raise BadMessage("value", f"rank {message.engine_index} sent outputs to the coordinator")
    if message.scheduler_stats is not None and not math.isfinite(message.scheduler_stats.kv_cache_usage):
        raise BadMessage("value", f"rank {message.engine_index} reports a KV use that is not finite")
    return message


def read_front_end(frame: bytes) -> Notice | Scale:
    """A front-end's message. Raises BadMessage of kind `too-large`, `malformed` or `value`."""
    said = _decode(_front_end_decoder, frame)
    if not isinstance(said, list) or len(said) != 2:
        raise BadMessage("malformed", "not a pair")
    first, second = said
    if first == SCALE:
        if not _is_number(second, MOST_SCALED_TO + 1) or second == 0:
            raise BadMessage("value", f"not a number of ranks, of which there may be {MOST_SCALED_TO}")
        return Scale(second)
    if not _is_number(second, 2**53):
        raise BadMessage("value", "not a wave")
    if first is None:
        return Notice(None, None, second)
    if isinstance(first, bytes) and len(first) == IDENTITY_BYTES:
        return Notice(first, int.from_bytes(first, "little"), second)
    if _is_number(first, MOST_RANKS):
        return Notice(first, first, second)
    raise BadMessage("value", "the request is with no rank")


def wake(wave: int, exclude: bytes | int | None) -> list[bytes]:
    """START_DP_WAVE, for ranks."""
    return [START_DP_WAVE, _encoder.encode((wave, exclude))]


def view(counts: list[list[int | float]] | None, wave: int, running: bool) -> bytes:
    """What front-ends hear: per rank its counts, as the version wants them; the wave; whether the ranks run."""
    return _encoder.encode((counts, wave, running))


# How the frame of a load report begins and ends. Reports are nearly all that comes, hundreds of thousands a second
# where there are many ranks, and of one rank's only the last is of interest.
_ARRAYS = frozenset(range(0x93, 0xA0))
_INTEGER_BYTES = bytes({0xCC: 2, 0xCD: 3}.get(first, 1) for first in range(256))
_MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_NO_WAVE = _NIL * 4


def whose_report(frame: bytes) -> bytes | None:
    """What a rank's load reports begin with, without decoding them; None for any other frame.

    What speaks of a wave has no statistics in any version; to be sure, a report ends in nothing said.
    """
    try:
        if frame[0] not in _ARRAYS:
            return None
        after = 1 + _INTEGER_BYTES[frame[1]]
        if frame[after] == 0x90 and frame[after + 1] in _MAPS and frame[-4:] == _NO_WAVE:
            return frame[:after]
    except IndexError:
        pass
    return None


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    if len(frame) > MAX_CONTROL_BYTES:
        raise BadMessage("too-large", f"{len(frame)} bytes, the limit is {MAX_CONTROL_BYTES}")
    try:
        return decoder.decode(frame)
    # A hostile frame can nest deeper than the decoder will follow, and text may be no UTF-8.
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage("malformed", str(error)) from None


def _is_number(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below
