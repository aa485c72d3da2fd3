"""What pausing and scaling share: the newest number counts, and a call is served once."""

from __future__ import annotations

import pytest

from paceline.core.coordinator.pause import Pause
from paceline.core.coordinator.scaling import DeploymentScaling
from paceline.core.transaction import ANSWERS_KEPT, ServedCalls, Transaction


@pytest.mark.parametrize("transaction", [Pause(), DeploymentScaling(2)], ids=["pause", "scaling"])
def test_a_higher_number_is_news_unless_nobody_can_have_counted_that_far(transaction: Transaction) -> None:
    assert transaction.number == 0
    assert not transaction.is_news(0)
    assert transaction.is_news(1)
    assert not transaction.is_news(2**60)
    assert transaction.due is None


def test_a_call_is_served_once_whatever_comes_between() -> None:
    served = ServedCalls()
    assert (served.number(7, 1), served.newest(7)) == (None, -1)
    served.serve(7, 1, 3)
    served.serve(8, 1, 4)
    served.serve(7, 5, 5)
    assert (served.number(7, 1), served.number(8, 1), served.newest(7)) == (3, 4, 5)
    served.serve(7, 2, 6)
    assert served.newest(7) == 5


def test_a_front_end_that_is_gone_is_forgotten_and_no_other() -> None:
    served = ServedCalls()
    served.serve(7, 1, 3)
    served.serve(8, 1, 4)
    served.forget_frontend(7)
    assert (served.number(7, 1), served.newest(7), served.number(8, 1)) == (None, -1, 4)


def test_what_is_kept_is_bounded() -> None:
    served = ServedCalls()
    for call in range(ANSWERS_KEPT + 10):
        served.serve(7, call, call)
    assert served.number(7, 9) is None
    assert served.number(7, 10) == 10
