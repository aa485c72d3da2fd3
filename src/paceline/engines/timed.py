"""The `timed` engine: no model; it takes the time that a cost model says.

For load tests, for benchmarks of everything around an engine, and to hold the simulator against. A step
computes as an engine with chunked prefill and continuous batching does (decoding requests first, then
prompt chunks up to the token budget, KV for a request reserved when it starts), and lasts

    step_ms + prefill_ms x prompt tokens + decode_ms x decoding requests

by default 6 ms, 0.09 ms and 0.02 ms: an 8B-class model. Options: `--engine-option step_ms=0` and so on. With
`prefix_cache=1` a prompt that begins as an earlier one did costs what is new of it.
The text is a fixed sequence of words, so that a client can tell whether it got all of it, in order.

The `timed-lockstep` engine: `timed` as a rank of an expert-parallel model, whose steps contain collectives.

A step takes the time that the cost model says, and then an all-to-all among all ranks: so it lasts as long as the
slowest rank's. What a model would send there is left out. An idle rank's dummy step costs `step_ms`. The prefill quota
is obeyed. For comparing how lockstep ranks are driven, where `moe` would measure NumPy.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence as Many
from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.rank.events import KvChange, StepOutput
from paceline.core.requests import FinishReason
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings, Progress, Source, StepResult
from paceline.engines.chat import ChatPrompts, Conversation, Fragments
from paceline.engines.kept import KeptSchedule
from paceline.engines.scheduler import Schedule, TextSequence, counts
from paceline.engines.weights import Staged

if TYPE_CHECKING:
    from paceline.engines.group import RankGroup

DEFAULT_MAX_MODEL_LEN = 32768
VOCABULARY = 256


class CostModel(Struct, frozen=True):
    """What a step costs, in milliseconds."""

    step_ms: float = 6.0
    prefill_ms: float = 0.09
    decode_ms: float = 0.02
    load_ms: float = 0.0

    def seconds(self, prefill_tokens: int, decoding: int) -> float:
        """How long a step lasts."""
        return (self.step_ms + self.prefill_ms * prefill_tokens + self.decode_ms * decoding) / 1000


class TimedEngine(Engine):
    """An engine that only takes time."""

    resumes = True

    def __init__(self, settings: EngineSettings, costs: CostModel) -> None:
        self._costs = costs
        self._kv_total = settings.kv_cache_tokens or DEFAULT_MAX_MODEL_LEN * 8
        shape = settings.max_num_seqs, self._kv_total, settings.max_num_batched_tokens
        kept = self.keeps_prefixes(settings)
        keeping = KeptSchedule(*shape, NoMemory(), pooled=True, aside=self._kv_total) if kept else None
        self._schedule = keeping or Schedule(*shape)
        self._refused: list[StepOutput] = []
        self._prefill_limit: int | None = None
        self._staged = Staged(lambda path: path)

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> TimedEngine:
        costs = read_costs(settings.options)
        progress("starting", 0.0)
        time.sleep(costs.load_ms / 1000)
        progress("starting", 1.0)
        return cls(settings, costs)

    @classmethod
    def keeps_prefixes(cls, settings: EngineSettings) -> bool:
        return settings.options.get("prefix_cache") == "1"

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> ByteTokenizer:
        return ByteTokenizer(settings)

    @classmethod
    def check(cls, settings: EngineSettings, progress: Progress) -> None:
        read_costs(settings.options)

    def add(self, request: EngineRequest) -> None:
        sequence = TextSequence(request, request.params.max_tokens)
        if sequence.made >= sequence.room:
            self._refuse(request, f"the {sequence.made} tokens made already are the whole answer")
        elif sequence.reserved > self._kv_total:
            self._refuse(request, f"needs {sequence.reserved} tokens of KV memory, there are {self._kv_total}")
        else:
            self._schedule.queue(sequence)

    def _refuse(self, request: EngineRequest, error: str) -> None:
        self._refused.append(StepOutput(request.key, [], finish_reason="error", error=error))

    def abort(self, key: int) -> None:
        self._schedule.remove(key)

    def has_work(self) -> bool:
        return bool(self._schedule.running or self._schedule.waiting or self._refused)

    def step(self) -> StepResult:
        begin = time.monotonic()
        chunks = self._schedule.chunks(self._prefill_limit)
        prefilled, writing = counts(chunks)
        self._take_time(begin, prefilled, writing)
        outputs, self._refused = self._refused, []
        outputs += [self._emit(sequence) for sequence in self._schedule.done(chunks)]
        return StepResult(outputs, prefilled, writing)

    def load(self) -> Load:
        return self._schedule.load()

    def kv_events(self) -> KvChange | None:
        return self._schedule.kv_events() if isinstance(self._schedule, KeptSchedule) else None

    def stage_weights(self, source: Source) -> list[StepOutput]:
        self._staged.stage(source)
        return []

    def update_weights(self, source: Source, keep_kv: bool) -> None:
        """It has none; but what they are called is on its answers."""
        self._staged.take(source)
        if not keep_kv:
            self._schedule.preempt_all()

    def _take_time(self, begin: float, prefilled: int, writing: int) -> None:
        """Let the step last as long as it costs; it began at `begin`."""
        if prefilled or writing:
            sleep_until(begin + self._costs.seconds(prefilled, writing))

    def _emit(self, sequence: TextSequence) -> StepOutput:
        text = word(sequence.made)
        sequence.push((sequence.made + 1) % VOCABULARY)
        finished = sequence.made >= sequence.room
        if finished:
            self._schedule.remove(sequence.key)
        cached, sequence.cached = sequence.cached, 0
        reason: FinishReason | None = "length" if finished else None
        return StepOutput(sequence.key, sequence.tokens[-1:], text, reason, cached_tokens=cached)


class NoMemory:
    """Nothing is kept where nothing is computed: what a slot would have is known by its tokens alone."""

    def keep(self, slot: int, count: int) -> bool:
        return True

    def copy(self, source: int, slot: int, count: int) -> bool:
        return True

    def hand_out(self, slot: int) -> bytes:
        return b""

    def take_back(self, slot: int, state: bytes) -> bool:
        return True


class ByteTokenizer:
    """One token a byte: no vocabulary, and a prompt's length in tokens is its length in bytes."""

    def __init__(self, settings: EngineSettings) -> None:
        self.max_model_len = settings.max_model_len or DEFAULT_MAX_MODEL_LEN
        self.vocabulary_size = VOCABULARY
        self.longest_piece = 1
        self.model_name = "timed"
        self.chat_template: str | None = None
        self.sampling_defaults: Mapping[str, float] = {}

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Many[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def chat(self, conversation: Conversation) -> Fragments:
        return ChatPrompts(None, {}, {}).fragments(conversation)


def sleep_until(when: float) -> None:
    """Return at this time of the monotonic clock, or at once."""
    left_s = when - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)


def word(index: int) -> str:
    """The text of the token at `index` of every answer."""
    return f" {index}"


def read_costs(options: Mapping[str, str]) -> CostModel:
    """The cost model that the options ask for. Raises EngineError naming the option."""
    values: dict[str, float] = {}
    for name, text in options.items():
        if name == "prefix_cache" and text in ("0", "1"):
            continue
        if name not in CostModel.__struct_fields__:
            known = ", ".join([*CostModel.__struct_fields__, "prefix_cache (0 or 1)"])
            raise EngineError(f"--engine-option {name}: unknown; the timed engine has {known}")
        try:
            values[name] = float(text)
        except ValueError:
            raise EngineError(f"--engine-option {name}: {text!r} is no number") from None
        if not 0 <= values[name] < 1e9:
            raise EngineError(f"--engine-option {name}: must be 0 or more")
    return CostModel(**values)


class TimedLockstepEngine(TimedEngine):
    """An engine that only takes time, as long as the slowest of its group does. A `dp_size` of 1 needs no group."""

    lockstep: ClassVar[bool] = True

    def __init__(self, settings: EngineSettings, costs: CostModel) -> None:
        # Here and not at the top: a front-end imports this module for its tokenizer, and does without NumPy.
        import numpy as np

        super().__init__(settings, costs)
        self._alone = settings.dp_size == 1
        self._group: RankGroup | None = None
        self._nothing = np.zeros(0, np.uint8)

    def join(self, group: RankGroup) -> None:
        self._group = group

    def limit_prefill(self, tokens: int | None) -> None:
        self._prefill_limit = tokens

    def dummy_step(self) -> None:
        self._take_time(time.monotonic(), 0, 0)

    def _take_time(self, begin: float, prefilled: int, writing: int) -> None:
        sleep_until(begin + self._costs.seconds(prefilled, writing))
        if self._group is not None:
            self._group.all_to_all([self._nothing] * len(self._group.members))
        elif not self._alone:
            raise EngineError("the timed-lockstep engine steps among several ranks, and has not been given their group")
