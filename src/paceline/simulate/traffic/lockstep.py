"""Ranks that step together, each step as long as the slowest of them takes; idle ones step along while the wave runs.

A rank that only decodes is left alone until something changes in it: it is told of the steps that it has made when
that is so. Where all ranks only decode, the steps until the first change are one.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

import numpy as np

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.independent import ROUNDING
from paceline.simulate.traffic.plane import ControlPlane
from paceline.simulate.traffic.prefill_quota import PrefillQuota
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.recorder import Recorder
from paceline.simulate.traffic.sequence import Sequence

SYNC_INTERVAL = 16
"""Steps between two agreements whether any rank has work."""

NEVER = -1


class LockstepFleet:
    """All ranks, in one group. `wake_s`: from a request's arrival at a paused rank to the first step of all."""

    def __init__(
        self, clock: Clock, count: int, shape: EngineShape, plane: ControlPlane, recorder: Recorder, wake_s: float,
        quota: PrefillQuota,
    ) -> None:  # fmt: skip
        self.ranks = [SimulatedRank(number, shape) for number in range(count)]
        self.running = False
        self._clock, self._plane, self._recorder = clock, plane, recorder
        self._wake_s = wake_s
        self._quota = quota
        costs = shape.costs
        self._step_s = costs.step_ms / 1e3
        self._prefill_s = costs.prefill_ms / 1e3
        self._decode_s = costs.decode_ms / 1e3
        # Steps of the group so far; those under way, as in `independent.py`; whether all of them are steady.
        self._made = 0
        self._in_wave = 0
        self._begin = self._length_s = self._lost_s = 0.0
        self._steps = 0
        self._steady = False
        self._arranged = 0
        self._waking = False
        self._arrived: set[int] = set()
        # Per rank: the group's step up to which its engine has been told, and the one at which it changes by itself.
        self._told = [0] * count
        self._due = [NEVER] * count
        self._dues: list[tuple[int, int]] = []
        self._busy: set[int] = set()
        """Ranks that each step computes one by one: they have prompts to compute."""
        self._work_s = np.zeros(count)
        self._decoding = np.zeros(count, dtype=np.int64)

    def deliver(self, rank: int, sequence: Sequence) -> None:
        """A request arrives at a rank now."""
        sequence.rank = rank
        self.ranks[rank].inbox.append(sequence)
        self._arrived.add(rank)
        if not self.running:
            if not self._waking:
                self._waking = True
                self._plane.woken(self.ranks[rank])
                self._clock.at(self._clock.now + self._wake_s, self._wake)
        elif self._steady:
            self._cut()

    def grown(self, rank: SimulatedRank, when: float) -> int:
        """KV memory used since `counts`."""
        if rank.number in self._busy or not self.running:
            return 0
        return rank.counts.decoding * (self._made - self._told[rank.number] + self._done(when))

    def steps_done(self, rank: SimulatedRank, when: float) -> int:
        """How many steps have been made at `when` since the rank's own count was last brought up to date."""
        return self._made - rank.step + self._done(when)

    def step_end(self, rank: SimulatedRank, when: float) -> float | None:
        """When the current step is over, of many."""
        if not self._steps or not self._steady or when < self._begin or not rank.counts.decoding:
            return None
        return self._begin + self._length_s * min(self._steps, self._done(when) + 1)

    def nudge(self) -> None:
        """There is something to pull."""
        if self._steady and self.running:
            self._cut()
        elif not self.running and not self._waking:
            self._waking = True
            self._clock.at(self._clock.now + self._wake_s, self._wake)

    def wake(self) -> None:
        """All run now, if they do not yet and are not about to."""
        if not self.running and not self._waking:
            self._wake(None)

    def next_turn(self, rank: SimulatedRank) -> float:
        """When the ranks are between two steps next."""
        if not self.running:
            return self._clock.now + self._wake_s
        steps = min(self._steps, self._done(self._clock.now) + 1) if self._steady else self._steps
        return self._begin + self._length_s * steps

    # The group's steps --------------------------------------------------------------------------

    def _wake(self, _: None) -> None:
        self._waking = False
        self.running = True
        self._in_wave = 0
        self._quota.begin()
        self._turn(set())

    def _done(self, when: float) -> int:
        if not self._steps or when < self._begin:
            return 0
        return min(self._steps, math.floor((when - self._begin) / self._length_s + ROUNDING))

    def _cut(self) -> None:
        steps = max(1, min(self._steps, self._done(self._clock.now) + 1))
        if steps < self._steps:
            self._steps = steps
            self._arrange()

    def _arrange(self) -> None:
        self._arranged += 1
        end = self._begin + self._length_s * self._steps
        self._clock.at(max(end, self._clock.now), self._over, self._arranged)

    def _over(self, arranged: int) -> None:
        if arranged != self._arranged:
            return
        now, steps = self._clock.now, self._steps
        made_tokens = int(self._decoding.sum())
        self._recorder.tokens(self._begin, self._length_s, steps, made_tokens)
        self._recorder.barrier(self._length_s * len(self.ranks) * steps, self._lost_s * steps)
        self._made += steps
        regular = (self._in_wave + steps - 1) // SYNC_INTERVAL > (self._in_wave - 1) // SYNC_INTERVAL
        self._in_wave += steps
        self._steps = 0
        changed = set(self._busy)
        for number in self._busy:
            begun, done = self.ranks[number].engine.end()
            self._told[number] = self._made
            self._recorder.first(begun, now)
            self._end(number, done)
        while self._dues and self._dues[0][0] <= self._made:
            due, number = heappop(self._dues)
            if self._due[number] == due:
                self._catch_up(number)
                changed.add(number)
        self._quota.agree(self.ranks, self._busy, regular)
        self._turn(changed)

    def _catch_up(self, number: int) -> None:
        """Tell a rank that only decoded of the steps that it has made."""
        steps = self._made - self._told[number]
        self._told[number] = self._made
        self._due[number] = NEVER
        engine = self.ranks[number].engine
        if steps and engine.decoding:
            self._end(number, engine.advance(steps))

    def _end(self, number: int, done: list[Sequence]) -> None:
        if done:
            self._recorder.last(done, self._clock.now)
            self._plane.ended(self.ranks[number], done)

    def _turn(self, changed: set[int]) -> None:
        """All ranks are between two steps; `changed`: those that something has changed in."""
        for number in sorted(self._arrived):
            self._take_in(number)
        changed |= self._arrived
        self._arrived.clear()
        for number in self._plane.pull(self.ranks):
            if number not in self._busy:
                self._catch_up(number)
            changed.add(number)
        for number in sorted(changed):
            rank = self.ranks[number]
            rank.step = self._made
            rank.counts = rank.engine.counts()
        self._plane.all_between_steps(
            [self.ranks[number] for number in sorted(changed)],
            (rank for rank in self.ranks if rank.counts.decoding and rank.number not in changed),
        )
        for number in changed:
            self._sort(number)
        self._begin_steps()

    def _take_in(self, number: int) -> None:
        if number not in self._busy:
            self._catch_up(number)
        self.ranks[number].take_in()

    def _sort(self, number: int) -> None:
        """Is it to be computed step by step, or left alone until it changes by itself?"""
        engine = self.ranks[number].engine
        steady = engine.steady()
        self._told[number] = self._made
        if steady:
            self._busy.discard(number)
            self._due[number] = self._made + steady
            heappush(self._dues, (self._made + steady, number))
        else:
            self._due[number] = NEVER
            if engine.has_work():
                self._busy.add(number)
            else:
                self._busy.discard(number)
        self._decoding[number] = engine.decoding
        self._work_s[number] = self._decode_s * engine.decoding

    def _begin_steps(self) -> None:
        quota = self._quota.tokens(self.ranks, self._busy)
        for number in self._busy:
            engine = self.ranks[number].engine
            engine.begin(quota)
            self._decoding[number] = engine.decoded
            self._work_s[number] = self._prefill_s * engine.prefilled + self._decode_s * engine.decoded
        slowest = float(self._work_s.max())
        self._begin = self._clock.now
        self._length_s = self._step_s + slowest
        self._steady = not self._busy
        self._steps = 1
        if self._steady:
            while self._dues and self._due[self._dues[0][1]] != self._dues[0][0]:
                heappop(self._dues)
            if self._dues:
                self._steps = self._dues[0][0] - self._made
            elif self._pause():
                return
        self._lost_s = slowest * len(self.ranks) - float(self._work_s.sum())
        self._arrange()

    def _pause(self) -> bool:
        """Nobody has work: all pause at the next agreement. Returns whether that is now."""
        # They agree after the first step of a wave, and then every so many steps.
        until = (1 - self._in_wave) % SYNC_INTERVAL
        if until:
            self._steps = until
            return False
        self.running = False
        self._steps = 0
        self._plane.paused()
        return True
