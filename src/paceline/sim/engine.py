"""Engines that only take virtual time, on the scheduler of the real ones. The token at place i of every answer is i, so
that a gap or repetition shows.

`VirtualEngine` does what the `timed` engine does in real time, for a trace of faults. `MemoryEngine` has the memory of
today's engines: a request begins when a slot is free and its whole prompt fits; answers take room as they grow; where
there is none left, the request that came last is pushed out and computed anew later (recompute). Blocks of prompts are
cached and shared where the trace tells which are equal.

It takes many steps that only decode at once: all decoding requests get one token a step, so it suffices to count steps
and to keep the requests by the step in which they end. Of an answer it hands out the first token, and all others with
the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Many
from heapq import heappop, heappush

from msgspec import Struct

from paceline.core.blocks import BLOCK_TOKENS as BLOCK_NAMED
from paceline.core.load import Load
from paceline.core.rank.events import KvChange, StepOutput, Stepped
from paceline.core.requests import AddRequest
from paceline.engines import scheduler
from paceline.engines.scheduler import Chunks, Schedule, counts
from paceline.engines.timed import CostModel, word
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
KV_TOKENS = 262_144
"""Of an engine for faults, as the `timed` engine has by default."""


class VirtualEngine(Schedule):
    """`slots` requests at a time, `budget` tokens a step. `slowness`: by what its steps last longer than `costs` says.

    A step is planned (how long it takes) and then made, or planned anew where its collective ended.
    """

    def __init__(self, costs: CostModel, slots: int, budget: int) -> None:
        super().__init__(slots, KV_TOKENS, budget)
        self.slowness = 1.0
        self._costs = costs
        self._planned: Chunks = []

    def add(self, key: int, request: AddRequest) -> None:
        params, made = request.params, len(request.made_token_ids)
        prompt = len(request.prompt_token_ids)
        self.queue(scheduler.Sequence(key, prompt, params.max_tokens, params, request.priority, made))

    def abort(self, key: int) -> None:
        self.remove(key)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def kv_events(self) -> KvChange | None:
        return None

    def plan(self, prefill_quota: int | None = None) -> Planned:
        """Choose what the next step computes, of prompts at most `prefill_quota` tokens."""
        self._planned = self.chunks(prefill_quota)
        return Planned(self._costs.seconds(*counts(self._planned)) * self.slowness)

    def plan_dummy(self) -> Planned:
        """A step of the others', with nothing of its own."""
        return Planned(self._costs.seconds(0, 0) * self.slowness)

    def step(self, steps: int = 1) -> Stepped:
        figures, outputs = counts(self._planned), []
        for sequence in self.done(self._planned):
            made, sequence.made = sequence.made, sequence.made + 1
            ended = sequence.made >= sequence.room
            outputs.append(StepOutput(sequence.key, [made], word(made), "length" if ended else None))
            if ended:
                self.remove(sequence.key)
        return Stepped(outputs, self.load(), self.has_work(), *figures)


# With memory ------------------------------------------------------------------------------------


class EngineShape(Struct, frozen=True):
    """What every engine is: its costs, slots, token budget, tokens of KV memory and of a block of it."""

    costs: CostModel = CostModel()
    slots: int = 64
    budget: int = 2048
    kv_tokens: int = 131_072
    block_tokens: int = BLOCK_TOKENS


class Sequence(scheduler.Sequence):
    """A request of a trace, and what an engine has done of it.

    `number`: its place in the trace. `private`: tokens of KV that are its own; `shared`: blocks of KV that others may
    use too. `made`: answer tokens, as of when it last began to decode; `told`: those that were handed out. `begins`,
    `ends`: by its engine's count of steps. `turn`: another number once it has given its engine's memory back.
    `session`: that it is a turn of, 0 for none.
    """

    __slots__ = ("begins", "blocks", "ends", "number", "private", "session", "shared", "told", "turn")

    def __init__(self, number: int, prompt: int, answer: int, blocks: Many[int] = (), session: int = 0) -> None:
        super().__init__(0, prompt, answer)
        self.number, self.blocks, self.session = number, blocks, session
        self.told = self.begins = self.ends = self.turn = self.private = 0
        self.shared: list[int] = []

    @property
    def answer(self) -> int:
        """Tokens of the whole answer."""
        return self.room

    @property
    def reserved(self) -> int:
        """It takes room for what is to be computed, and more as it grows."""
        return self.to_prefill


class PrefixCache:
    """Blocks of KV that requests with the same beginning share, known by the trace's id of them.

    `held`: those in use, and by how many; `idle`: the others, which go where their room is needed, least lately used
    first.
    """

    __slots__ = ("changed", "held", "idle")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.idle: dict[int, None] = {}
        self.changed: dict[int, bool] = {}
        """Since it was last asked: by block, whether it is there now."""

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
        self.changed[block] = True
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
            block = next(iter(idle))
            del idle[block]
            self.changed[block] = False


class MemoryEngine(Schedule):
    """One rank's engine.

    `find`: the request of the trace that one on the wire is. `most`: steps that it takes at once.
    """

    slowness = 1.0

    def __init__(self, shape: EngineShape, find: Callable[[AddRequest], Sequence], most: int = ANY_NUMBER - 1) -> None:
        super().__init__(shape.slots, shape.kv_tokens, shape.budget)
        self.shape = shape
        self.kv_used = self.kv_peak = self.hit_tokens = self.prompt_tokens = self.preempted = 0
        self.answer_tokens = float(FIRST_GUESS_TOKENS)
        self.prefilled = self.decoded = 0
        self.steps = 0
        """Those that decoded anything."""
        self._most, self._find = most, find
        self._cache = PrefixCache()
        self._ends: list[tuple[int, int, int, Sequence]] = []
        """The requests that decode, by the step in which they end."""
        self._planned: Chunks = []
        self._steady = False
        self._block_tokens = shape.block_tokens
        self._room = int(shape.kv_tokens * (1 - WATERMARK))

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def startable(self, limit: int) -> int:
        """Prompt tokens that the next step could compute, were its budget `limit` or more: of requests that run, and of
        those for which there are a slot and memory. At most `limit`.
        """
        tokens: int = sum(sequence.to_prefill for sequence in self.prefilling)
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

    def abort(self, key: int) -> None:
        self.remove(key)

    def plan(self, prefill_quota: int | None = None) -> Planned:
        """Put the next step together, or many that only decode; `prefilled`, `decoded`: the tokens of each."""
        steps = self.steady()
        self._steady = steps > 0
        if steps:
            self.prefilled, self.decoded = 0, self.decoding
        else:
            self._make_room()
            self._planned = self.prompts(prefill_quota)
            self.prefilled, whole = counts(self._planned)
            self.decoded = self.decoding + whole
        return Planned(self.shape.costs.seconds(self.prefilled, self.decoded), max(1, steps))

    def plan_dummy(self) -> Planned:
        """As many steps of the others' as they like."""
        return Planned(self.shape.costs.seconds(0, 0), ANY_NUMBER)

    def step(self, steps: int = 1) -> Stepped:
        """So many steps of those planned are over."""
        outputs: list[StepOutput] = []
        done = self._advance(steps) if self.decoding else []
        if not self._steady:
            for sequence in self.done(self._planned):
                self._share(sequence)
                if self._decode(sequence):
                    done.append(sequence)
                elif not sequence.told:
                    sequence.told = 1
                    outputs.append(StepOutput(sequence.key, [0]))
        for sequence in done:
            outputs.append(StepOutput(sequence.key, list(range(sequence.told, sequence.room)), finish_reason="stop"))
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

    def _advance(self, steps: int) -> list[Sequence]:
        """So many steps in which requests decoded are over, at most `steady` many; returns those that have ended."""
        self.steps += steps
        self._use(self.decoding * steps)
        done: list[Sequence] = []
        ends = self._ends
        while ends and ends[0][0] <= self.steps:
            _, _, turn, sequence = heappop(ends)
            if sequence.turn == turn:
                self.remove(sequence.key)
                done.append(sequence)
        return done

    def _decode(self, sequence: Sequence) -> bool:
        """It gets the token that its prompt ends with; returns whether that was its last."""
        sequence.made += 1
        sequence.private += 1
        self._use(1)
        if sequence.made >= sequence.room:
            self.remove(sequence.key)
            return True
        # What it has of KV is known by the steps from here on.
        sequence.begins = self.steps
        sequence.ends = self.steps + sequence.room - sequence.made
        heappush(self._ends, (sequence.ends, sequence.number, sequence.turn, sequence))
        return False

    def ended(self, sequence: scheduler.Sequence) -> None:
        self.answer_tokens += LENGTH_WEIGHT * (sequence.room - self.answer_tokens)

    # Memory -------------------------------------------------------------------------------------

    def fits(self, sequence: Sequence) -> bool:  # type: ignore[override]
        needed = sequence.to_prefill
        if sequence.blocks:
            hits = self._hits(sequence)
            needed -= hits - self._block_tokens * self._cache.idle_among(sequence.blocks[: hits // self._block_tokens])
        # Where nobody runs there is nothing to wait for.
        return self.kv_used + needed <= (self._room if self.running else self.shape.kv_tokens)

    def take(self, sequence: Sequence) -> None:  # type: ignore[override]
        self.prompt_tokens += sequence.to_prefill
        woken = 0
        if sequence.blocks:
            sequence.computed = self._hits(sequence)
            sequence.shared = list(sequence.blocks[: sequence.computed // self._block_tokens])
            woken = self._cache.take(sequence.shared)
            self.hit_tokens += sequence.computed
        sequence.private = sequence.to_prefill
        self._use(sequence.private + self._block_tokens * woken)

    def give(self, sequence: Sequence) -> None:  # type: ignore[override]
        if sequence.ends:
            grown = self.steps - sequence.begins
            sequence.private += grown
            sequence.made += grown
            sequence.ends = 0
        freed = self._cache.release(sequence.shared) if sequence.shared else 0
        sequence.shared = []
        self.kv_used -= sequence.private + self._block_tokens * freed
        sequence.private = 0
        sequence.turn += 1
        self._evict()

    def _hits(self, sequence: Sequence) -> int:
        # The last token is always computed: its logits are the first answer token's.
        blocks = sequence.blocks[: (sequence.prompt - 1) // self._block_tokens]
        return self._block_tokens * self._cache.match(blocks)

    def kv_events(self) -> KvChange | None:
        """In the trace's blocks, which are its front-ends' too."""
        changed, self._cache.changed = self._cache.changed, {}
        if not changed:
            return None
        parts = self._block_tokens // BLOCK_NAMED
        found: dict[bool, list[int]] = {True: [], False: []}
        for block, there in changed.items():
            found[there] += [block] if parts == 1 else (block * parts + part for part in range(parts))
        return KvChange(found[True], found[False])

    def holds(self, blocks: Many[int]) -> int:
        """How many tokens of a prompt of these blocks need not be computed."""
        return self._block_tokens * self._cache.match(blocks)

    def _share(self, sequence: Sequence) -> None:
        """Its prompt is computed: the whole blocks of it can be used by others."""
        for block in sequence.blocks[len(sequence.shared) : sequence.prompt // self._block_tokens]:
            if not self._cache.add(block):
                break
            sequence.shared.append(block)
            sequence.private -= self._block_tokens

    def _make_room(self) -> None:
        """Push requests out until each that decodes has room for one more token, the one that came last first."""
        while self.decoding and self.kv_used + self.decoding > self.shape.kv_tokens and len(self.running) > 1:
            self.preempt(self.running[-1], hold=False)
            self.preempted += 1

    def _use(self, tokens: int) -> None:
        self.kv_used += tokens
        if self.kv_used > self.kv_peak:
            self.kv_peak = self.kv_used
        self._evict()

    def _evict(self) -> None:
        idle = self._cache.idle
        if idle:
            excess = self.kv_used + self._block_tokens * len(idle) - self.shape.kv_tokens
            if excess > 0:
                self._cache.evict(-(-excess // self._block_tokens))
