"""An engine as the simulator sees it: what its next step computes and costs, and what that makes.

It schedules as today's engines do: continuous batching, decoding requests first; then prompts in chunks, in order of
arrival, up to the token budget; a request begins when a slot is free and its whole prompt fits into the KV memory.
Answers take room as they grow; where there is none left, the request that began last is pushed out and computed anew
later (recompute). Blocks of prompts are cached and shared where the trace tells which are equal.

Time is nobody's business here. A step is begun and ended, and many steps that only decode are taken at once
(`steady`, `advance`): all decoding requests get one token a step, so it suffices to count steps and to keep the
requests by the step in which they end.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import NamedTuple

from msgspec import Struct

from paceline.core.load import Load
from paceline.engines.timed import CostModel
from paceline.simulate.traffic.prefix_cache import PrefixCache
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import BLOCK_TOKENS

MANY_STEPS = 1 << 40
WATERMARK = 0.01
"""Share of the KV memory that no request begins in, so that those that run need not push it out at once."""

LENGTH_WEIGHT = 0.02
"""How much of the expected length of an answer each one that ends makes up."""

FIRST_GUESS_TOKENS = 256


class EngineShape(Struct, frozen=True):
    """What every engine is: its costs, slots, token budget, tokens of KV memory."""

    costs: CostModel = CostModel()
    slots: int = 64
    budget: int = 2048
    kv_tokens: int = 131_072


class Counts(NamedTuple):
    """What an engine has, as of a moment between two steps."""

    waiting: int = 0
    running: int = 0
    decoding: int = 0
    to_prefill: int = 0
    kv_used: int = 0
    kv_waiting: int = 0


class Engine:
    """One rank's engine."""

    def __init__(self, shape: EngineShape) -> None:
        self.shape = shape
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.prefilling: deque[Sequence] = deque()
        self.decoding = 0
        self.to_prefill = 0
        self.kv_used = 0
        self.kv_peak = 0
        self.hit_tokens = 0
        self.prompt_tokens = 0
        self.preempted = 0
        self.finished = 0
        self.answer_tokens = float(FIRST_GUESS_TOKENS)
        self.prefilled = 0
        self.decoded = 0
        self._cache = PrefixCache()
        # Steps that decoded anything; the requests that decode, by the step in which they end.
        self._steps = 0
        self._ends: list[tuple[int, int, Sequence, int]] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._room = int(shape.kv_tokens * (1 - WATERMARK))

    # What there is ------------------------------------------------------------------------------

    def fits_ever(self, sequence: Sequence) -> bool:
        """Whether the memory is large enough for it."""
        return sequence.prompt + sequence.answer <= self.shape.kv_tokens

    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.running or self.waiting)

    def wants_prefill(self) -> bool:
        """Whether a step with any budget for prompts would compute one."""
        return bool(self.prefilling) or self._may_begin()

    def startable(self, limit: int) -> int:
        """Prompt tokens that the next step could compute, were its budget `limit` or more: of requests that run, and of
        those for which there are a slot and memory. At most `limit`.
        """
        tokens = sum(sequence.to_prefill for sequence in self.prefilling)
        if tokens >= limit or not self._may_begin():
            return min(tokens, limit)
        slots, room = self.shape.slots - len(self.running), self._room - self.kv_used
        for place, sequence in enumerate(self.waiting):
            # What others share is not looked for beyond the first: that it may begin is known.
            room -= sequence.to_prefill if place else 0
            if place >= slots or room < 0:
                break
            tokens += sequence.to_prefill
            room -= 0 if place else sequence.to_prefill
            if tokens >= limit:
                break
        return min(tokens, limit)

    def counts(self) -> Counts:
        """What there is now; only between two steps."""
        return Counts(
            len(self.waiting), len(self.running), self.decoding, self.to_prefill, self.kv_used,
            sum(sequence.to_prefill for sequence in self.waiting),
        )  # fmt: skip

    def load(self, counts: Counts, grown: int) -> Load:
        """The load that the rank reports, with `grown` more tokens in KV memory than when it was counted."""
        shape, costs = self.shape, self.shape.costs
        used = counts.kv_used + grown
        answer = round(self.answer_tokens)
        return Load(
            counts.waiting, counts.running, shape.slots, counts.to_prefill, used, shape.kv_tokens,
            finished=self.finished, step_s=costs.step_ms / 1e3, prompt_token_s=costs.prefill_ms / 1e3,
            answer_token_s=costs.decode_ms / 1e3, step_tokens=shape.budget, decoding=counts.decoding,
            # Nobody knows how long answers will be: those that run are expected to go on as long as any other.
            kv_reserved=used, answers_left=counts.running * answer,
            first_end=answer // counts.running if counts.running else 0, answer_tokens=answer,
            kv_waiting=counts.kv_waiting,
        )  # fmt: skip

    def left(self, sequence: Sequence) -> int:
        """Tokens that the answer lacks, of one that is here. For those who know everything."""
        made = sequence.made + (self._steps - sequence.begins if sequence.ends else 0)
        return sequence.answer - made

    # Steps --------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a request that `fits_ever`."""
        self.waiting.append(sequence)
        self.to_prefill += sequence.to_prefill

    def begin(self, quota: int | None = None) -> None:
        """Put the next step together; `quota`: prompt tokens that it may compute at most.

        `prefilled` and `decoded` then say what it computes: prompt tokens, and answer tokens.
        """
        self._make_room()
        budget = max(0, self.shape.budget - self.decoding)
        if quota is not None and quota < budget:
            budget = quota
        chunks, done, whole = self._chunks, 0, 0
        chunks.clear()
        for sequence in self.prefilling:
            if done >= budget:
                break
            chunk = min(sequence.to_prefill, budget - done)
            chunks.append((sequence, chunk))
            done += chunk
            whole += chunk == sequence.to_prefill
        while done < budget and self._may_begin():
            sequence = self._admit()
            chunk = min(sequence.to_prefill, budget - done)
            chunks.append((sequence, chunk))
            done += chunk
            whole += chunk == sequence.to_prefill
        self.prefilled = done
        self.decoded = self.decoding + whole

    def end(self) -> tuple[list[Sequence], list[Sequence]]:
        """The step is over: returns those that have their first token of it, and those that have ended."""
        done: list[Sequence] = []
        if self.decoding:
            done = self.advance(1)
        self.to_prefill -= self.prefilled
        begun: list[Sequence] = []
        for sequence, chunk in self._chunks:
            sequence.to_prefill -= chunk
            if not sequence.to_prefill:
                self.prefilling.popleft()
                self._share(sequence)
                begun.append(sequence)
                if self._decode(sequence):
                    done.append(sequence)
        self._chunks.clear()
        return begun, done

    def steady(self) -> int:
        """How many of the next steps only decode, and the same requests. 0 where the next one does something else."""
        if not self.decoding or self.prefilling or self._may_begin():
            return 0
        self._drop_void()
        room = (self.shape.kv_tokens - self.kv_used) // self.decoding
        return min(self._ends[0][0] - self._steps, room)

    def advance(self, steps: int) -> list[Sequence]:
        """So many steps that only decode are over, at most `steady` many; returns those that have ended."""
        self._steps += steps
        self._use(self.decoding * steps)
        done: list[Sequence] = []
        ends = self._ends
        while ends and ends[0][0] <= self._steps:
            _, _, sequence, turn = heappop(ends)
            if sequence.turn == turn:
                self.decoding -= 1
                sequence.made = sequence.answer
                self._leave(sequence)
                self._ended(sequence)
                done.append(sequence)
        return done

    # Beginning and ending -----------------------------------------------------------------------

    def _may_begin(self) -> bool:
        if not self.waiting or len(self.running) >= self.shape.slots:
            return False
        sequence = self.waiting[0]
        needed = sequence.to_prefill
        if sequence.blocks:
            hits = self._hits(sequence)
            shared = hits - BLOCK_TOKENS * self._cache.idle_among(sequence.blocks[: hits // BLOCK_TOKENS])
            needed -= shared
        # Where nobody runs there is nothing to wait for.
        return self.kv_used + needed <= (self._room if self.running else self.shape.kv_tokens)

    def _hits(self, sequence: Sequence) -> int:
        # The last token is always computed: its logits are the first answer token's.
        blocks = sequence.blocks[: (sequence.prompt - 1) // BLOCK_TOKENS]
        return BLOCK_TOKENS * self._cache.match(blocks)

    def _admit(self) -> Sequence:
        sequence = self.waiting.popleft()
        self.running[sequence] = None
        self.prefilling.append(sequence)
        self.prompt_tokens += sequence.to_prefill
        woken = 0
        hits = 0
        if sequence.blocks:
            hits = self._hits(sequence)
            sequence.shared = list(sequence.blocks[: hits // BLOCK_TOKENS])
            woken = self._cache.take(sequence.shared)
            self.hit_tokens += hits
            sequence.hits = hits
        sequence.to_prefill -= hits
        self.to_prefill -= hits
        sequence.private = sequence.to_prefill
        self._use(sequence.private + BLOCK_TOKENS * woken)
        return sequence

    def _share(self, sequence: Sequence) -> None:
        """Its prompt is computed: the whole blocks of it can be used by others."""
        for block in sequence.blocks[len(sequence.shared) : sequence.prompt // BLOCK_TOKENS]:
            if not self._cache.add(block):
                break
            sequence.shared.append(block)
            sequence.private -= BLOCK_TOKENS

    def _decode(self, sequence: Sequence) -> bool:
        """It gets the token that its prompt ends with; returns whether that was its last."""
        sequence.made += 1
        self._use(1)
        if sequence.made >= sequence.answer:
            sequence.private += 1
            self._leave(sequence)
            self._ended(sequence)
            return True
        # What it has of KV is known by the steps from here on.
        sequence.begins = self._steps
        sequence.private += 1
        sequence.ends = self._steps + sequence.answer - sequence.made
        heappush(self._ends, (sequence.ends, sequence.number, sequence, sequence.turn))
        self.decoding += 1
        return False

    def _leave(self, sequence: Sequence) -> None:
        """It holds no slot and no memory any more."""
        del self.running[sequence]
        if sequence.ends:
            sequence.private += self._steps - sequence.begins
            sequence.ends = 0
        freed = 0
        if sequence.shared:
            freed = self._cache.release(sequence.shared)
            sequence.shared = []
        self.kv_used -= sequence.private + BLOCK_TOKENS * freed
        sequence.private = 0
        self._evict()

    def _ended(self, sequence: Sequence) -> None:
        self.finished += 1
        self.answer_tokens += LENGTH_WEIGHT * (sequence.answer - self.answer_tokens)

    def _make_room(self) -> None:
        """Push requests out until each that decodes has room for one more token, the one that began last first."""
        while self.decoding and self.kv_used + self.decoding > self.shape.kv_tokens and len(self.running) > 1:
            self._push_out(next(reversed(self.running)))

    def _push_out(self, sequence: Sequence) -> None:
        if sequence.ends:
            sequence.made += self._steps - sequence.begins
            self.decoding -= 1
        else:
            self.prefilling.remove(sequence)
            self.to_prefill -= sequence.to_prefill
        self._leave(sequence)
        sequence.turn += 1
        sequence.hits = 0
        sequence.to_prefill = sequence.prompt + sequence.made
        self.to_prefill += sequence.to_prefill
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _drop_void(self) -> None:
        ends = self._ends
        while ends and ends[0][2].turn != ends[0][3]:
            heappop(ends)

    def _use(self, tokens: int) -> None:
        self.kv_used += tokens
        if self.kv_used > self.kv_peak:
            self.kv_peak = self.kv_used
        self._evict()

    def _evict(self) -> None:
        idle = self._cache.idle
        if idle:
            excess = self.kv_used + BLOCK_TOKENS * len(idle) - self.shape.kv_tokens
            if excess > 0:
                self._cache.evict(-(-excess // BLOCK_TOKENS))
