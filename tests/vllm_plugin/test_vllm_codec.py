"""vLLM's frames, of several versions, and what is no such frame."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from paceline.core.codec import BadMessage
from paceline.vllm import codec
from paceline.vllm.codec import Notice, RankStats, Scale
from tests.net.peers import BAD_FRAMES
from tests.vllm_plugin import vllm_frames as frames

STATS = {"num_running_reqs": 4, "num_waiting_reqs": 3, "step_counter": 17, "current_wave": 2, "kv_cache_usage": 0.5}
OTHERS = {"num_skipped_waiting_reqs": 9, "prefix_cache_stats": {"reset": False}, "kv_cache_eviction_events": [1]}


def array(index: int, stats: object = None, complete: int | None = None, start: int | None = None) -> list[Any]:
    return [index, [], stats, 12.5, None, None, complete, start, None]


def frame(*values: Any, length: int = 9, index: int = 1) -> bytes:
    return msgspec.msgpack.encode(array(index, *values)[:length])


@pytest.mark.parametrize("length", [3, 4, 5, 6, 7, 8, 9])
def test_a_report_of_any_length(length: int) -> None:
    message = codec.read_rank(frame(STATS | OTHERS, length=length))
    assert message.engine_index == 1
    assert message.scheduler_stats == RankStats(3, 4, 17, 2, 0.5)
    assert (message.wave_complete, message.start_wave) == (None, None)


def test_a_longer_array_is_one_of_a_later_version() -> None:
    assert codec.read_rank(msgspec.msgpack.encode([*array(1, STATS), {"new": 1}])).scheduler_stats


@pytest.mark.parametrize("missing", STATS)
def test_a_key_that_an_older_version_lacks_is_zero(missing: str) -> None:
    stats = codec.read_rank(frame({key: value for key, value in STATS.items() if key != missing})).scheduler_stats
    assert stats is not None
    assert getattr(stats, missing) == 0


def test_waves() -> None:
    assert codec.read_rank(frame(None, 5, None)).wave_complete == 5
    assert codec.read_rank(frame(None, None, 6, length=8)).start_wave == 6


@pytest.mark.parametrize(
    "wrong",
    [
        [1, [[1]], None, 0.0],
        [1, [], None, 0.0, {"call_id": 1}],
        [-1, [], None],
        [70000, []],
        [1, [], STATS | {"kv_cache_usage": float("nan")}],
        [1, [], STATS | {"num_waiting_reqs": -1}],
        # In the machine's units this would be no number any more.
        [1, [], STATS | {"kv_cache_usage": 1e308}],
        [1, [], STATS | {"current_wave": 2**60}],
        array(1, None, None, -1),
        {"engine_index": 1},
        [],
    ],
)
def test_what_no_rank_says(wrong: object) -> None:
    with pytest.raises(BadMessage):
        codec.read_rank(msgspec.msgpack.encode(wrong))


def test_a_notice_keeps_what_it_leaves_out_as_it_came() -> None:
    assert codec.read_frontend(msgspec.msgpack.encode((b"\x02\x01", 7))) == Notice(b"\x02\x01", 0x102, 7)
    assert codec.read_frontend(msgspec.msgpack.encode((None, 7))) == Notice(None, None, 7)
    assert codec.read_frontend(msgspec.msgpack.encode((3, 7))) == Notice(3, 3, 7)


def test_scaling() -> None:
    assert codec.read_frontend(msgspec.msgpack.encode(("SCALE_ELASTIC_EP", 4))) == Scale(4)


@pytest.mark.parametrize(
    "wrong",
    [(b"\0\0", -1), (b"\0\0\0", 1), ("x", 1), (True, 1), (b"\0\0", True), ("SCALE_ELASTIC_EP", 0), (1, 2, 3),
     ("SCALE_ELASTIC_EP", 1025), ("SCALE_ELASTIC_EP", "4"), (b"\0\0", 2**60), 5, None, (b"\0\0", 1.5), {}],
)  # fmt: skip
def test_what_no_frontend_says(wrong: object) -> None:
    with pytest.raises(BadMessage):
        codec.read_frontend(msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize("bad_frames", BAD_FRAMES)
def test_bad_frames_are_a_bad_message(bad_frames: bytes) -> None:
    codec.whose_report(bad_frames)
    for read in (codec.read_rank, codec.read_frontend):
        with pytest.raises(BadMessage):
            read(bad_frames)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_bad_one(data: bytes) -> None:
    codec.whose_report(data)
    for read in (codec.read_rank, codec.read_frontend):
        try:
            read(data)
        except BadMessage as error:
            assert error.kind in {"malformed", "value", "too-large"}


def test_what_goes_out() -> None:
    first, second = codec.wake(3, b"\x01\x00")
    assert first == b"\x02"
    assert msgspec.msgpack.decode(second) == [3, b"\x01\x00"]
    assert msgspec.msgpack.decode(codec.view([[1, 2, 0.5]], 3, True)) == [[[1, 2, 0.5]], 3, True]
    assert msgspec.msgpack.decode(codec.view(None, 3, False)) == [None, 3, False]


def test_recorded_frames() -> None:
    runs = codec.read_rank(frames.RANK_1_RUNS)
    assert runs.scheduler_stats == RankStats(0, 1, 0, 0, 3.0518509475996325e-05)
    assert codec.whose_report(frames.RANK_1_RUNS) == b"\x99\x01"
    assert codec.read_rank(frames.RANK_0_STARTS).start_wave == 0
    assert codec.whose_report(frames.RANK_0_STARTS) is None
    assert codec.read_rank(frames.RANK_0_COMPLETES).wave_complete == 0
    assert codec.read_frontend(frames.NOTICE_OF_RANK_1) == Notice(b"\x01\x00", 1, 0)


# Whose report -------------------------------------------------------------------------------------
@pytest.mark.parametrize("index", [0, 1, 127, 128, 255, 256, 65535])
@pytest.mark.parametrize("length", [8, 9])
def test_reports_of_one_rank_begin_alike_and_with_nobody_elses(index: int, length: int) -> None:
    whose = codec.whose_report(frame(STATS | OTHERS, index=index, length=length))
    assert whose is not None
    assert whose == codec.whose_report(frame(STATS, index=index, length=length))
    assert whose != codec.whose_report(frame(STATS, index=index ^ 1, length=length))
    assert codec.read_rank(frame(STATS, index=index, length=length)).scheduler_stats


waves = st.one_of(st.none(), st.integers(0, 2**40), st.just(0xC0C0), st.just(0xC0C0C0C0))


@given(waves, waves, st.integers(0, 65535), st.integers(2, 9))
def test_what_speaks_of_a_wave_is_never_taken_for_a_mere_report(
    complete: int | None, start: int | None, index: int, length: int
) -> None:
    assert codec.whose_report(frame(None, complete, start, index=index, length=length)) is None
