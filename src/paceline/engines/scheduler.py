"""Continuous batching with chunked prefill: who runs, and what the next step computes. For engines, and simulated ones.

A request holds a slot (a sequence number of llama.cpp) and, from the moment it starts, KV room for its
prompt and its whole answer. So memory never runs out in the middle, nothing is ever computed twice, and
no request can be pushed out by a later one. The price is paid only in a shared pool, where an answer's
room stands empty until the answer is written: there, `max_tokens` decides how many run at once.

Requests start strictly by priority, then arrival. One that does not fit yet lets nobody pass: that costs
some use of the memory, and is what keeps a large request from waiting for ever behind small ones.

A step computes one token of every request that is writing its answer, and with the rest of its token
budget pieces of prompts, again by priority, then arrival. The budget is never below the number of slots,
so both always move. A request starts with the step that computes the first piece of its prompt.

An engine whose answers take room as they grow says so in `fits`, `take` and `give` (`sim/engine.py`).
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any

from paceline.core.load import Load
from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest
from paceline.engines.text import AnswerLengths, IncrementalText


def why_never(request: EngineRequest, length: int, vocabulary: int) -> str | None:
    """Why an engine that takes `length` tokens, prompt and answer, out of `vocabulary` can never serve the request, or
    None."""
    prompt = request.prompt_token_ids
    if not prompt:
        return "the prompt is empty"
    if len(prompt) >= length:
        return f"the prompt has {len(prompt)} tokens; with at least one of an answer, {length} fit (max_model_len)"
    if len(request.made_token_ids) >= min(request.params.max_tokens, length - len(prompt)):
        return f"the {len(request.made_token_ids)} tokens made already are the whole answer"
    for token in (*prompt, *request.made_token_ids, *request.params.logit_bias):
        if not 0 <= token < vocabulary:
            return f"token {token} is not in the vocabulary of {vocabulary} tokens"
    return None


LOOKED_AT = 64
"""So many of those that wait tell how long answers are expected to be."""
ORDER = attrgetter("order")


class Sequence:
    """A request on its way: how many tokens it has, and how many of them are in KV.

    `key`: the rank's number of it. `made`: answer tokens so far, `room`: of the whole answer. `decodes`: whether its
    prompt is computed. `order`: who goes first.
    """

    __slots__ = ("computed", "decodes", "key", "made", "order", "params", "priority", "prompt", "room", "slot")

    def __init__(
        self, key: int, prompt: int, room: int, params: SamplingParams | None = None, priority: int = 0, made: int = 0
    ) -> None:
        self.key, self.prompt, self.room, self.params, self.priority = key, prompt, room, params, priority
        self.made, self.computed, self.decodes, self.slot = made, 0, False, -1
        self.order = (priority, 0)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.prompt + self.made

    @property
    def reserved(self) -> int:
        """Tokens of KV that it takes when it starts: all that it may come to need."""
        return self.prompt + self.room

    @property
    def to_prefill(self) -> int:
        """Tokens that must be computed before the next token of the answer, 0 when only the last one is."""
        return 0 if self.decodes else self.prompt + self.made - self.computed


class TextSequence(Sequence):
    """One with its tokens and the text of its answer. `reuses`: whether KV of other requests will do for its prompt;
    `cached`: tokens of it for which some was there. `names`: of the blocks that are computed (`core/blocks.py`).
    """

    __slots__ = ("cached", "names", "request", "reuses", "sampler", "text", "tokens")

    def __init__(self, request: EngineRequest, room: int, sampler: Any = None) -> None:
        params, made = request.params, request.made_token_ids
        super().__init__(request.key, len(request.prompt_token_ids), room, params, request.priority, len(made))
        self.request, self.sampler = request, sampler
        self.cached, self.reuses = 0, params.prompt_logprobs is None
        self.tokens, self.names = [*request.prompt_token_ids, *made], list[int]()
        self.text = IncrementalText(params.stop, include_stop=params.include_stop_str_in_output)

    def push(self, token: int) -> None:
        """The answer's next token."""
        self.tokens.append(token)
        self.made += 1


Chunks = list[tuple[Any, int]]
"""What a step computes: of which sequences, and how many tokens."""


def counts(chunks: Chunks) -> tuple[int, int]:
    """How many tokens of prompts such a step computes, and of answers it makes."""
    prompts = sum(count for sequence, count in chunks if not sequence.decodes)
    return prompts, sum(sequence.computed + count == sequence.length for sequence, count in chunks)


class Schedule:
    """The waiting and the running, in order, their slots and their room.

    `prefilling`: those that run and have not got their prompt computed; `decoding`: how many have. `to_prefill`: prompt
    tokens of all. `kv_waiting`: what those that wait will take of the memory.
    """

    def __init__(self, slots: int, kv_tokens: int, budget: int) -> None:
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.prefilling: list[Any] = []
        self.decoding = self.to_prefill = self.kv_waiting = self.kv_reserved = 0
        self._slots, self._kv_tokens, self._budget = slots, kv_tokens, budget
        self._free_slots = list(range(slots))
        self._arrivals = 0
        self._sequences: dict[int, Any] = {}
        self._held = False
        self._lengths = AnswerLengths()

    def load(self) -> Load:
        """All that is queued."""
        # Of whole answers, also of those half written: requests that wait are expected to be like these.
        whole, left, looked_at = 0.0, self._lengths.left, self.waiting[:LOOKED_AT]
        for one in self.running:
            whole += one.made + left(one.params, one.room - one.made)
        whole += sum(left(one.params, one.room) for one in looked_at)
        count = len(self.running) + len(looked_at)
        return Load(
            len(self.waiting), len(self.running), self._slots, self.to_prefill,
            sum(one.computed for one in self.running), self._kv_tokens, step_tokens=self._budget,
            decoding=self.decoding, kv_reserved=self.kv_reserved, answer_tokens=round(whole / count) if count else 0,
            kv_waiting=self.kv_waiting, startable_tokens=self._startable(),
        )  # fmt: skip

    def _startable(self) -> int:
        """Prompt tokens of those that run, and of those that would start with the next step if its budget sufficed."""
        tokens: int = sum(one.to_prefill for one in self.prefilling)
        if not (self._held and self.running):
            room = self._kv_tokens - self.kv_reserved
            for sequence in self.waiting[: len(self._free_slots)]:
                room -= sequence.reserved
                if room < 0:
                    break
                tokens += sequence.to_prefill
        return tokens

    # Coming and going ---------------------------------------------------------------------------

    def queue(self, sequence: Sequence) -> None:
        """Let it wait for a slot and memory. It must fit into an empty memory."""
        self._arrivals += 1
        sequence.order = (sequence.priority, self._arrivals)
        self._sequences[sequence.key] = sequence
        self._wait(sequence)

    def remove(self, key: int) -> Any:
        """Forget one and free what it holds; whoever calls frees its KV where its slot is not -1. None if unknown."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return None
        self.ended(sequence)
        if sequence.slot < 0:
            self._wait_no_more(sequence)
        else:
            self._leave(sequence)
            self._held = False
        return sequence

    def preempt(self, sequence: Sequence, *, hold: bool = True) -> int:
        """Take back its slot, to be computed anew; returns the slot, to be freed.

        `hold`: only when somebody has left, where it is not known how much memory there is.
        """
        slot: int = sequence.slot
        self._leave(sequence)
        sequence.slot, sequence.computed, sequence.decodes = -1, 0, False
        self._wait(sequence)
        self._held = hold
        return slot

    def preempt_all(self) -> list[int]:
        """Of all, since what was computed does not count any more."""
        return [self.preempt(sequence, hold=False) for sequence in list(self.running)]

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=ORDER)
        self.to_prefill += sequence.to_prefill
        self.kv_waiting += sequence.reserved

    def _wait_no_more(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.to_prefill -= sequence.to_prefill
        self.kv_waiting -= sequence.reserved

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.decodes:
            self.decoding -= 1
        else:
            self.prefilling.remove(sequence)
            self.to_prefill -= sequence.to_prefill
        heappush(self._free_slots, sequence.slot)
        self.give(sequence)

    # Steps --------------------------------------------------------------------------------------

    def chunks(self, prefill_limit: int | None = None) -> Chunks:
        """What the next step computes; of prompts at most `prefill_limit` tokens together."""
        return [(sequence, 1) for sequence in self.running if sequence.decodes] + self.prompts(prefill_limit)

    def prompts(self, limit: int | None = None) -> Chunks:
        """What it computes of prompts; whom slots, memory and the budget allow starts."""
        left, chunks = self._budget - self.decoding, Chunks()
        if limit is not None and limit < left:
            left = limit
        coming = iter(self.prefilling[:])
        while left > 0:
            sequence = next(coming, None) or (self._start() if self.may_begin() else None)
            if sequence is None:
                break
            count = min(sequence.to_prefill, left)
            chunks.append((sequence, count))
            left -= count
        return chunks

    def may_begin(self) -> bool:
        """Whether a slot and memory are free for the first that waits."""
        free = bool(self.waiting and self._free_slots) and not (self._held and self.running)
        return free and self.fits(self.waiting[0])

    def _start(self) -> Any:
        sequence = self.waiting[0]
        self._wait_no_more(sequence)
        sequence.slot = self.take_slot(sequence)
        self.take(sequence)
        self.to_prefill += sequence.to_prefill
        insort(self.running, sequence, key=ORDER)
        insort(self.prefilling, sequence, key=ORDER)
        return sequence

    def done(self, chunks: Chunks) -> list[Any]:
        """All this has been computed; returns those that get a token."""
        complete = []
        for sequence, count in chunks:
            sequence.computed += count
            if not sequence.decodes:
                self.to_prefill -= count
                if sequence.computed == sequence.length:
                    sequence.decodes = True
                    self.prefilling.remove(sequence)
                    self.decoding += 1
            if sequence.decodes:
                complete.append(sequence)
        return complete

    # Memory -------------------------------------------------------------------------------------

    def take_slot(self, sequence: Sequence) -> int:
        """It starts: the lowest free slot, since streams side by side are computed together (see `llama.py`)."""
        return heappop(self._free_slots)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there is memory for it to start."""
        return self.kv_reserved + sequence.reserved <= self._kv_tokens

    def take(self, sequence: Sequence) -> None:
        """It starts: let it have memory."""
        self.kv_reserved += sequence.reserved

    def give(self, sequence: Sequence) -> None:
        """It gives its memory back."""
        self.kv_reserved -= sequence.reserved

    def ended(self, sequence: Sequence) -> None:
        """It is over: learn from how long its answer was."""
        if sequence.params is not None:
            self._lengths.ended(sequence.params, sequence.made, sequence.room)
