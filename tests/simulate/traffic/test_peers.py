"""Each peer's rule, on cases made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.peers import PEERS, Client, PeerPlane, SglangTotalTokens, Vllm032, Vllm09
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import Arrival
from tests.simulate.traffic.deployments import drawn, finished


def request(prompt: int = 10) -> Sequence:
    return Sequence(0, Arrival(0.0, prompt, 5), 0)


def snapshot(waiting: list[int], running: list[int], kv_use: list[float] | None = None) -> Any:
    import numpy as np

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
    plane = done._plane_used
    assert isinstance(plane, PeerPlane)
    last = done.clock.now
    done.clock.now = last + 1.0
    for place, client in enumerate(plane._clients):
        plane._listen(place)
        assert client.in_flight.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", PEERS)
def test_a_client_hears_of_a_view_when_it_has_come(name: str) -> None:
    kind = PEERS[name]
    clock = Clock()
    plane = PeerPlane(clock, kind, 2, 2, 0.01)
    heard: list[Any] = []
    for client in plane._clients:
        client.hear = heard.append  # type: ignore[method-assign]
    plane._news.extend([(1.0, "old"), (2.0, "new"), (3.0, "to come")])  # type: ignore[arg-type, list-item]
    clock.now = 2.5
    plane._listen(0)
    plane._listen(0)
    assert heard == ["new"]


def test_one_controller_stands_before_all_sglang_ranks() -> None:
    plane = PeerPlane(Clock(), SglangTotalTokens, 4, 2, 0.01)
    assert len(plane._clients) == 1
