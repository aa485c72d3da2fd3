"""A rank's machine and its engine: what they do on an event, at a turn and in a step, without links."""

from __future__ import annotations

from paceline.core.invariants import answered_once, runs_only_when_ready, wave_never_falls
from paceline.core.load import Load
from paceline.core.rank.events import (
    Again,
    Agree,
    Drop,
    DummyStep,
    Effect,
    Event,
    Step,
    StepOutput,
    Stepped,
    Take,
    Turn,
)
from paceline.core.rank.machine import Rank
from paceline.simulate.explore_block import Broken, Life, demand
from paceline.simulate.explore_parts import NOW, RankLabel


class Machines:
    """As `Blocks`, which has the links."""

    group_address = ""

    def __init__(self, steps: int, sync_interval: int, without: frozenset[str]) -> None:
        self._steps = steps
        self._without = without
        self._sync_interval = sync_interval

    def _new_life(self, incarnation: int) -> Life:
        rank = Rank(
            RankLabel(0), incarnation, "rank", lockstep=True, report_loads=False, sync_interval=self._sync_interval,
            group_address=self.group_address, without=self._without,
        )  # fmt: skip
        return Life(rank, {})

    def _take_a_step(self, life: Life) -> list[Effect]:
        effects = self._turn(life)
        outputs: list[StepOutput] = []
        names: list[int] = []
        if any(isinstance(effect, Step) for effect in effects):
            for key in sorted(life.left):
                life.left[key] -= 1
                finished = life.left[key] == 0
                outputs.append(StepOutput(key, [1], "", "length" if finished else None))
                if finished:
                    del life.left[key]
                    names.append(life.machine.requests._owners[key][1])
        elif not any(isinstance(effect, DummyStep) for effect in effects):
            raise Broken("a rank that runs does not step")
        answers = self._handle(life, Stepped(outputs, Load(), bool(life.left)))
        demand(answered_once(names, answers))
        life.agree = next((effect for effect in answers if isinstance(effect, Agree)), None)
        return effects + answers

    def _turn(self, life: Life) -> list[Effect]:
        """What the rank does when all that has come is read, up to the step that it would begin."""
        effects: list[Effect] = []
        again = True
        while again:
            made = self._handle(life, Turn(Load(), bool(life.left)))
            again = any(isinstance(effect, Again) for effect in made)
            effects += made
        return effects

    def _handle(self, life: Life, event: Event, now: float = NOW) -> list[Effect]:
        wave = life.machine.wave
        try:
            effects = life.machine.handle(event, now)
        except Exception as error:
            raise Broken(f"a rank's machine failed: {type(error).__name__}: {error}") from error
        for effect in effects:
            if isinstance(effect, Take):
                life.left[effect.key] = self._steps
            elif isinstance(effect, Drop):
                del life.left[effect.key]
        demand(wave_never_falls("a rank", wave, life.machine.wave))
        demand(runs_only_when_ready(life.machine))
        return effects
