"""The rules by name: one that is misspelt is refused by every machine that can leave rules out."""

from __future__ import annotations

import pytest

from paceline.core.coordinator.machine import Coordinator
from paceline.core.rank.machine import Rank
from paceline.core.rules import RULES, checked


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_left_out_and_says_what_it_is(name: str) -> None:
    assert checked({name}) == {name}
    assert RULES[name].endswith(".")
    Coordinator(2, 1, 0.1, without={name})
    Rank(0, 1, "address", without={name})


def test_none_is_left_out_by_default() -> None:
    assert checked(frozenset()) == frozenset()


def test_a_name_that_is_no_rule_is_refused_and_the_rules_are_named() -> None:
    makers = [
        checked,
        lambda names: Coordinator(2, 1, 0.1, without=names),
        lambda names: Rank(0, 1, "address", without=names),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="acknowledged-wake is not a rule; rules: acknowledged-wakes"):
            make(frozenset({"acknowledged-wake"}))
