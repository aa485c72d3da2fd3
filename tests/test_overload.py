"""A short version of `make bench-overload`: four times the work that the ranks can do."""

from __future__ import annotations

import pytest
from bench.overload import BACK_S, Shape, run, table

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SHORT = Shape(best_s=5.0, normal_s=5.0, over_s=15.0, burst=200)
GROWTH_MIB = 8


@pytest.mark.parametrize("bind", ["broker", "arrival"])
def test_overload_is_refused_and_harms_nobody_else(bind: str) -> None:
    """The bounds are wider than the promised ones: a short run on a machine that may be shared."""
    figures = run(bind, SHORT)
    print(table({bind: figures}))
    assert figures.otherwise == 0
    assert figures.refused > figures.offered / 2
    assert figures.retry_after_s[0] >= 1
    assert figures.kept > 0.9
    assert figures.back_after_s <= BACK_S
    assert figures.back_p50_s < 2 * figures.normal_p99_s
    assert all(last < first + GROWTH_MIB for first, last in figures.memory_mib.values())
    # Told nothing but "in a second", each would ask as often as there are seconds of work.
    assert figures.burst_tries < 3
    assert figures.burst_s < 3 * figures.burst_best_s + BACK_S
