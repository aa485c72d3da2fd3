"""The coordinator's part in waves: what ranks said of themselves, and the wake that is not answered yet.

Lockstep ranks run and rest together. A rank that takes a request while paused starts to run, and blocks in its first
collective until all the others run too; so somebody must wake them, and a wake that is lost stops the deployment. The
reference sends the wake once and then calls the ranks running. Here these rules stand instead:

- What is believed of a rank is what that rank said last, never what was sent to it.
- A wake is owed as long as some rank runs in the current wave (or a front-end says that it has sent a request) and
  another ready rank has not said that it runs in that wave or has finished it. It is repeated until no rank owes an
  answer. A rank that gets it twice changes nothing.
- A rank that is paused a wave behind the others, while all rest, is told theirs: they finished one while it joined.

So any sign of work wakes the others, also the plain report of a rank that runs, and a new coordinator that knows
nothing picks up a half-started wave by hearing the ranks once.

`wave` is the wave that runs or, when all are paused, the next one. It never goes down.
"""

from __future__ import annotations

from collections.abc import Set

from msgspec import Struct

from paceline.core.load import plausible
from paceline.core.messages import StartDPWave
from paceline.core.retry import FIRST_S, Retry


class Observed(Struct, frozen=True):
    """What a rank last said: the wave it runs in, or would run next."""

    wave: int
    running: bool


class GroupWave:
    """The wave of all ranks, and the wake in progress. `without`: rules (`rules.py`) left out."""

    def __init__(self, without: Set[str] = frozenset()) -> None:
        self._without = without
        self.wave = 0
        self._observed: dict[int, Observed] = {}
        # Both are derived from `_observed` and kept beside it: reports come by the hundred thousand.
        self._running: set[int] = set()
        self._behind: set[int] = set()
        # Those that run in a wave that the others have finished, and have not said that they have.
        self._stranded: set[int] = set()
        # Those that are paused and do not know that the others have finished a wave.
        self._late: set[int] = set()
        self._prompt_wake = False
        self._noticed_wave = -1
        self._exclude: int | None = None
        self._retry = Retry()

    @property
    def running(self) -> bool:
        """Whether some rank has said that it runs in the current wave."""
        return bool(self._running)

    @property
    def joiners_wave(self) -> int:
        """The wave that a rank which joins is told."""
        return 0 if "joiner-told-the-wave" in self._without else self.wave

    @property
    def wake_due(self) -> float | None:
        """When the wake must be sent (again), or None while no rank owes an answer."""
        return self._retry.due

    def expire(self, now: float) -> None:
        """The wake is due, whatever its time was."""
        self._retry.due = now

    def observe(self, rank: int, wave: int, running: bool, now: float) -> None:
        """A rank said that it runs in `wave`, or that it is paused and `wave` comes next."""
        before = self._observed.get(rank)
        if (before is not None and wave < before.wave) or not plausible(wave, self.wave):
            return
        state = Observed(wave, running)
        if state == before:
            return
        self._observed[rank] = state
        self._advance(wave)
        self._place(rank, state)
        self._settle(now)

    def started(self, rank: int, wave: int, now: float) -> None:
        """A paused rank took a request and runs: the others owe an answer, it does not."""
        if not plausible(wave, self.wave):
            return
        current = wave >= self.wave
        self.observe(rank, wave, True, now)
        if not current and not self.running:
            # It started in a wave that the others have finished (it joined by an old number) and waits for
            # them in its first collective. Its wave catches up with theirs when they come.
            self._noticed_wave = self.wave
            self._settle(now)
        elif current and self._retry.due == now:
            self._exclude = rank

    def noticed(self, rank: int, wave: int, now: float) -> None:
        """A front-end sent a request stamped `wave` to `rank` while it believed the ranks paused."""
        # Only what ranks say moves the wave: a front-end repeats what it heard, or makes it up.
        fresh = wave >= self.wave or "stale-notice-leaves-nobody-out" in self._without
        if not self.running:
            self._noticed_wave = self.wave
        self._settle(now)
        if fresh and self._retry.due == now:
            self._exclude = rank

    def no_notice(self, now: float) -> None:
        """What front-ends noticed counts no more: only ranks that run may wake others."""
        self._noticed_wave = -1
        self._settle(now)

    def forget(self, rank: int, now: float) -> None:
        """The rank is gone: nothing is owed to it or by it."""
        self._observed.pop(rank, None)
        self._running.discard(rank)
        self._behind.discard(rank)
        self._stranded.discard(rank)
        self._late.discard(rank)
        self._settle(now)

    def told(self, wave: int, now: float) -> None:
        """A rank that is not ready knows this wave, from a coordinator before this one."""
        self._advance(wave)
        self._settle(now)

    def lagging(self) -> list[int]:
        """Ranks that have been or will be woken and have not answered."""
        return sorted(self._behind) if self._owed() else []

    def late(self) -> list[int]:
        """Ranks that rest a wave behind the others, which rest as well. Where they do not, the wake tells the wave."""
        if "behind-at-rest-told" in self._without:
            return []
        return [] if self._owed() else sorted(self._late)

    def wake(self, now: float) -> StartDPWave | None:
        """The wake to broadcast now, if one is due; the next repeat is set."""
        if not self._retry.is_due(now):
            return None
        message = StartDPWave(self.wave, self._exclude)
        if "stale-notice-leaves-nobody-out" not in self._without:
            # A repeat leaves nobody out: that the excluded rank has its request was somebody's belief.
            self._exclude = None
        if "acknowledged-wakes" in self._without:
            self._believe_woken()
            return message
        self._retry.said(now)
        return message

    def _owed(self) -> bool:
        return self._prompt() or bool(self._stranded)

    def _believe_woken(self) -> None:
        """Without the rule of acknowledged wakes: who was sent a wake is taken to run."""
        for rank in sorted(self._observed):
            self._observed[rank] = Observed(self.wave, True)
            self._place(rank, self._observed[rank])
        self._retry.stop()

    def _prompt(self) -> bool:
        if "own-report" in self._without:
            return self._noticed_wave == self.wave
        return bool(self._running) or self._noticed_wave == self.wave

    def _advance(self, wave: int) -> None:
        if wave > self.wave and plausible(wave, self.wave):
            self.wave = wave
            self._noticed_wave = -1
            for rank, state in self._observed.items():
                self._place(rank, state)

    def _place(self, rank: int, state: Observed) -> None:
        current = state.running and state.wave == self.wave
        (self._running.add if current else self._running.discard)(rank)
        (self._behind.discard if current else self._behind.add)(rank)
        stranded = state.running and state.wave < self.wave
        (self._stranded.add if stranded else self._stranded.discard)(rank)
        late = not state.running and state.wave < self.wave
        (self._late.add if late else self._late.discard)(rank)

    def _settle(self, now: float) -> None:
        """Set or clear the wake after anything was learned."""
        if self._behind and self._owed():
            # A stranded rank is about to say that it has paused, or waits alone: it is given a moment.
            prompt = self._prompt()
            if self._retry.due is None or (prompt and not self._prompt_wake):
                self._retry.start(now if prompt else now + FIRST_S)
                self._prompt_wake = prompt
            return
        self._retry.stop()
        self._exclude, self._prompt_wake = None, False
        # Where everyone runs, the notice is served: the wave's end must not bring it back.
        if not self._behind or self._noticed_wave < self.wave:
            self._noticed_wave = -1
