"""An engine that only takes virtual time: what the `timed` engine does in real time.

The token at place i of every answer is i, so that a gap or a repetition shows.
"""

from __future__ import annotations

from itertools import islice

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput, Stepped
from paceline.core.requests import AddRequest
from paceline.engines.timed import CostModel


class _Sequence:
    __slots__ = ("chunk", "key", "limit", "made", "started", "to_prefill")

    def __init__(self, key: int, request: AddRequest) -> None:
        self.key = key
        self.to_prefill = request.tokens
        self.limit = request.params.max_tokens
        self.made = len(request.made_token_ids)
        self.chunk = 0
        self.started = False


class VirtualEngine:
    """`slots` requests at a time, `budget` tokens a step. `slowness`: by what its steps last longer than `costs` says.

    A step is planned (how long it takes) and then made, or made anew where its collective ended.
    """

    def __init__(self, costs: CostModel, slots: int, budget: int) -> None:
        self.slowness = 1.0
        self._costs = costs
        self._slots = slots
        self._budget = budget
        self._sequences: dict[int, _Sequence] = {}
        self._planned: list[_Sequence] = []
        self._started = 0
        self._to_prefill = 0

    def add(self, key: int, request: AddRequest) -> None:
        """Queue a request."""
        sequence = self._sequences[key] = _Sequence(key, request)
        self._to_prefill += sequence.to_prefill

    def abort(self, key: int) -> None:
        """Forget a request; unknown keys are ignored."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._to_prefill -= sequence.to_prefill
            self._started -= sequence.started

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences)

    def plan(self, prefill_quota: int | None = None) -> float:
        """Choose what the next step computes; returns its length in seconds.

        `prefill_quota`: prompt tokens that it computes at most, None for no limit.
        """
        planned: list[_Sequence] = []
        left = self._budget
        prefill = left if prefill_quota is None else prefill_quota
        for sequence in islice(self._sequences.values(), self._slots):
            sequence.chunk = min(sequence.to_prefill, prefill, max(0, left - 1)) if sequence.to_prefill else 0
            prefill -= sequence.chunk
            left -= max(1, sequence.chunk)
            planned.append(sequence)
        self._planned = planned
        prefill = sum(sequence.chunk for sequence in planned)
        return self._costs.seconds(prefill, len(planned)) * self.slowness

    def dummy_seconds(self) -> float:
        """How long a dummy step takes."""
        return self._costs.seconds(0, 0) * self.slowness

    def step(self) -> Stepped:
        """Make the step that was planned."""
        outputs: list[StepOutput] = []
        prefilled = 0
        for sequence in self._planned:
            prefilled += sequence.chunk
            self._to_prefill -= sequence.chunk
            sequence.to_prefill -= sequence.chunk
            if not sequence.started:
                sequence.started = True
                self._started += 1
            if sequence.to_prefill:
                continue
            made = sequence.made
            sequence.made += 1
            ended = sequence.made >= sequence.limit
            outputs.append(StepOutput(sequence.key, [made], f" {made}", "length" if ended else None))
            if ended:
                self._started -= 1
                del self._sequences[sequence.key]
        decoded = len(outputs)
        return Stepped(outputs, self.load(), self.has_work(), prefilled, decoded)

    def load(self) -> Load:
        """What is queued."""
        startable = decoding = 0
        for sequence in islice(self._sequences.values(), self._slots):
            startable += sequence.to_prefill
            decoding += not sequence.to_prefill
        return Load(
            len(self._sequences) - self._started, self._started, self._slots, self._to_prefill,
            step_tokens=self._budget, decoding=decoding, startable_tokens=startable,
        )  # fmt: skip
