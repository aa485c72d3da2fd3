"""vLLM's ranks and front-ends, as the coordinator's machine sees them: what they say, and all that they do not.

There is one coordinator, `core/coordinator/machine.py`, and this is its interpreter: vLLM's values go in as events of
that machine, its effects come out as vLLM's values. What is decided here is only what a vLLM rank's words mean.

**Hellos.** A vLLM rank never introduces itself, and when it dies, vLLM ends. So all ranks of the deployment are
introduced at the start, with one life that never ends, and nobody is asked anything. Scaling makes a new machine of
the new size, which is told again what every rank said last.

**Who runs.** The machine believes of a rank what that rank said last; of a vLLM rank it is read from what it does say:

- A report that counts requests, or a step after the first, is from a rank that runs in the report's wave. (One of a
  paused rank with requests is not; then nobody can be woken, a wake is ignored, and all start together on resume.)
- A report of no requests at step 0 may be from before, within or after a wave: what was known stays known.
- `start_wave` says that its rank runs. `wave_complete` comes from rank 0, after an all-reduce in which all ranks agreed
  to pause at this step, so it is said for all of them; but for a rank that has meanwhile begun the next wave.
- A report of a step at or after `proof_step` proves that all ranks run: they have come through an all-reduce together.

**Wakes are acknowledged** by these signs. Until they come the machine repeats the wake, at most once a second, also to
ranks that run and have nothing to report; to them it means nothing. A rank that got a request whose notice was lost is
running by its own report, so the others are woken: that heals the cold start of headless ranks (vllm #51983, #54762).

**Restarts.** Ranks cannot be asked for the wave, and a paused rank reports nothing. So the watchdog remembers the last
word (`Memory`), and when all ranks listen again they are woken once: that frees a rank which waits alone in its first
collective since a message was lost. If all were paused, they run one wave without work. Where a version's sleeping
ranks could not bear that, only a wave that ran is woken. Counts of ranks that have not reported to this coordinator
are known to front-ends and not to it, so for a second after a restart they are told none.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from paceline.core.coordinator import events as machine_events
from paceline.core.coordinator.events import Note as Note, Tick as Tick
from paceline.core.coordinator.machine import Coordinator
from paceline.core.coordinator.membership import PATIENCE_S
from paceline.core.load import plausible
from paceline.core.messages import FromRank, LoadView, RankReport, StartDPWave, WakeNotice
from paceline.vllm.codec import KV_PARTS, Notice, RankMessage, RankWords, Scale, VllmDialect

# Events ---------------------------------------------------------------------------------------


class RankSaid(Struct, frozen=True):
    message: RankMessage


class RanksReported(Struct, frozen=True):
    """Load reports that came together, and nothing about waves: at most one of each rank."""

    reports: list[RankMessage]


class RankSubscribed(Struct, frozen=True):
    """A rank listens; which one, it does not say."""


class RankUnsubscribed(Struct, frozen=True):
    """A rank's connection has ended."""


class FrontendSaid(Struct, frozen=True):
    message: Notice | Scale


class FrontendSubscribed(Struct, frozen=True):
    """A front-end listens."""


Event = RankSaid | RanksReported | RankSubscribed | RankUnsubscribed | FrontendSaid | FrontendSubscribed | Tick

# Effects --------------------------------------------------------------------------------------


class Greet(Struct, frozen=True):
    """Broadcast READY to ranks."""


class Wake(Struct, frozen=True):
    """Broadcast START_DP_WAVE to ranks."""

    wave: int
    exclude: bytes | int | None


class View(Struct, frozen=True):
    """Broadcast to front-ends; `counts` by rank, or None where none are said."""

    counts: list[list[int | float]] | None
    wave: int
    running: bool


class Memory(Struct, frozen=True):
    """What the ranks cannot be asked for again: kept outside, for the coordinator that takes this one's place.

    `size`: ranks, scaling included. `wave`, `running`: as last published. `greeted`: READY has been said.
    """

    size: int
    wave: int = 0
    running: bool = False
    greeted: bool = False


class Remember(Struct, frozen=True):
    """Keep this outside the process, before anything that follows is sent."""

    memory: Memory


Effect = Greet | Wake | View | Remember | Note


class Answers:
    """Whether the last wake has been answered, and since when not. `stall_s`: after so long without an answer the
    ranks are named that `silent(wave)` finds.

    A vLLM rank does not acknowledge a wake. It answers by any sign that it runs in that wave, or a later one, and rank
    0 answers for all when its loop has come through an all-reduce. Which ranks have given no sign is looked up when
    that is wanted: a wake is urgent, and there may be hundreds of ranks.
    """

    def __init__(self, stall_s: float, silent: Callable[[int], list[int]]) -> None:
        self._stall_s = stall_s
        self._silent = silent
        self._since: float | None = None
        self._all_in = -1
        self.wave = -1
        """The wave of the last wake."""
        self.stalled: list[int] = []
        """The ranks that have been named."""

    @property
    def deadline(self) -> float:
        """When somebody may have to be named."""
        return float("inf") if self._since is None or self.stalled else self._since + self._stall_s

    def woken(self, wave: int, now: float) -> None:
        if wave > self._all_in and (wave > self.wave or self._since is None):
            self._since = now
            self.wave = wave

    def all_came(self, wave: int) -> None:
        """All ranks run in this wave, or have finished it."""
        self._all_in = max(self._all_in, wave)

    def awaited(self) -> list[int]:
        """The ranks that have given no sign since the last wake."""
        return [] if self._since is None or self._all_in >= self.wave else self._silent(self.wave)

    def settle(self, now: float) -> bool:
        """Look at the clock. Returns whether other ranks are named now."""
        if self._since is None or (not self.stalled and self._all_in < self.wave and now < self.deadline):
            return False
        awaited = self.awaited()
        if not awaited:
            self._since = None
            named, self.stalled = self.stalled, []
            return bool(named)
        if self.stalled:
            return False
        self.stalled = awaited
        return True

    def describe(self) -> list[str]:
        """A line for the log and `/health`, for each rank that is named."""
        return [f"rank {rank} was woken for wave {self.wave} and has given no sign of it" for rank in self.stalled]


STEP_WAIT_S = 0.001
"""How long a view of lockstep ranks waits for the rest of a step. A vLLM rank reports only when its counts changed."""
COLLECT_S = 0.001
"""How long the reports of ranks that are known to run may wait for more of them."""


class VllmTranslation:
    """One life of a coordinator under vLLM.

    `memory`: what the one before knew, or how many ranks there are. `restarted`: whether there was one. Times in
    seconds. `stall_s`: after so long without an answer to a wake the silent ranks are named.
    """

    def __init__(
        self, memory: Memory, dialect: VllmDialect, *, identity: int, interval_s: float, lockstep: bool,
        publish_loads: bool = True, restarted: bool = False, stall_s: float = 30.0,
    ) -> None:  # fmt: skip
        self._memory = memory if dialect.greeting != "none" else Memory(memory.size, memory.wave, memory.running, True)
        self._dialect = dialect
        self._identity = identity
        self._interval_s = interval_s
        self._lockstep = lockstep
        self._publish_loads = publish_loads
        # After a restart ranks are woken once, when all listen.
        self._owes_wake = restarted and lockstep and (dialect.wake_is_safe or memory.running)
        self._subscribed = 0
        self._words = RankWords(memory.size, lockstep=lockstep, proof_step=dialect.proof_step)
        # None where every rank's counts may be told, reported or not; else until when not.
        self._unheard_until: float | None = float("inf") if restarted else None
        self._answers = Answers(stall_s if dialect.says_started else float("inf"), self._words.silent)
        self._published_at = float("-inf")
        self._dropped = 0
        self._void = 0
        self._coordinator = self._new_machine()
        self._introduced = False

    @property
    def deadline(self) -> float:
        """When the next Tick is due, at the latest."""
        if not self._introduced:
            return float("-inf")
        return min(self._coordinator.deadline, self._answers.deadline)

    def ranks_may_wait_until(self, read_at: float) -> float:
        """Until when ranks need not be read again that were read at this time, so that many reports cost one turn.

        Independent ranks report loads alone, which are published at the interval. Lockstep ranks may say that the
        others must be woken, unless it is known that all run.
        """
        if not self._lockstep:
            return min(self._published_at, read_at) + self._interval_s
        known = self._memory.running and self._words.proved == self._memory.wave
        return read_at + COLLECT_S if known else read_at

    def wake_at_once(self, notice: Notice) -> Wake | None:
        """The wake that `handle` will answer this notice with, where that is certain: it may be sent before.

        Everybody waits for a wave's first wake, so it should not wait for what else is to be done about it.
        """
        memory = self._memory
        if not self._lockstep or not memory.greeted or memory.running or self._answers.wave >= memory.wave:
            return None
        known = notice.rank is not None and notice.rank < memory.size
        return Wake(memory.wave, notice.exclude if known and notice.wave >= memory.wave else None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to send, in order."""
        effects: list[Effect] = []
        if not self._introduced:
            self._introduce(now, effects)
        match event:
            case RankSaid(message):
                self._on_rank(message, now, effects)
            case RanksReported(messages):
                self._on_reports(messages, now, effects)
            case RankSubscribed():
                self._on_subscribed(now, effects)
            case RankUnsubscribed():
                self._subscribed = max(0, self._subscribed - 1)
            case FrontendSaid(Notice() as notice):
                self._on_notice(notice, now, effects)
            case FrontendSaid(Scale(size)):
                self._on_scale(size, now, effects)
            case FrontendSubscribed():
                self._tell(machine_events.FrontendSubscribed(), now, effects)
            case Tick():
                self._tell(event, now, effects)
        if self._answers.settle(now):
            lines = self._answers.describe() or ["no rank is waited for any more"]
            effects += [Note(line, urgent=True) for line in lines]
        return effects

    def statistics(self) -> dict[str, object]:
        known = self._coordinator.statistics()
        stalls, all_listen = self._answers.describe(), self._subscribed >= self._memory.size
        return {
            "status": "stalled" if stalls else "ready" if all_listen else "waiting",
            "ranks": self._memory.size,
            "listening": self._subscribed,
            "lockstep": self._lockstep,
            "wave": known["wave"],
            "running": known["running"],
            "unanswered": self._answers.awaited(),
            "stalls": stalls,
            "views_published": known["views_published"],
            "void_messages": self._dropped + self._void,
        }

    def loads(self) -> list[dict[str, object]]:
        """Every rank's last report to this coordinator, as `paceline loads` shows it."""
        return self._words.loads()

    # Ranks ------------------------------------------------------------------------------------

    def _new_machine(self) -> Coordinator:
        return Coordinator(
            self._memory.size, self._identity, self._interval_s, lockstep=self._lockstep,
            publish_loads=self._publish_loads, step_wait_s=STEP_WAIT_S,
        )  # fmt: skip

    def _introduce(self, now: float, effects: list[Effect]) -> None:
        self._introduced = True
        if self._unheard_until is not None:
            self._unheard_until = now + PATIENCE_S
        for word in self._words.hellos(self._memory.wave):
            # Nothing that this brings is worth sending: one view follows, when all are in.
            self._coordinator.handle(machine_events.RankSaid(word), now)
        self._tell(machine_events.FrontendSubscribed(), now, effects)

    def _on_rank(self, message: RankMessage, now: float, effects: list[Effect]) -> None:
        rank = message.engine_index
        if not all(plausible(wave or 0, self._memory.wave) for wave in (message.wave_complete, message.start_wave)):
            self._dropped += 1
            return
        if message.scheduler_stats is not None or rank >= self._memory.size:
            self._on_reports([message], now, effects)
        if not self._lockstep or rank >= self._memory.size:
            return
        if message.wave_complete is not None:
            self._hear(self._words.complete(message.wave_complete), now, effects)
            self._answers.all_came(message.wave_complete)
        elif message.start_wave is not None:
            wave = message.start_wave
            self._hear([self._words.start(rank, wave)], now, effects)
            if rank == 0 and self._dialect.says_started:
                self._answers.all_came(wave)

    def _on_reports(self, messages: list[RankMessage], now: float, effects: list[Effect]) -> None:
        reports: list[RankReport] = []
        proved = -1
        for message in messages:
            stats = message.scheduler_stats
            known = stats is not None and plausible(stats.current_wave, self._memory.wave)
            if stats is None or not known or message.engine_index >= self._memory.size:
                self._dropped += 1
                continue
            reports.append(self._words.report(message.engine_index, stats))
            if self._words.proves(stats):
                proved = max(proved, stats.current_wave)
        self._tell(machine_events.RanksReported(reports), now, effects)
        if proved >= 0:
            self._hear(self._words.prove(proved), now, effects)
            self._answers.all_came(proved)

    def _on_subscribed(self, now: float, effects: list[Effect]) -> None:
        self._subscribed += 1
        all_listen = self._subscribed >= self._memory.size
        if self._memory.greeted:
            if self._dialect.greeting == "each":
                effects.append(Greet())
        elif all_listen:
            memory = self._memory
            self._remember(Memory(memory.size, memory.wave, memory.running, True), effects)
            effects.append(Greet())
            effects.append(Note(f"all {memory.size} ranks listen"))
        if all_listen and self._owes_wake:
            self._owes_wake = False
            nobody = self._memory.size
            notice = WakeNotice(0, nobody, self._memory.wave)
            self._tell(machine_events.FrontendSaid(notice), now, effects)

    # Front-ends -------------------------------------------------------------------------------

    def _on_notice(self, notice: Notice, now: float, effects: list[Effect]) -> None:
        rank = self._memory.size if notice.rank is None else notice.rank
        told = machine_events.FrontendSaid(WakeNotice(0, rank, notice.wave))
        # A wake that leaves somebody out is sent at once or not at all, so it is this notice's.
        self._tell(told, now, effects, notice.exclude)

    def _on_scale(self, size: int, now: float, effects: list[Effect]) -> None:
        before, memory = self._memory.size, self._memory
        self._remember(Memory(size, memory.wave, memory.running, memory.greeted), effects)
        self._words.resize(size)
        self._unheard_until = None
        self._void += int(str(self._coordinator.statistics()["void_messages"]))
        self._coordinator = self._new_machine()
        effects.append(Note(f"scaled from {before} to {size} ranks"))
        self._introduce(now, effects)

    # Effects ----------------------------------------------------------------------------------

    def _hear(self, words: list[FromRank], now: float, effects: list[Effect]) -> None:
        for word in words:
            self._tell(machine_events.RankSaid(word), now, effects)

    def _tell(
        self, event: machine_events.Event, now: float, effects: list[Effect], exclude: bytes | int | None = None
    ) -> None:
        """The machine's effects of this event, translated. `exclude`: what a rank left out is called, if not so."""
        memory = self._memory
        for effect in self._coordinator.handle(event, now):
            match effect:
                # A rank that has not been greeted takes a wake for its greeting.
                case machine_events.ToRanks(StartDPWave(wave, left_out)) if self._memory.greeted:
                    if left_out is not None and left_out >= self._memory.size:
                        left_out = None
                    self._answers.woken(wave, now)
                    effects.append(Wake(wave, left_out if left_out is None or exclude is None else exclude))
                case machine_events.ToFrontends(LoadView() as view):
                    self._published_at = now
                    self._remember(Memory(memory.size, view.wave, view.running, memory.greeted), effects)
                    effects.append(View(self._counts(view, now), view.wave, view.running))

    def _remember(self, memory: Memory, effects: list[Effect]) -> None:
        if memory != self._memory:
            self._memory = memory
            effects.insert(0, Remember(memory))

    def _counts(self, view: LoadView, now: float) -> list[list[int | float]] | None:
        if view.ranks is None:
            return None
        if self._unheard_until is not None:
            if len(view.ranks) < self._memory.size and now < self._unheard_until:
                return None
            self._unheard_until = None
        if self._dialect.count_fields == 2:
            counts: list[list[int | float]] = [[0, 0]] * self._memory.size
            for entry in view.ranks:
                counts[entry.rank] = [entry.load.waiting, entry.load.running]
            return counts
        counts = [[0, 0, 0.0]] * self._memory.size
        for entry in view.ranks:
            load = entry.load
            counts[entry.rank] = [load.waiting, load.running, load.kv_used / KV_PARTS]
        return counts
