"""What `routing.py` measures, row by row."""

from __future__ import annotations

from msgspec import Struct

from paceline.sim.outcome import Outcome


class Cell(Struct, frozen=True):
    """One row: what is served, on what."""

    trace: str
    lockstep: bool
    ranks: int
    frontends: int
    load: str


class Measured(Struct, frozen=True):
    """One figure of a row: by whom, with which token budget."""

    cell: Cell
    policy: str
    budget: int
    outcome: Outcome
