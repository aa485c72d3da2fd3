"""vLLM's frames to values and back, without vLLM: what its ranks and front-ends say to a coordinator, and hear.

Every version from 0.10 on says the same in slightly different frames. A rank's message is a msgpack array that grew at
its end, so a shorter one lacks what it did not know; the statistics in it are a map of which five keys are read, so
other keys do not matter and a missing one is zero. What goes out depends on the version (`VllmDialect`): it is told.

Nothing here is unpickled, and a frame that is none of these is a `BadMessage` of a countable kind. What a rank said
last is kept as values of our machine's (`RankWords`); `translation.py` says what they mean.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from paceline.core.codec import BadMessage, Decoder
from paceline.core.coordinator.wave import Observed
from paceline.core.limits import MAX_CONTROL_BYTES
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, FromRank, RankHello, RankReport, StartWave, WaveComplete
from paceline.core.requests import Count, RankNumber, Wave

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


_rank_decoder = Decoder[RankMessage](RankMessage, MAX_CONTROL_BYTES)
_frontend_decoder = Decoder[Any](Any, MAX_CONTROL_BYTES)
_encoder = msgspec.msgpack.Encoder()


def read_rank(frame: bytes) -> RankMessage:
    """A rank's message. Raises BadMessage of kind `too-large`, `malformed` or `value`."""
    message = _rank_decoder.decode(frame)
    if bytes(message.outputs) != _EMPTY or bytes(message.utility_output) != _NIL:
        raise BadMessage("value", f"rank {message.engine_index} sent outputs to the coordinator")
    if message.scheduler_stats is not None and not math.isfinite(message.scheduler_stats.kv_cache_usage):
        raise BadMessage("value", f"rank {message.engine_index} reports a KV use that is not finite")
    return message


def read_frontend(frame: bytes) -> Notice | Scale:
    """A front-end's message. Raises BadMessage of kind `too-large`, `malformed` or `value`."""
    said = _frontend_decoder.decode(frame)
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


def _is_number(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


Greeting = Literal["none", "once", "each"]


class VllmDialect(Struct, frozen=True):
    """One version's ways; the defaults are those of 0.32.

    `count_fields`: numbers a rank in what front-ends hear: waiting and running, since 0.28 the used share of KV too.
    `greeting`: whether a rank waits for READY when it has subscribed: not in 0.10.0; a rank that gets it a second time
    breaks (`once`) or, since about 0.17, ignores it (`each`). `proof_step`: a rank that reports this step of a wave, or
    a later one, has come through an all-reduce with all others, so all run. Ranks agree every `dp_sync_interval` steps,
    since 0.30 after the first step as well. `wake_is_safe`: a rank that is paused, or sleeps, ignores a wake (since
    about 0.22). `says_started`: rank 0 says `start_wave` when its loop has come through the first all-reduce (since
    0.30), so silence after a wake means something.
    """

    count_fields: int = 3
    greeting: Greeting = "each"
    proof_step: int = 1
    wake_is_safe: bool = True
    says_started: bool = True


LIFE = 1
"""The incarnation of every rank: under vLLM there is one."""
ADDRESS = "tcp://vllm"
KV_PARTS = 2**40
"""vLLM says the used share of KV; the machine counts tokens."""
NOTHING = Observed(-1, False)


class RankWords:
    """The last words of `size` ranks. `proof_step`: `VllmDialect`."""

    def __init__(self, size: int, *, lockstep: bool, proof_step: int) -> None:
        self.size = size
        self.proved = -1
        """The last wave of which it is known that all ranks run in it, or have."""
        self._lockstep = lockstep
        self._proof_step = proof_step
        self._said: dict[int, Observed] = {}
        self._reports: dict[int, RankReport] = {}

    def hellos(self, wave: int) -> list[FromRank]:
        """All ranks introduce themselves as they stand by what they said last; those that said nothing of this wave or
        a later one are paused before it. Their last reports follow.
        """
        said = ((rank, self._said.get(rank, NOTHING)) for rank in range(self.size))
        states = [(rank, state if state.wave >= wave else Observed(wave, False)) for rank, state in said]
        hellos = [RankHello(PROTOCOL_VERSION, rank, LIFE, ADDRESS, True, at.wave, at.running) for rank, at in states]
        return [*hellos, *self._reports.values()]

    def resize(self, size: int) -> None:
        """There are so many ranks now. Of new ones nothing is known."""
        self.size = size
        self.proved = -1
        self._said = {rank: said for rank, said in self._said.items() if rank < size}
        self._reports = {rank: report for rank, report in self._reports.items() if rank < size}

    def report(self, rank: int, stats: RankStats) -> RankReport:
        load = Load(
            stats.num_waiting_reqs, stats.num_running_reqs, kv_used=round(stats.kv_cache_usage * KV_PARTS),
            kv_total=KV_PARTS,
        )  # fmt: skip
        if not self._lockstep:
            self._reports[rank] = plain = RankReport(rank, LIFE, 0, 0, False, load)
            return plain
        wave, step = stats.current_wave, stats.step_counter
        works = stats.num_waiting_reqs + stats.num_running_reqs > 0 or step > 0
        runs = works or self._said.get(rank) == Observed(wave, True)
        self._says(rank, wave, runs)
        # A step is of its wave: across waves they are in order of both.
        self._reports[rank] = report = RankReport(rank, LIFE, wave << 32 | step, wave, runs, load)
        return report

    def proves(self, stats: RankStats) -> bool:
        """Whether this report shows that all ranks run in its wave, and that is new."""
        return self._lockstep and stats.step_counter >= self._proof_step and stats.current_wave > self.proved

    def prove(self, wave: int) -> list[FromRank]:
        """All ranks run in this wave, or have: the words of those that have not said so."""
        self.proved = wave
        runs = Observed(wave, True)
        words: list[FromRank] = []
        for rank in range(self.size):
            said = self._said.get(rank, NOTHING)
            if said.wave <= wave and said != runs:
                self._said[rank] = runs
                words.append(StartWave(rank, LIFE, wave))
        return words

    def start(self, rank: int, wave: int) -> FromRank:
        self._says(rank, wave, True)
        return StartWave(rank, LIFE, wave)

    def complete(self, wave: int) -> list[FromRank]:
        """All ranks have agreed to end this wave: the words of all but those that are beyond it."""
        words: list[FromRank] = []
        for rank in range(self.size):
            if self._said.get(rank, NOTHING).wave <= wave:
                self._said[rank] = Observed(wave + 1, False)
                words.append(WaveComplete(rank, LIFE, wave))
        return words

    def silent(self, wave: int) -> list[int]:
        """Ranks that have given no sign that they run in this wave, or of a later one."""
        runs = Observed(wave, True)
        said = ((rank, self._said.get(rank, NOTHING)) for rank in range(self.size))
        return [rank for rank, state in said if not (state == runs or state.wave > wave)]

    def loads(self) -> list[dict[str, object]]:
        """Every rank's last report, as `paceline loads` shows it; zeros where there is none."""
        none = RankReport(0, LIFE, 0, 0, False, Load())
        said = ((rank, self._reports.get(rank, none)) for rank in range(self.size))
        return [
            {"rank": rank, "waiting": last.load.waiting, "running": last.load.running, "kv_used": last.load.kv_used,
             "kv_total": last.load.kv_total, "wave": last.wave, "step": last.step & 0xFFFFFFFF}
            for rank, last in said
        ]  # fmt: skip

    def _says(self, rank: int, wave: int, running: bool) -> None:
        if wave >= self._said.get(rank, NOTHING).wave:
            self._said[rank] = Observed(wave, running)
