"""Ranks that step each at its own pace. Between two things that change what a rank computes, all its steps are one."""

from __future__ import annotations

import math

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.plane import ControlPlane
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.recorder import Recorder
from paceline.simulate.traffic.sequence import Sequence

ROUNDING = 1e-9
"""Share of a step by which a moment may miss the end of one for want of digits."""


class Stepping(SimulatedRank):
    """A rank and the steps that it is in: `steps` of them, each `step_s` long, since `begin`; 0 where it waits.

    `steady`: they only decode. `arranged`: the number of their end, so that an earlier one can be void.
    """

    __slots__ = ("arranged", "begin", "steady", "step_s", "steps")

    def __init__(self, number: int, shape: EngineShape) -> None:
        super().__init__(number, shape)
        self.begin = self.step_s = 0.0
        self.steps = 0
        self.steady = False
        self.arranged = 0


class IndependentFleet:
    """All ranks. They are turned by the clock alone."""

    def __init__(self, clock: Clock, count: int, shape: EngineShape, plane: ControlPlane, recorder: Recorder) -> None:
        self.stepping = [Stepping(number, shape) for number in range(count)]
        self.ranks: list[SimulatedRank] = [*self.stepping]
        self._clock = clock
        self._plane = plane
        self._recorder = recorder
        costs = shape.costs
        self._costs_s = (costs.step_ms / 1e3, costs.prefill_ms / 1e3, costs.decode_ms / 1e3)

    def deliver(self, rank: int, sequence: Sequence) -> None:
        """A request arrives at a rank now."""
        stepping = self.stepping[rank]
        sequence.rank = rank
        stepping.inbox.append(sequence)
        if not stepping.steps:
            self._turn(stepping)
        elif stepping.steady:
            self._cut(stepping)

    def grown(self, rank: SimulatedRank, when: float) -> int:
        """KV memory used since `counts`."""
        stepping = self.stepping[rank.number]
        return stepping.counts.decoding * self._done(stepping, when) if stepping.steady else 0

    def steps_done(self, rank: SimulatedRank, when: float) -> int:
        """How many of the steps under way are over at `when`."""
        return self._done(self.stepping[rank.number], when)

    def step_end(self, rank: SimulatedRank, when: float) -> float | None:
        """When its current step is over, of many."""
        stepping = self.stepping[rank.number]
        if not stepping.steady or when < stepping.begin:
            return None
        return stepping.begin + stepping.step_s * min(stepping.steps, self._done(stepping, when) + 1)

    def nudge(self) -> None:
        """Nobody pulls in common here."""

    def wake(self) -> None:
        """Nobody pauses here."""

    def next_turn(self, rank: SimulatedRank) -> float:
        """When it is between two steps next."""
        stepping, now = self.stepping[rank.number], self._clock.now
        if not stepping.steps:
            return now
        if not stepping.steady:
            return stepping.begin + stepping.step_s
        return stepping.begin + stepping.step_s * min(stepping.steps, self._done(stepping, now) + 1)

    def _done(self, stepping: Stepping, when: float) -> int:
        if not stepping.steps or when < stepping.begin:
            return 0
        if stepping.step_s <= 0.0:
            return stepping.steps
        return min(stepping.steps, math.floor((when - stepping.begin) / stepping.step_s + ROUNDING))

    def _cut(self, stepping: Stepping) -> None:
        """End the steady steps with the one that runs now."""
        steps = max(1, min(stepping.steps, self._done(stepping, self._clock.now) + 1))
        if steps < stepping.steps:
            stepping.steps = steps
            self._arrange(stepping)

    def _arrange(self, stepping: Stepping) -> None:
        stepping.arranged += 1
        end = stepping.begin + stepping.step_s * stepping.steps
        self._clock.at(max(end, self._clock.now), self._over, (stepping, stepping.arranged))

    def _over(self, which: tuple[Stepping, int]) -> None:
        stepping, arranged = which
        if arranged != stepping.arranged:
            return
        now, engine, steps = self._clock.now, stepping.engine, stepping.steps
        if stepping.steady:
            made = engine.decoding
            begun: list[Sequence] = []
            done = engine.advance(steps)
        else:
            made = engine.decoded
            begun, done = engine.end()
        self._recorder.tokens(stepping.begin, stepping.step_s, steps, made)
        stepping.step += steps
        stepping.steps = 0
        stepping.steady = False
        self._recorder.first(begun, now)
        if done:
            self._recorder.last(done, now)
            self._plane.ended(stepping, done)
        self._turn(stepping)

    def _turn(self, stepping: Stepping) -> None:
        stepping.take_in()
        self._plane.pull([stepping])
        engine = stepping.engine
        stepping.counts = engine.counts()
        self._plane.between_steps(stepping)
        if not engine.has_work():
            return
        step_s, prefill_s, decode_s = self._costs_s
        stepping.begin = self._clock.now
        stepping.steps = engine.steady()
        stepping.steady = stepping.steps > 0
        if stepping.steady:
            stepping.step_s = step_s + decode_s * engine.decoding
        else:
            engine.begin()
            stepping.steps = 1
            stepping.step_s = step_s + prefill_s * engine.prefilled + decode_s * engine.decoded
        self._arrange(stepping)
