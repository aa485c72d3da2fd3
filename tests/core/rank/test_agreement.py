"""The step agreement on the wire: what ranks put in and get out, in one place or over an all-reduce."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from paceline.core.rank import prefill_quota as quota
from paceline.core.rank.events import Agree, Agreed
from paceline.core.rank.prefill_quota import REDUCTIONS, agreed, integers, outcome
from paceline.engines.group import MAX_REDUCED, reduced

numbers = st.integers(0, 2**40)
agrees = st.builds(
    Agree, st.booleans(), numbers, numbers,
    st.one_of(
        st.just(()),
        st.builds(quota.Part, *[numbers] * 9).map(quota.Part.packed),
    ),
)  # fmt: skip


@given(st.lists(agrees, min_size=1, max_size=5))
def test_an_all_reduce_gives_what_all_in_one_place_give(entered: list[Agree]) -> None:
    assert outcome(reduced([integers(agree) for agree in entered], REDUCTIONS)) == agreed(entered)


@pytest.mark.parametrize("place", range(len(REDUCTIONS)))
@pytest.mark.parametrize("absurd", [-1, -(2**63), 2**60, 2**63 - 1])
def test_what_no_rank_can_have_put_in_is_no_agreement(place: int, absurd: int) -> None:
    integers_of_all = integers(Agree(True, 3, 4, quota.Part(8, 5, 1, 4, 10, 1).packed()))
    outcome(integers_of_all)
    integers_of_all[place] = absurd
    with pytest.raises(ValueError, match="no rank of ours"):
        outcome(integers_of_all)


def test_it_fits_into_one_all_reduce() -> None:
    assert len(REDUCTIONS) == len(integers(Agree(True, 3))) <= MAX_REDUCED


def test_what_comes_out() -> None:
    made = agreed([Agree(False, 4, 2), Agree(True, 3, 5)])
    assert (made.any_work, made.wave, made.suspension) == (True, 4, 5)
    assert quota.decide(made.quota) == quota.Outcome(), "ranks that say nothing of a quota have none"
    assert isinstance(made, Agreed)
