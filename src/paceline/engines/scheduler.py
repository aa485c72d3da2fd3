"""Who runs, and what the next step computes. Plain bookkeeping: no llama.cpp in here.

A request holds a slot (a sequence number of llama.cpp) and, from the moment it starts, KV room for its
prompt and its whole answer. So memory never runs out in the middle, nothing is ever computed twice, and
no request can be pushed out by a later one. The price is paid only in a shared pool, where an answer's
room stands empty until the answer is written: there, `max_tokens` decides how many run at once.

Requests start strictly by priority, then arrival. One that does not fit yet lets nobody pass: that costs
some use of the memory, and is what keeps a large request from waiting for ever behind small ones.

A step computes one token of every request that is writing its answer, and with the rest of its token
budget pieces of prompts, again by priority, then arrival. The budget is never below the number of slots,
so both always move.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from typing import Any

from paceline.core.load import Load
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


class Sequence:
    """A request on its way: its tokens so far, and how many of them are in KV."""

    __slots__ = ("arrival", "computed", "prompt_length", "request", "room", "sampler", "slot", "text", "tokens")

    def __init__(self, request: EngineRequest, room: int, sampler: Any = None) -> None:
        self.request = request
        self.prompt_length = len(request.prompt_token_ids)
        self.tokens = [*request.prompt_token_ids, *request.made_token_ids]
        self.room = room
        self.sampler = sampler
        params = request.params
        self.text = IncrementalText(params.stop, include_stop=params.include_stop_str_in_output)
        self.arrival = 0
        self.slot = -1
        self.computed = 0

    @property
    def made(self) -> int:
        """Answer tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def reserved(self) -> int:
        """Tokens of KV that it may come to need."""
        return self.prompt_length + self.room

    @property
    def to_prefill(self) -> int:
        """Tokens that must be computed before the next token of the answer, 0 when only the last one is."""
        missing = len(self.tokens) - self.computed
        return 0 if self.made and missing == 1 else missing

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first."""
        return (self.request.priority, self.arrival)


class Schedule:
    """The waiting and the running, their slots and their room."""

    def __init__(self, slots: int, kv_tokens: int, budget: int) -> None:
        self._slots = slots
        self._free_slots = list(range(slots))
        self._kv_tokens = kv_tokens
        self._kv_reserved = 0
        self._budget = budget
        self._arrivals = 0
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._sequences: dict[int, Sequence] = {}
        self._held = False
        self._lengths = AnswerLengths()
        # Of those that wait, kept beside them: a load is made before and after each step.
        self._waiting_tokens = self._waiting_reserved = 0

    @property
    def waiting(self) -> int:
        """How many have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many hold a slot."""
        return len(self._running)

    def load(self) -> Load:
        """All that is queued."""
        running, waiting, budget = self._running, self._waiting, self._budget
        to_prefill = kv_used = decoding = 0
        # Of whole answers, also of those half written: requests that wait are expected to be like these.
        whole, left = 0.0, self._lengths.left
        for one in running:
            missing = one.to_prefill
            to_prefill += missing
            decoding += not missing
            kv_used += one.computed
            whole += one.made + left(one.request.params, one.room - one.made)
        looked_at = waiting[:LOOKED_AT]
        whole += sum(left(one.request.params, one.room) for one in looked_at)
        count = len(running) + len(looked_at)
        return Load(
            len(waiting), len(running), self._slots, to_prefill + self._waiting_tokens, kv_used, self._kv_tokens,
            step_tokens=budget, decoding=decoding, kv_reserved=self._kv_reserved,
            answer_tokens=round(whole / count) if count else 0, kv_waiting=self._waiting_reserved,
            startable_tokens=to_prefill + self._startable(),
        )  # fmt: skip

    def _startable(self) -> int:
        """Prompt tokens of those that wait and will start with the next step, with a budget of any size."""
        tokens = 0
        if not (self._held and self._running):
            room = self._kv_tokens - self._kv_reserved
            for sequence in self._waiting[: len(self._free_slots)]:
                room -= sequence.reserved
                if room < 0:
                    break
                tokens += sequence.to_prefill
        return tokens

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)
        self._waiting_tokens += sequence.to_prefill
        self._waiting_reserved += sequence.reserved

    def _wait_no_more(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._waiting_tokens -= sequence.to_prefill
        self._waiting_reserved -= sequence.reserved

    def add(self, sequence: Sequence) -> None:
        """Queue it. It must fit into an empty memory."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._sequences[sequence.request.key] = sequence
        self._wait(sequence)

    def remove(self, key: int) -> Sequence | None:
        """Forget one and free what it holds; whoever calls frees its KV where its slot is not -1."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return None
        self._lengths.ended(sequence.request.params, sequence.made, sequence.room)
        if sequence.slot < 0:
            self._wait_no_more(sequence)
        else:
            self._leave(sequence)
            self._held = False
        return sequence

    def admit(self) -> None:
        """Start whom slots and memory allow."""
        while self._waiting and self._free_slots and not (self._held and self._running):
            first = self._waiting[0]
            if self._kv_reserved + first.reserved > self._kv_tokens:
                return
            self._wait_no_more(first)
            # The lowest free slot: streams side by side are computed together (see `llama.py`).
            first.slot = heappop(self._free_slots)
            self._kv_reserved += first.reserved
            insort(self._running, first, key=lambda running: running.order)

    def chunks(self, prefill_limit: int | None = None) -> list[tuple[Sequence, int]]:
        """What the next step computes: of whom, and how many tokens; of prompts at most `prefill_limit` together."""
        chunks = [(sequence, 1) for sequence in self._running if not sequence.to_prefill]
        left = self._budget - len(chunks)
        if prefill_limit is not None:
            left = min(left, prefill_limit)
        for sequence in self._running:
            count = min(sequence.to_prefill, left)
            if count > 0:
                chunks.append((sequence, count))
                left -= count
        return chunks

    def preempt(self, sequence: Sequence) -> int:
        """Take back its slot, to be computed anew when somebody has left; returns the slot, to be freed.

        Only for the case that llama.cpp finds no room where there should be some.
        """
        slot = sequence.slot
        self._leave(sequence)
        sequence.slot = -1
        sequence.computed = 0
        self._wait(sequence)
        self._held = True
        return slot

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        heappush(self._free_slots, sequence.slot)
        self._kv_reserved -= sequence.reserved
