"""A trace of real requests on a simulated deployment, without a fault: how fast it would be served.

The processes are those of the fault simulator, with engines that have memory and take many steps at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from msgspec import Struct

from paceline.core.blocks import BLOCK_TOKENS
from paceline.core.load import REQUEST_TOKENS
from paceline.core.rank.events import Stepped
from paceline.core.rank.prefill_quota import AUTO, OFF
from paceline.core.requests import AddRequest, SamplingParams
from paceline.core.routing import POLICIES
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy
from paceline.errors import ConfigError
from paceline.sim.answers import Answers
from paceline.sim.collectives import ANY_NUMBER, ROUNDING, Span
from paceline.sim.deployment import Deployment, Shape
from paceline.sim.engine import BLOCK_TOKENS as TRACE_BLOCK_TOKENS, EngineShape, MemoryEngine, Sequence
from paceline.sim.outcome import Outcome, summed_up
from paceline.sim.processes import Engine, FrontendProcess, RankProcess, Watch
from paceline.sim.trace import Arrival, Sessions
from paceline.sim.world import Delays, Seeds

SAMPLES = 2000
"""How often a run is looked at for how level its ranks are, and for the progress bar."""
LEAST_SAMPLE_S = 0.1
SESSION_SAMPLE_S = 5.0
LONGEST_S = 1e12
SYNC_INTERVAL = 16
"""Steps between two agreements of lockstep ranks."""
QUIET_S = 1.0
"""From when all know each other to the first request."""


class Setup(Struct, frozen=True):
    """What serves. `routing`: a name; `policy`: the class where it is one of somebody else's.

    `quota`: whether lockstep ranks have the common prefill quota. `bind`: whether requests wait in the coordinator's
    queue ("late"; sticky and least-load alone) or are bound when they arrive ("arrival"). `delay_s`: how long a message
    is on its way. `interval_s`: least time between two load views. `seed`: which front-end a request comes to.
    `warm_up`: the share of the arrivals' time that counts for no figure of time and no sustained throughput.
    """

    ranks: int = 8
    frontends: int = 1
    lockstep: bool = False
    routing: str = "sticky"
    policy: type[Policy] | None = None
    engine: EngineShape = EngineShape()
    delay_s: float = 0.0002
    interval_s: float = 0.1
    seed: int = 0
    warm_up: float = 0.0
    quota: bool = True
    bind: str = "late"


class Recorder(Watch):
    """Sums up the ranks' steps. `window`: from when to when output tokens count for the sustained throughput."""

    def __init__(self) -> None:
        self.window = (0.0, 0.0)
        self.window_tokens = 0.0
        self.step_s = self.lost_s = 0.0
        self.steps = 0
        self.samples: list[tuple[float, float, float]] = []
        """(when, the most work of a rank, the mean), in prompt tokens, where there was any."""

    def stepped(self, rank: RankProcess, span: Span, done: Stepped) -> None:
        """A step's tokens are there at its end; in lockstep, a rank that needs less time than the slowest loses it."""
        if not rank.lockstep or not rank.machine.rank:
            self.steps += span.steps
        if rank.lockstep:
            self.step_s += span.step_s * span.steps
            self.lost_s += (span.step_s - rank.planned.step_s) * span.steps
        (first, last), end = self.window, span.begin + span.step_s * span.steps
        if done.decoded_tokens and end > first and span.begin < last:
            inside = _ended(span, last) - _ended(span, first)
            self.window_tokens += done.decoded_tokens * inside

    def balance(self, ranks: list[MemoryEngine], now: float) -> None:
        """Look at how level the ranks are: the work queued at each, where there is any."""
        work = [rank.to_prefill + REQUEST_TOKENS * (len(rank.waiting) + len(rank.running)) for rank in ranks]
        if any(work):
            self.samples.append((now, max(work), sum(work) / len(work)))


def _ended(span: Span, until: float) -> int:
    if span.step_s <= 0.0:
        return span.steps if span.begin <= until else 0
    return min(span.steps, max(0, int((until - span.begin) / span.step_s + ROUNDING)))


class Replay(Deployment):
    """One run. Requests are numbered from 1, as they come. Raises ConfigError where none can be served."""

    def __init__(self, setup: Setup, arrivals: list[Arrival] | Sessions, recorder: Recorder | None = None) -> None:
        self.setup = setup
        self.recorder = recorder or Recorder()
        self.sessions = None if isinstance(arrivals, list) else arrivals
        self.arrivals: list[Arrival] = []
        self.sequences: list[Sequence] = []
        self._chance, self._places, self._session_places = Random(setup.seed), list[int](), list[int]()
        self.count, self.refused, longest = self._take(arrivals)
        self.engines: list[MemoryEngine] = []
        self.begin_s = 0.0
        self._kind = setup.policy or POLICIES.get(setup.routing, LeastLoad)
        # Whether the policy looks at what the prompts are, not only at how long.
        self._contents = setup.policy is not None
        # Clients allow as much as the longest answer has; how long theirs will be they do not know.
        self.params = SamplingParams(1 << (longest - 1).bit_length())
        self._arrived = 0
        self.look: Callable[[Replay], None] = lambda _: None
        """Called at each sample."""
        links = Delays(setup.delay_s, 0.0, 0.0, 0.0)
        quota = setup.lockstep and setup.quota
        shape = Shape(
            setup.ranks, setup.frontends, setup.lockstep, grouped=False, prefill_quota=AUTO if quota else OFF,
            sync_interval=1 if quota else SYNC_INTERVAL, interval_s=setup.interval_s, links=links,
            connecting=links, encode=False, late_binding=setup.bind != "arrival" and issubclass(self._kind, LeastLoad),
            watched=False,
        )  # fmt: skip
        super().__init__(shape, Seeds(setup.seed), self.recorder)

    def run(self, progress: Callable[[int, int], None] = lambda *_: None) -> Outcome:
        """Serve all arrivals (in order of time). `progress`: told of how many requests have ended, and of how many."""
        begin, world = time.perf_counter(), self.world
        self.start().ready()
        world.run_for(QUIET_S)
        self.begin_s = world.now
        self._sample_s, self._progress = SESSION_SAMPLE_S, progress
        if self.sessions is None:
            first, last = (self.begin_s + one.at for one in (self.arrivals[0], self.arrivals[-1]))
            self.recorder.window = (first + self.setup.warm_up * (last - first), last)
            self._sample_s = max(LEAST_SAMPLE_S, (last - first) / SAMPLES)
            world.at(first, self._arrive)
        else:
            first = self.begin_s
            self.recorder.window = (first, LONGEST_S)
            for answers in self.answers():
                answers.on_end = self._turn_ended
            self._session_begins(self.sessions.begin(), 0)
        world.at(first + self._sample_s, self._sample)
        world.run_until(self.served, float("inf"), "that all are served")
        return summed_up(self, time.perf_counter() - begin)

    def answers(self) -> list[Answers]:
        return [frontend.answers for frontend in self.frontends.values()]

    def served(self) -> bool:
        return self._arrived == self.count and not any(answers.open for answers in self.answers())

    def engine(self) -> Engine:
        # With a quota ranks learn from each agreement, and many steps at once are one step to them.
        most = SYNC_INTERVAL if self.shape.prefill_quota != OFF else ANY_NUMBER - 1
        self.engines.append(MemoryEngine(self.setup.engine, self.sequence, most))
        return self.engines[-1]

    def sequence(self, request: AddRequest) -> Sequence:
        """The request of the trace that one on the wire is."""
        return self.sequences[request.request - 1]

    def policy(self, index: int) -> Policy:
        return self._kind(index, self.setup.frontends)

    def submit(self, frontend: FrontendProcess, sequence: Sequence) -> None:
        block_tokens = self.setup.engine.block_tokens
        prompt = prompt_of(sequence, self._contents, block_tokens)
        blocks = names_of(sequence, block_tokens) if self._kind.names else None
        frontend.ask(sequence.number, prompt, self.params, blocks=blocks)

    def _take(self, load: list[Arrival] | Sessions) -> tuple[int, int, int]:
        """How many requests there are, how many are left out, and how long the longest answer is."""
        if not isinstance(load, list):
            return load.turns, 0, load.longest_answer
        kv_tokens = self.setup.engine.kv_tokens
        for one in load:
            if one.prompt_tokens + one.answer_tokens <= kv_tokens:
                self._add(one)
        if not self.arrivals:
            raise ConfigError(f"--kv-tokens: no request of the trace fits into {kv_tokens}")
        left_out = len(load) - len(self.arrivals)
        return len(self.arrivals), left_out, max(one.answer_tokens for one in self.arrivals)

    def _add(self, one: Arrival) -> None:
        self.arrivals.append(one)
        self.sequences.append(
            Sequence(len(self.arrivals), one.prompt_tokens, one.answer_tokens, one.blocks, one.session)
        )
        self._places.append(self._chance.randrange(self.setup.frontends))

    def _arrive(self) -> None:
        place = self._arrived
        self._arrived += 1
        if self.sessions is None and self._arrived < self.count:
            self.world.at(self.begin_s + self.arrivals[self._arrived].at, self._arrive)
        self.submit(self.frontends[self._places[place]], self.sequences[place])

    def _session_begins(self, begins: Iterator[float], place: int) -> None:
        at = next(begins, None)
        if at is not None and self._arrived < self.count:
            self.world.at(self.begin_s + at, partial(self._turn, place))
            self.world.at(self.begin_s + at, partial(self._session_begins, begins, place + 1))

    def _turn(self, place: int) -> None:
        """The next turn comes at a session's place, when its time has come."""
        assert self.sessions is not None
        arrival = self.sessions.next(place)
        if arrival is not None:
            self.world.after(arrival.at, partial(self._turn_comes, place, arrival))

    def _turn_comes(self, place: int, arrival: Arrival) -> None:
        if self._arrived == self.count:
            return
        self._session_places.append(place)
        self._add(arrival)
        self._arrive()
        if self._arrived == self.count:
            self.recorder.window = (self.recorder.window[0], self.world.now)

    def _turn_ended(self, number: int) -> None:
        self._turn(self._session_places[number - 1])

    def _sample(self) -> None:
        if self._arrived < self.count:
            self.recorder.balance(self.engines, self.world.now - self.begin_s)
        self.look(self)
        self._progress(self._arrived - sum(answers.open for answers in self.answers()), self.count)
        self.world.after(self._sample_s, self._sample)


def names_of(sequence: Sequence, block_tokens: int) -> tuple[int, ...]:
    """What front-ends call the blocks of its prompt, which they count in other ones than the trace does."""
    parts = block_tokens // BLOCK_TOKENS
    whole = sequence.blocks[: sequence.prompt // block_tokens]
    return tuple(whole) if parts == 1 else tuple(block * parts + part for block in whole for part in range(parts))


def prompt_of(sequence: Sequence, contents: bool, block_tokens: int = TRACE_BLOCK_TOKENS) -> list[int]:
    """Its tokens; equal ones for equal blocks of the trace. Without `contents` only their number is right."""
    if not contents:
        # As good as a list of so many tokens to a reader that only counts them, and made at once.
        return range(sequence.prompt)  # type: ignore[return-value]
    blocks = sequence.blocks or (-sequence.number,)
    tokens = [block for block in blocks for _ in range(block_tokens)]
    return (tokens + [blocks[-1]] * max(0, sequence.prompt - len(tokens)))[: sequence.prompt]
