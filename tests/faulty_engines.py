"""Engines with defects, for `--engine tests.faulty_engines:NAME`, told by files in a folder as those of
`hanging_engines.py`: a rank that finds `fail-RANK` raises in its step, one that finds `eat-RANK` takes all the memory
that there is. The file stays, so each life does so.
"""

from __future__ import annotations

from paceline.engines.base import StepResult
from tests.hanging_engines import Hanging

MEAL_BYTES = 16 << 20


class Faulty(Hanging):
    def step(self) -> StepResult:
        if (self.folder / f"fail-{self.rank}").exists():
            raise ZeroDivisionError("one by nought")
        meals = []
        while (self.folder / f"eat-{self.rank}").exists():
            meals.append(b"x" * MEAL_BYTES)
        return super().step()
