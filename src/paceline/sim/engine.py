"""Engines that only take virtual time. The token at place i of every answer is i, so that a gap or repetition shows.

`VirtualEngine` does what the `timed` engine does in real time, for a trace of faults. `MemoryEngine` schedules as
today's engines do: continuous batching, decoding requests first; then prompts in chunks, in order of arrival, up to the
token budget; a request begins when a slot is free and its whole prompt fits into the KV memory. Answers take room as
they grow; where there is none left, the request that began last is pushed out and computed anew later (recompute).
Blocks of prompts are cached and shared where the trace tells which are equal.

It takes many steps that only decode at once: all decoding requests get one token a step, so it suffices to count steps
and to keep the requests by the step in which they end. Of an answer it hands out the first token, and all others with
the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence as Many
from heapq import heappop, heappush
from itertools import islice

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput, Stepped
from paceline.core.requests import AddRequest
from paceline.engines.timed import CostModel
from paceline.sim.collectives import ANY_NUMBER
from paceline.sim.processes import Planned

BLOCK_TOKENS = 512
"""Tokens of a block of a prompt that others may share."""
WATERMARK = 0.01
"""Share of the KV memory that no request begins in, so that those that run need not push it out at once."""
UNREPORTED = 0.01
"""Share of the KV memory by which its use may grow before a rank reports it, where steps are taken at once."""
LENGTH_WEIGHT = 0.02
"""How much of the expected length of an answer each one that ends makes up."""
FIRST_GUESS_TOKENS = 256


# Without memory ---------------------------------------------------------------------------------


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
        sequence = self._sequences[key] = _Sequence(key, request)
        self._to_prefill += sequence.to_prefill

    def abort(self, key: int) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._to_prefill -= sequence.to_prefill
            self._started -= sequence.started

    def has_work(self) -> bool:
        return bool(self._sequences)

    def plan(self, prefill_quota: int | None = None) -> Planned:
        """Choose what the next step computes.

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
        return Planned(self._costs.seconds(prefill, len(planned)) * self.slowness)

    def plan_dummy(self) -> Planned:
        """A step of the others', with nothing of its own."""
        return Planned(self._costs.seconds(0, 0) * self.slowness)

    def step(self, steps: int = 1) -> Stepped:
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
        startable = decoding = 0
        for sequence in islice(self._sequences.values(), self._slots):
            startable += sequence.to_prefill
            decoding += not sequence.to_prefill
        return Load(
            len(self._sequences) - self._started, self._started, self._slots, self._to_prefill,
            step_tokens=self._budget, decoding=decoding, startable_tokens=startable,
        )  # fmt: skip


# With memory ------------------------------------------------------------------------------------


class EngineShape(Struct, frozen=True):
    """What every engine is: its costs, slots, token budget, tokens of KV memory."""

    costs: CostModel = CostModel()
    slots: int = 64
    budget: int = 2048
    kv_tokens: int = 131_072


class Sequence:
    """What a request is, and what an engine has done of it.

    `number`: its place in the trace, `key` the rank's number of it. `to_prefill`: prompt tokens to compute before the
    next token. `private`: tokens of KV that are its own; `shared`: blocks of KV that others may use too. `made`: answer
    tokens, as of when it last began to decode; `told`: those that were handed out. `begins`, `ends`: by its engine's
    count of steps. `turn`: another number once it has been pushed out of its engine's memory.
    """

    __slots__ = (
        "answer", "begins", "blocks", "ends", "key", "made", "number", "private", "prompt", "shared", "to_prefill",
        "told", "turn",
    )  # fmt: skip

    def __init__(self, number: int, prompt: int, answer: int, blocks: Many[int] = ()) -> None:
        self.number, self.prompt, self.answer, self.blocks = number, prompt, answer, blocks
        self.to_prefill = prompt
        self.key = self.made = self.told = self.begins = self.ends = self.turn = self.private = 0
        self.shared: list[int] = []


class PrefixCache:
    """Blocks of KV that requests with the same beginning share, known by the trace's id of them.

    `held`: those in use, and by how many; `idle`: the others, which go where their room is needed, least lately used
    first.
    """

    __slots__ = ("held", "idle")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.idle: dict[int, None] = {}

    def match(self, blocks: Many[int]) -> int:
        """How many leading blocks are there."""
        held, idle = self.held, self.idle
        for count, block in enumerate(blocks):
            if block not in held and block not in idle:
                return count
        return len(blocks)

    def idle_among(self, blocks: Iterable[int]) -> int:
        idle = self.idle
        return sum(block in idle for block in blocks)

    def take(self, blocks: Iterable[int]) -> int:
        """Use these, which are there; returns how many nobody used before."""
        held, idle, woken = self.held, self.idle, 0
        for block in blocks:
            if block in idle:
                del idle[block]
                held[block] = 1
                woken += 1
            else:
                held[block] += 1
        return woken

    def add(self, block: int) -> bool:
        """A block has been computed and is in use. Returns False where there is one already: then it is not cached."""
        if block in self.held or block in self.idle:
            return False
        self.held[block] = 1
        return True

    def release(self, blocks: Iterable[int]) -> int:
        """Use these no more; returns how many nobody uses now. Later blocks go before earlier ones of a prompt."""
        freed = 0
        for block in reversed(list(blocks)):
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                self.idle[block] = None
                freed += 1
        return freed

    def evict(self, count: int) -> None:
        """Forget so many that nobody uses, at most all."""
        idle = self.idle
        for _ in range(min(count, len(idle))):
            del idle[next(iter(idle))]


class MemoryEngine:
    """One rank's engine.

    `find`: the request of the trace that one on the wire is. `most`: steps that it takes at once.
    """

    slowness = 1.0

    def __init__(self, shape: EngineShape, find: Callable[[AddRequest], Sequence], most: int = ANY_NUMBER - 1) -> None:
        self.shape = shape
        self._most = most
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.prefilling: deque[Sequence] = deque()
        self.decoding = self.to_prefill = self.kv_used = self.kv_waiting = 0
        self.kv_peak = self.hit_tokens = self.prompt_tokens = self.preempted = 0
        self.answer_tokens = float(FIRST_GUESS_TOKENS)
        self.prefilled = self.decoded = 0
        self.steps = 0
        """Those that decoded anything."""
        self._find = find
        self._cache = PrefixCache()
        self._ends: list[tuple[int, int, int, Sequence]] = []
        """The requests that decode, by the step in which they end."""
        self._chunks: list[tuple[Sequence, int]] = []
        self._steady = False
        self._room = int(shape.kv_tokens * (1 - WATERMARK))

    # What there is ------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def startable(self, limit: int) -> int:
        """Prompt tokens that the next step could compute, were its budget `limit` or more: of requests that run, and of
        those for which there are a slot and memory. At most `limit`.
        """
        tokens = sum(sequence.to_prefill for sequence in self.prefilling)
        if tokens >= limit or not self.may_begin():
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

    def load(self) -> Load:
        shape = self.shape
        # Nobody knows how long answers will be: those that run are expected to go on as long as any other.
        return Load(
            len(self.waiting), len(self.running), shape.slots, self.to_prefill, self.kv_used, shape.kv_tokens,
            step_tokens=shape.budget, decoding=self.decoding, kv_reserved=self.kv_used,
            answer_tokens=round(self.answer_tokens), kv_waiting=self.kv_waiting,
            startable_tokens=self.startable(shape.budget),
        )  # fmt: skip

    # Steps --------------------------------------------------------------------------------------

    def add(self, key: int, request: AddRequest) -> None:
        sequence = self._find(request)
        sequence.key = key
        self.queue(sequence)

    def queue(self, sequence: Sequence) -> None:
        """Let it wait for a slot and memory. It must fit into the memory alone."""
        self.waiting.append(sequence)
        self.to_prefill += sequence.to_prefill
        self.kv_waiting += sequence.to_prefill

    def abort(self, key: int) -> None:
        """In a trace nobody hangs up."""
        raise NotImplementedError

    def plan(self, prefill_quota: int | None = None) -> Planned:
        """Put the next step together, or many that only decode."""
        steps = self.steady()
        self._steady = steps > 0
        if steps:
            self.prefilled, self.decoded = 0, self.decoding
        else:
            self._begin(prefill_quota)
        return Planned(self.shape.costs.seconds(self.prefilled, self.decoded), max(1, steps))

    def plan_dummy(self) -> Planned:
        """As many steps of the others' as they like."""
        return Planned(self.shape.costs.seconds(0, 0), ANY_NUMBER)

    def step(self, steps: int = 1) -> Stepped:
        """So many steps of those planned are over."""
        begun, done = ([], self._advance(steps)) if self._steady else self._end()
        outputs = []
        for sequence in begun:
            if not sequence.told:
                sequence.told = 1
                outputs.append(StepOutput(sequence.key, [0]))
        for sequence in done:
            rest = list(range(sequence.told, sequence.answer))
            outputs.append(StepOutput(sequence.key, rest, finish_reason="stop"))
        return Stepped(outputs, self.load(), self.has_work(), self.prefilled, self.decoded)

    def steady(self) -> int:
        """How many of the next steps only decode, and the same requests. 0 where the next one does something else."""
        if not self.decoding or self.prefilling or self.may_begin():
            return 0
        ends = self._ends
        while ends and ends[0][3].turn != ends[0][2]:
            heappop(ends)
        room = (self.shape.kv_tokens - self.kv_used) // self.decoding
        unreported = max(1, int(self.shape.kv_tokens * UNREPORTED) // self.decoding)
        return min(ends[0][0] - self.steps, room, unreported, self._most)

    def _begin(self, quota: int | None) -> None:
        """Put one step together; `quota`: prompt tokens that it may compute at most.

        `prefilled` and `decoded` then say what it computes: prompt tokens, and answer tokens.
        """
        self._make_room()
        budget = max(0, self.shape.budget - self.decoding)
        if quota is not None and quota < budget:
            budget = quota
        chunks, done, whole = self._chunks, 0, 0
        chunks.clear()
        coming = iter(list(self.prefilling))
        while done < budget:
            sequence = next(coming, None) or (self._admit() if self.may_begin() else None)
            if sequence is None:
                break
            chunk = min(sequence.to_prefill, budget - done)
            chunks.append((sequence, chunk))
            done += chunk
            whole += chunk == sequence.to_prefill
        self.prefilled = done
        self.decoded = self.decoding + whole

    def _end(self) -> tuple[list[Sequence], list[Sequence]]:
        """The step is over: returns those whose prompt has been computed with it, and those that have ended."""
        done = self._advance(1) if self.decoding else []
        self.to_prefill -= self.prefilled
        begun: list[Sequence] = []
        for sequence, chunk in self._chunks:
            sequence.to_prefill -= chunk
            if not sequence.to_prefill:
                self.prefilling.popleft()
                self._share(sequence)
                if self._decode(sequence):
                    done.append(sequence)
                else:
                    begun.append(sequence)
        self._chunks.clear()
        return begun, done

    def _advance(self, steps: int) -> list[Sequence]:
        """So many steps in which requests decoded are over, at most `steady` many; returns those that have ended."""
        self.steps += steps
        self._use(self.decoding * steps)
        done: list[Sequence] = []
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            _, _, turn, sequence = heappop(ends)
            if sequence.turn == turn:
                self.decoding -= 1
                sequence.made = sequence.answer
                self._leave(sequence)
                self._ended(sequence)
                done.append(sequence)
        return done

    # Beginning and ending -----------------------------------------------------------------------

    def may_begin(self) -> bool:
        """Whether a slot and memory are free for the first that waits."""
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
        self.kv_waiting -= sequence.to_prefill
        self.running[sequence] = None
        self.prefilling.append(sequence)
        self.prompt_tokens += sequence.to_prefill
        woken = hits = 0
        if sequence.blocks:
            hits = self._hits(sequence)
            sequence.shared = list(sequence.blocks[: hits // BLOCK_TOKENS])
            woken = self._cache.take(sequence.shared)
            self.hit_tokens += hits
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
        sequence.begins = self.steps
        sequence.private += 1
        sequence.ends = self.steps + sequence.answer - sequence.made
        heappush(self._ends, (sequence.ends, sequence.number, sequence.turn, sequence))
        self.decoding += 1
        return False

    def _leave(self, sequence: Sequence) -> None:
        """It holds no slot and no memory any more."""
        del self.running[sequence]
        if sequence.ends:
            sequence.private += self.steps - sequence.begins
            sequence.ends = 0
        freed = 0
        if sequence.shared:
            freed = self._cache.release(sequence.shared)
            sequence.shared = []
        self.kv_used -= sequence.private + BLOCK_TOKENS * freed
        sequence.private = 0
        self._evict()

    def _ended(self, sequence: Sequence) -> None:
        self.answer_tokens += LENGTH_WEIGHT * (sequence.answer - self.answer_tokens)

    def _make_room(self) -> None:
        """Push requests out until each that decodes has room for one more token, the one that began last first."""
        while self.decoding and self.kv_used + self.decoding > self.shape.kv_tokens and len(self.running) > 1:
            self._push_out(next(reversed(self.running)))

    def _push_out(self, sequence: Sequence) -> None:
        if sequence.ends:
            sequence.made += self.steps - sequence.begins
            self.decoding -= 1
        else:
            self.prefilling.remove(sequence)
            self.to_prefill -= sequence.to_prefill
        self._leave(sequence)
        sequence.turn += 1
        sequence.to_prefill = sequence.prompt + sequence.made
        self.to_prefill += sequence.to_prefill
        self.kv_waiting += sequence.to_prefill
        self.waiting.appendleft(sequence)
        self.preempted += 1

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
