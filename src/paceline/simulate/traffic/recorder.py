"""What is kept of a run while it runs."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.core.load import REQUEST_TOKENS
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.sequence import Sequence


class Recorder:
    """Times and sums. `window`: from when to when output tokens count for the throughput. `delay_s`: to a client."""

    def __init__(self, window: tuple[float, float], delay_s: float) -> None:
        self.window = window
        self.delay_s = delay_s
        self.window_tokens = 0.0
        self.step_s = 0.0
        self.lost_s = 0.0
        self.steps = 0
        self.ended = 0
        self.end = 0.0
        self.samples: list[tuple[float, float, float]] = []
        """(when, the most work of a rank, the mean), in prompt tokens, where there was any."""

    def tokens(self, begin: float, step_s: float, steps: int, a_step: int) -> None:
        """`steps` steps of `step_s` from `begin` on have made `a_step` tokens each."""
        self.steps += steps
        first, last = self.window
        if not a_step or begin + step_s * steps <= first or begin >= last:
            return
        # A step's tokens are there at its end.
        inside = _within(begin, step_s, steps, last) - _within(begin, step_s, steps, first)
        self.window_tokens += a_step * inside

    def barrier(self, ranks_s: float, lost_s: float) -> None:
        """Ranks in lockstep have spent so many seconds in steps, together, and lost so many of them waiting."""
        self.step_s += ranks_s
        self.lost_s += lost_s

    def first(self, sequences: Iterable[Sequence], now: float) -> None:
        """These have got a token after their prompt."""
        for sequence in sequences:
            if sequence.first < 0.0:
                sequence.first = now + self.delay_s

    def last(self, sequences: Iterable[Sequence], now: float) -> None:
        """These have ended."""
        for sequence in sequences:
            sequence.last = now + self.delay_s
            self.ended += 1
        self.end = max(self.end, now + self.delay_s)

    def balance(self, ranks: Iterable[SimulatedRank], now: float) -> None:
        """Look at how level the ranks are: the work queued at each, where there is any."""
        work = [
            rank.counts.to_prefill
            + REQUEST_TOKENS * (rank.counts.waiting + rank.counts.running + len(rank.inbox))
            + sum(sequence.prompt for sequence in rank.inbox)
            for rank in ranks
        ]
        total = sum(work)
        if total:
            self.samples.append((now, max(work), total / len(work)))


def _within(begin: float, step_s: float, steps: int, until: float) -> int:
    """How many of the steps have ended by `until`."""
    if step_s <= 0.0:
        return steps if begin <= until else 0
    return min(steps, max(0, int((until - begin) / step_s + 1e-9)))
