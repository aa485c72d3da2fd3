"""When somebody who was refused may come back."""

from __future__ import annotations

import pytest

from paceline.core.frontend.inflight import LONGEST_S, RetryAfter


def steady(takes_s: float, count: int = 100, now: float = 1000.0) -> RetryAfter:
    """Requests that took so long each have ended, the last one now."""
    retry_after = RetryAfter()
    retry_after.busy(0.0)
    for _ in range(count):
        retry_after.ended(takes_s, now)
    return retry_after


def test_nothing_is_known_before_anything_has_ended() -> None:
    retry_after = RetryAfter()
    assert retry_after.come_back_s(0, 5.0) == 1
    retry_after.busy(5.0)
    assert retry_after.come_back_s(3, 5.1) == 1


def test_everybody_is_promised_a_place_of_his_own() -> None:
    """Ten requests of 5 s each: two end in a second."""
    retry_after = steady(5.0)
    told = [retry_after.come_back_s(10, 1000.0) for _ in range(20)]
    assert told == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10]


def test_promises_are_kept_as_time_goes_by() -> None:
    retry_after = steady(5.0)
    for _ in range(20):
        retry_after.come_back_s(10, 1000.0)
    retry_after.ended(5.0, 1007.9)
    assert retry_after.come_back_s(10, 1008.0) == 3
    retry_after.ended(5.0, 1020.0)
    assert retry_after.come_back_s(10, 1020.0) == 1


def test_promises_end_where_nobody_waits() -> None:
    """Most of those who were refused do not come back: the next one is not to wait for them."""
    retry_after = steady(5.0)
    for _ in range(20):
        retry_after.come_back_s(10, 1000.0)
    retry_after.no_queue()
    assert retry_after.come_back_s(10, 1000.0) == 1


def test_nobody_is_told_longer_than_clients_take_for_a_time() -> None:
    retry_after = steady(30.0)
    assert [retry_after.come_back_s(1, 1000.0) for _ in range(4)] == [30, 60, LONGEST_S, LONGEST_S]


def test_it_follows_what_requests_take_now() -> None:
    retry_after = steady(1.0)
    for _ in range(400):
        retry_after.ended(8.0, 1000.0)
    assert retry_after.come_back_s(1, 1000.0) == 8


@pytest.mark.parametrize(("silent_s", "told"), [(0.5, 1), (9.5, 10), (3600.0, LONGEST_S)])
def test_where_nothing_ends_for_long_the_next_end_is_as_far(silent_s: float, told: int) -> None:
    assert steady(0.1).come_back_s(8, 1000.0 + silent_s) == told


def test_a_rest_is_no_sign_of_slowness() -> None:
    retry_after = steady(1.0)
    retry_after.busy(9000.0)
    assert retry_after.come_back_s(8, 9000.1) == 1
