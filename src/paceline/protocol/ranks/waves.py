"""Where one rank is in the waves: its wave, whether it runs, how far into the wave, and what it is awaited for next."""

from __future__ import annotations

from paceline.protocol.plausible import plausible


class RankWaves:
    """The waves of one life of a rank. `sync_interval`: steps between two agreements of all ranks."""

    def __init__(self, sync_interval: int) -> None:
        self.wave = 0
        self.running = False
        self.steps = 0
        self.wanted = -1
        self._sync_interval = sync_interval

    def reach(self, wave: int) -> None:
        """The others are in this wave, or it is the one that they run next."""
        if plausible(wave, self.wave):
            self.wave = max(self.wave, wave)

    def start(self, wave: int) -> None:
        """Run in this wave."""
        self.wave = wave
        self.running = True
        self.recount()

    def recount(self) -> None:
        """Count the steps anew, as all others do now."""
        self.steps = 0

    def wake(self, wave: int) -> None:
        """All are to run in this wave."""
        if not plausible(wave, self.wave):
            return
        if self.running:
            # The group is a wave ahead: this rank has not yet come to the end that they agreed on.
            self.wanted = max(self.wanted, wave)
        else:
            self.start(wave)

    def stepped(self, brought_forward: bool) -> bool:
        """A step is done; returns whether all ranks agree now: after the first, and every so many, or sooner."""
        due = brought_forward or self.steps % self._sync_interval == 0
        self.steps += 1
        return due

    def complete(self) -> int:
        """Pause, as all have agreed; returns the wave that is finished."""
        finished = self.wave
        self.wave += 1
        self.running = False
        return finished

    @property
    def overdue(self) -> int | None:
        """The wave that the others run in already, or None where they wait like this rank."""
        return self.wanted if self.wanted >= self.wave else None
