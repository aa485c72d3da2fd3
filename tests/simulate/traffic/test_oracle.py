"""The bound: binds late, knows how long answers will be, and keeps memory from running out."""

from __future__ import annotations

from paceline.simulate.traffic.trace import Arrival
from tests.simulate.traffic.deployments import drawn, finished


def test_it_waits_for_the_rank_that_is_free_first() -> None:
    # Rank 0 gets the long prompt, rank 1 a shorter one; what comes then goes to rank 1 when that is free.
    arrivals = [Arrival(0.0, 8000, 2), Arrival(0.0, 2048, 2), Arrival(0.01, 2048, 2), Arrival(0.02, 2048, 2)]
    done = finished(arrivals, ranks=2, routing="oracle")
    assert [one.rank for one in done.sequences] == [0, 1, 1, 1]


def test_nobody_is_ever_pushed_out() -> None:
    arrivals = drawn(300, 100.0)
    assert finished(arrivals, ranks=2, routing="round-robin", kv_tokens=8000).outcome.preemptions > 0
    done = finished(arrivals, ranks=2, routing="oracle", kv_tokens=8000)
    assert done.outcome.preemptions == 0
    assert done.outcome.kv_peak > 0.8


def test_it_is_no_slower_than_anybody_under_load() -> None:
    arrivals = drawn(800, 60.0)
    best = finished(arrivals, ranks=4, routing="oracle").outcome
    for routing in ("round-robin", "vllm-0.32", "vllm-0.9", "least-load"):
        other = finished(arrivals, ranks=4, frontends=4, routing=routing).outcome
        assert best.ttft_p99_ms <= other.ttft_p99_ms * 1.02
