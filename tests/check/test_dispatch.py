"""The search of the central queue: nothing is found in the machines as they are, and every rule left out is missed."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.check.dispatch import Dispatch, Limits
from paceline.check.search import Finding, search
from paceline.core.rules import BINDING_RULES

BREAKS: dict[str, tuple[dict[str, int], str, int]] = {
    "grants-count": ({"requests": 3}, "Then: rank 0 has 2 requests and room for 1.", 10),
    "grants-repeated": ({"losses": 1}, "a request can never come to its end any more", 8),
    "unsent-asked-again": ({"crashes": 1}, "a request can never come to its end any more", 4),
}
"""By rule: the bounds, what is found, and after how many moves."""


def walked(**limits: Any) -> Finding:
    return search(Dispatch(Limits(**{"aborts": 0, "losses": 0, "crashes": 0} | limits)))


@pytest.mark.parametrize("limits", [{"losses": 1, "requests": 1}, {"crashes": 1, "requests": 1}])
def test_nothing_is_found(limits: dict[str, int]) -> None:
    found = walked(**limits)
    assert (found.violation, found.story) == ("", [])
    assert found.states > 10


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["aborts", "losses", "crashes"])
def test_nothing_is_found_with_each_fault(fault: str) -> None:
    found = walked(**{fault: 1})
    assert found.violation == "", "\n".join(found.story)


def test_every_rule_has_a_walk_that_misses_it() -> None:
    assert BREAKS.keys() == BINDING_RULES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", BREAKS)
def test_a_rule_that_is_left_out_is_missed(rule: str) -> None:
    limits, violation, moves = BREAKS[rule]
    found = walked(**limits, without=frozenset({rule}))
    assert found.violation == violation
    assert moves <= len(found.story) < moves + 20
