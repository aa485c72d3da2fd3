"""Arrivals from a seed."""

from __future__ import annotations

import itertools
import random

from paceline.simulate.workload import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS, drawn


def test_drawn_arrivals_are_in_order_within_bounds_and_come_in_bursts() -> None:
    arrivals = drawn(random.Random(1), 500, 10.0, 4, 3)
    assert len(arrivals) == 500
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert all(
        1 <= a.prompt_tokens <= MAX_PROMPT_TOKENS and 1 <= a.answer_tokens <= MAX_ANSWER_TOKENS for a in arrivals
    )
    assert {a.frontend for a in arrivals} == {0, 1, 2}
    assert {a.rank for a in arrivals} == {None, 0, 1, 2, 3}
    assert any(a.patience_s is not None for a in arrivals)
    gaps = [after.at - before.at for before, after in itertools.pairwise(arrivals)]
    assert sum(gap < 0.003 for gap in gaps) > 100
    assert max(gaps) > 0.1
