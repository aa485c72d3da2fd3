"""Tenants share the queue by weight, whatever one of them asks for, and priorities count inside each."""

from __future__ import annotations

import pytest

from paceline.core.binding import Descriptor
from paceline.core.dispatch.line import Entry
from paceline.core.dispatch.tenants import FORGOTTEN_FROM, Tenants
from tests.core.dispatch.test_queue import KV, Ranks

FLOOD, OTHER, THIRD = 1, 2, 3


def ask(ranks: Ranks, request: int, tenant: int, *, weight: float = 1.0, priority: int = 0, tokens: int = 10) -> None:
    asked = Descriptor(request, tokens, 10, priority, tenant=tenant, weight=weight)
    ranks.queue.ask(1, asked, float(request))


def shares(ranks: Ranks, turns: int) -> dict[int, int]:
    """How many of each tenant are granted as one after the other ends."""
    had: dict[int, int] = {}
    for turn in range(turns):
        for entry in ranks.grant():
            had[entry.tenant] = had.get(entry.tenant, 0) + 1
        ranks.end(turn % len(ranks.running))
    return had


def test_a_flood_waits_behind_itself() -> None:
    ranks = Ranks(1, slots=1)
    for request in range(100):
        ask(ranks, request, FLOOD)
    ranks.grant()
    ask(ranks, 200, OTHER)
    ranks.end(0)
    assert [entry.request for entry in ranks.grant()] == [200]


def test_they_share_by_weight() -> None:
    ranks = Ranks(2, slots=1)
    for request in range(200):
        ask(ranks, request, FLOOD, weight=1.0)
        ask(ranks, 200 + request, OTHER, weight=3.0)
    had = shares(ranks, 120)
    assert had[OTHER] == pytest.approx(3 * had[FLOOD], abs=4)


def test_what_is_shared_is_work_and_not_requests() -> None:
    ranks = Ranks(1, slots=1, total=10_000)
    for request in range(100):
        ask(ranks, request, FLOOD, tokens=970)
        ask(ranks, 200 + request, OTHER, tokens=10)
    had = shares(ranks, 60)
    assert had[OTHER] > 20 * had[FLOOD] > 0


def test_who_did_not_ask_has_saved_up_nothing() -> None:
    ranks = Ranks(1, slots=1)
    for request in range(50):
        ask(ranks, request, FLOOD)
    shares(ranks, 40)
    for request in range(100, 150):
        ask(ranks, request, OTHER)
        ask(ranks, request + 100, FLOOD)
    had = shares(ranks, 20)
    assert had[FLOOD] == pytest.approx(had[OTHER], abs=1)


def test_priorities_count_inside_a_tenant() -> None:
    ranks = Ranks(1, slots=1)
    ask(ranks, 1, FLOOD)
    ranks.grant()
    ask(ranks, 2, FLOOD, priority=5)
    ask(ranks, 3, FLOOD, priority=-5)
    ask(ranks, 4, OTHER, priority=9)
    order = []
    for _ in range(3):
        ranks.end(0)
        order += [entry.request for entry in ranks.grant()]
    assert order == [4, 3, 2]


def test_a_large_one_of_a_tenant_is_not_passed_over_for_ever_by_the_others() -> None:
    ranks = Ranks(1, slots=4)
    for request in range(4):
        ask(ranks, request, FLOOD, tokens=200)
    ranks.grant()
    ask(ranks, 10, OTHER, tokens=KV - 100)
    for request in range(20, 60):
        ask(ranks, request, FLOOD, tokens=200)
    granted: list[int] = []
    for _ in range(30):
        ranks.end(0)
        granted += [entry.request for entry in ranks.grant()]
        if 10 in granted:
            break
    assert 10 in granted[:12]


def test_a_rank_that_ends_takes_nothing_from_anybody() -> None:
    ranks = Ranks(2, slots=1)
    for request in range(20):
        ask(ranks, request, FLOOD)
        ask(ranks, 100 + request, OTHER)
    ranks.grant()
    ranks.queue.lost(0)
    had = shares(ranks, 60)
    assert had[OTHER] + had[FLOOD] == 38
    assert not ranks.queue.queued


def test_those_that_have_gone_are_forgotten_when_there_are_many() -> None:
    tenants = Tenants()
    for tenant in range(3 * FORGOTTEN_FROM):
        entry = Entry(1, 1, 10, 20, 0, 0.0, tenant, tenant=tenant)
        tenants.joined(tenant)
        tenants.left(tenant)
        tenants.granted(entry, 1)
        tenants.joined(THIRD + 10**6)
        tenants.granted(Entry(1, 1, 10**6, 10**6, 0, 0.0, tenant, tenant=THIRD + 10**6), 1)
        tenants.left(THIRD + 10**6)
    assert len(tenants._had) <= FORGOTTEN_FROM + 2


def test_nor_is_anything_kept_for_names_that_are_made_up() -> None:
    tenants = Tenants()
    for tenant in range(1, 5 * FORGOTTEN_FROM):
        tenants.joined(tenant)
        tenants.granted(Entry(1, 1, 10, 20, 0, 0.0, tenant, tenant=tenant), 1)
        tenants.left(tenant)
    assert len(tenants._had) <= FORGOTTEN_FROM + 2
    tenants.joined(1)
    assert tenants.had(1) == 0.0
