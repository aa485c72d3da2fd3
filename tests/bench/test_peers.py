"""Other systems' rules, on cases made by hand; and the bound, which binds late, knows all, and keeps memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench.peers import (
    BATCHING_WAIT_ITERS,
    CLIENTS,
    TIMEOUT_ITERS,
    AdpBalance,
    BfIo,
    Client,
    ContextGate,
    Queue,
    Rank,
    SglangTotalTokens,
    Snapshot,
    Vllm032,
    Vllm09,
)
from bench.replay import ClientReplay

from paceline.errors import ConfigError
from paceline.sim.engine import EngineShape, MemoryEngine, Sequence
from paceline.sim.replay import Setup
from paceline.sim.trace import Arrival
from tests.sim.traces import drawn, finished, sequence


def request(prompt: int = 10) -> Sequence:
    return sequence(0, prompt, 5)


def snapshot(waiting: list[int], running: list[int], kv_use: list[float] | None = None) -> Any:
    shares = kv_use or [0.0] * len(waiting)
    tokens = np.array([100 * share for share in shares])
    return SimpleNamespace(
        waiting=np.array(waiting, dtype=float), running=np.array(running, dtype=float), kv_use=np.array(shares),
        tokens=tokens,
    )  # fmt: skip


def choices(client: Client, count: int) -> list[int]:
    chosen = []
    for _ in range(count):
        rank = client.choose(request())
        client.in_flight[rank] += 1
        chosen.append(rank)
    return chosen


def test_vllm_032_rotates_among_equals_and_begins_at_a_place_of_its_own() -> None:
    assert choices(Vllm032(0, 2, 4), 4) == [0, 1, 2, 3]
    assert choices(Vllm032(1, 2, 4), 4) == [2, 3, 0, 1]


def test_vllm_032_takes_the_larger_of_its_own_and_the_views() -> None:
    client = Vllm032(0, 3, 3)
    client.hear(snapshot([0, 0, 0], [5, 7, 4]))
    client.in_flight[:] = [1, 1, 2]
    # 3 x 1 = 3 and 5; 3 and 7; 3 x 2 = 6 and 4.
    assert client.choose(request()) == 0


def test_vllm_032_adds_its_clients_to_the_chosen_rank_until_the_next_view() -> None:
    client = Vllm032(0, 4, 2)
    client.hear(snapshot([0, 0], [0, 3]))
    assert client.choose(request()) == 0
    assert client.choose(request()) == 1
    client.hear(snapshot([0, 0], [0, 3]))
    assert client.choose(request()) == 0


def test_vllm_032_shuns_queues_where_memory_is_short() -> None:
    client = Vllm032(0, 1, 2)
    client.hear(snapshot([2, 0], [4, 9], [0.5, 1.0]))
    assert client.choose(request()) == 0
    client.hear(snapshot([2, 0], [4, 9], [0.9, 1.0]))
    # 6 + 2 x 6 x 0.4 = 10.8 against 9.
    assert client.choose(request()) == 1


def test_vllm_09_weighs_waiting_four_times_and_forgets_its_own_with_each_view() -> None:
    client = Vllm09(0, 2, 3)
    client.hear(snapshot([2, 1, 0], [0, 0, 6]))
    assert choices(client, 2) == [1, 2]
    client.hear(snapshot([2, 1, 0], [0, 0, 6]))
    assert choices(client, 1) == [1]


def test_sglang_chooses_by_tokens_then_requests() -> None:
    client = SglangTotalTokens(0, 1, 3)
    client.hear(snapshot([0, 0, 0], [3, 1, 0], [0.2, 0.2, 0.9]))
    assert client.choose(request(prompt=30)) == 1
    assert client.choose(request(prompt=80)) == 0
    assert client.choose(request()) == 1


def test_a_clients_own_counts_fall_when_it_hears_of_the_end() -> None:
    done = finished(drawn(60, 200.0), ranks=3, frontends=2, routing="vllm-0.32")
    assert isinstance(done.run, ClientReplay)
    assert [client.in_flight.tolist() for client in done.run.clients] == [[0.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_hears_of_the_ranks_as_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[float, float]] = []
    run = ClientReplay(Setup(ranks=2, routing=name, delay_s=0.01), [Arrival(0.0, 10, 200)])
    hear = run._hear

    def hearing(snapshot: Snapshot) -> None:
        heard.append((run.world.now - run.begin_s, snapshot.running.sum()))
        hear(snapshot)

    monkeypatch.setattr(run, "_hear", hearing)
    run.run()
    interval_s = CLIENTS[name].interval_s
    assert [when for when, _ in heard[:3]] == pytest.approx([n * interval_s + 0.02 for n in (1, 2, 3)])
    assert {running for _, running in heard[:3]} == {1.0}


def test_one_controller_stands_before_all_sglang_ranks() -> None:
    run = ClientReplay(Setup(ranks=2, frontends=4, routing="sglang-total-tokens"), drawn(5, 1.0))
    assert len(run.clients) == 1


# Queues -----------------------------------------------------------------------------------------


def there(count: int, **shape: int) -> list[Rank]:
    made = EngineShape(**shape)  # type: ignore[arg-type]
    return [Rank(number, MemoryEngine(made, lambda request: sequence(0, 1, 1))) for number in range(count)]


def placed(kind: type[Queue], ranks: list[Rank], *prompts: int) -> list[list[int]]:
    """Which prompts each rank got of those that waited."""
    found: list[list[int]] = [[] for _ in ranks]

    def give(rank: Rank, one: Any) -> None:
        rank.given.append(one)
        found[rank.number].append(one.prompt)

    made = kind(give)
    made.queue.extend(sequence(0, prompt, 5) for prompt in prompts)
    made.pull(ranks)
    return found


def decode(rank: Rank, prompt: int, answer: int = 50) -> None:
    rank.engine.queue(sequence(90 + rank.number, prompt, answer))
    rank.engine.plan()
    rank.engine.step()


def test_bf_io_places_the_largest_first_on_the_least_loaded() -> None:
    assert placed(BfIo, there(2), 100, 400, 300, 250) == [[400, 100], [300, 250]]


def test_bf_io_counts_memory_in_use() -> None:
    ranks = there(2)
    decode(ranks[0], 500)
    assert placed(BfIo, ranks, 300, 100) == [[], [300, 100]]


def test_bf_io_fills_free_slots_alone() -> None:
    ranks = there(2, slots=1)
    decode(ranks[0], 10)
    assert placed(BfIo, ranks, 30, 40) == [[], [30]]


def test_adp_balance_gives_each_rank_its_share_of_requests() -> None:
    # Four requests on two ranks: two each, however long; the longest first to the rank with the fewest tokens.
    assert placed(AdpBalance, there(2), 1000, 10, 20, 30) == [[1000, 10], [30, 20]]


def test_adp_balance_levels_with_what_is_there() -> None:
    ranks = there(2)
    for _ in range(3):
        decode(ranks[0], 10)
    assert placed(AdpBalance, ranks, 500, 400) == [[], [500, 400]]


def test_the_gate_gathers_prompts_and_waits_for_every_rank() -> None:
    ranks, gate = there(2), ContextGate()
    for rank in ranks:
        decode(rank, 10)
    assert gate.opens(ranks)
    ranks[0].engine.queue(sequence(1, 100, 5))
    assert [gate.opens(ranks) for _ in range(TIMEOUT_ITERS)] == [False] * (TIMEOUT_ITERS - 1) + [True]
    ranks[1].engine.queue(sequence(2, 100, 5))
    assert [gate.opens(ranks) for _ in range(BATCHING_WAIT_ITERS + 1)] == [False] * BATCHING_WAIT_ITERS + [True]


def test_the_gate_is_open_where_some_rank_writes_nothing() -> None:
    ranks, gate = there(2), ContextGate()
    decode(ranks[0], 10)
    ranks[0].engine.queue(sequence(1, 100, 5))
    assert gate.opens(ranks)


@pytest.mark.parametrize("routing", ["bf-io", "trtllm-adp"])
def test_they_need_lockstep(routing: str) -> None:
    with pytest.raises(ConfigError, match=f"--routing: {routing}: only with --lockstep"):
        finished(drawn(5, 1.0), routing=routing)


def test_peers_have_no_quota() -> None:
    for routing, quota in (("vllm-0.32", False), ("bf-io", False), ("oracle", True), ("round-robin", True)):
        assert finished(drawn(5, 10.0), lockstep=True, routing=routing).run.setup.quota == quota


# The bound --------------------------------------------------------------------------------------


def test_it_waits_for_the_rank_that_is_free_first() -> None:
    # Rank 0 gets the long prompt, rank 1 a shorter one; what comes then goes to rank 1 when that is free.
    arrivals = [Arrival(0.0, 8000, 2), Arrival(0.0, 2048, 2), Arrival(0.01, 2048, 2), Arrival(0.02, 2048, 2)]
    done = finished(arrivals, ranks=2, routing="oracle")
    assert done.ranks() == [0, 1, 1, 1]


def test_nobody_is_ever_pushed_out() -> None:
    arrivals = drawn(300, 100.0)
    assert finished(arrivals, ranks=2, routing="round-robin", kv_tokens=8000).outcome.preemptions > 0
    done = finished(arrivals, ranks=2, routing="oracle", kv_tokens=8000)
    assert done.outcome.preemptions == 0
    assert done.outcome.kv_peak > 0.8


@pytest.mark.slow
def test_it_is_no_slower_than_anybody_under_load() -> None:
    arrivals = drawn(800, 60.0)
    best = finished(arrivals, ranks=4, routing="oracle").outcome
    for routing in ("round-robin", "vllm-0.32", "vllm-0.9", "least-load"):
        other = finished(arrivals, ranks=4, frontends=4, routing=routing).outcome
        assert best.ttft_p99_ms <= other.ttft_p99_ms * 1.02
