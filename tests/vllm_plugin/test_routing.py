"""Which rank gets a request under vLLM's API servers: several servers, one board."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.core.blocks import block_hashes
from paceline.vllm import routing
from paceline.vllm.routing import BLOCK_TOKENS, Board, ServerRouter, install

NONE = [0.0] * 4


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "SHARED_MEMORY", str(tmp_path))


def routers(servers: int = 2, ranks: int = 4) -> list[ServerRouter]:
    return [ServerRouter(Board("x", servers, server, ranks), ranks, server) for server in range(servers)]


def prompt(seed: int, blocks: int = 4) -> list[int]:
    return [seed * 1000 + place for place in range(blocks * BLOCK_TOKENS)]


def test_a_burst_over_several_servers_is_shared_out_exactly() -> None:
    both = routers()
    chosen = Counter(both[number % 2].choose(str(number), prompt(number), NONE) for number in range(16))
    assert chosen == dict.fromkeys(range(4), 4)


def test_nothing_is_left_once_all_servers_have_the_board() -> None:
    first = Board("y", 2, 0, 4)
    assert first.path.exists()
    second = Board("y", 2, 1, 4)
    assert not first.path.exists()
    second.add(3, 1, 7)
    assert first.totals(3) == (1, 7)


def test_tokens_count_and_not_requests() -> None:
    first, second = routers(ranks=2)
    long = first.choose("long", prompt(1, 40), NONE)
    assert [second.choose(str(number), prompt(2 + number, 4), NONE) for number in range(4)] == [1 - long] * 4


def test_whoever_has_the_beginning_gets_it_until_others_are_sooner_done() -> None:
    first, second = routers(ranks=2)
    shared = prompt(1, 8)
    holder = first.choose("a", shared, NONE)
    first.begun("a")
    first.ended("a")
    assert second.choose("b", shared + prompt(2, 1), NONE) == holder, "another server's word counts"
    second.begun("b")
    for number in range(3):
        first.choose(f"load {number}", prompt(10 + number, 30), NONE)
    requests = [first.board.totals(rank) for rank in range(2)]
    busy = max(range(2), key=lambda rank: requests[rank][1])
    if busy == holder:
        assert second.choose("c", shared, NONE) != holder


def test_what_has_ended_counts_no_more() -> None:
    first, second = routers(ranks=2)
    rank = first.choose("a", prompt(1), NONE)
    assert second.board.totals(rank) == (1, len(prompt(1)))
    first.begun("a")
    first.begun("a")
    assert second.board.totals(rank) == (1, 0)
    first.ended("a")
    first.ended("a")
    assert second.board.totals(rank) == (0, 0)


def test_a_rank_whose_memory_is_full_is_the_last_choice() -> None:
    (router,) = routers(servers=1, ranks=2)
    assert [router.choose(str(number), prompt(number), [1.0, 0.1]) for number in range(4)] == [1] * 4


def test_blocks_have_the_same_numbers_in_every_process() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "from paceline.core.blocks import block_hashes; print(block_hashes(range(70), 32))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == str(block_hashes(range(70), BLOCK_TOKENS))
    assert len(block_hashes(range(70), BLOCK_TOKENS)) == 2


@pytest.fixture
def client() -> Any:
    """As vLLM's is, as far as this goes."""

    class Client:
        client_count, client_index, eng_start_index = 1, 0, 0
        stats_update_address = "ipc://x"

        def __init__(self) -> None:
            self.core_engines = [b"a", b"b"]
            self.lb_engines: list[list[float]] = [[0, 0, 0.0], [0, 0, 0.0]]
            self.reqs_in_flight: dict[str, bytes] = {}

        def get_core_engine_for_request(self, request: Any) -> bytes:
            rank = request.data_parallel_rank
            engine = self.core_engines[1 if rank is None else rank]
            self.reqs_in_flight[request.request_id] = engine
            return engine

        @staticmethod
        async def process_engine_outputs(self: Any, outputs: Any) -> None:
            for request in outputs.finished_requests or ():
                self.reqs_in_flight.pop(request, None)

    install(Client)
    return Client()


def request(name: str, rank: int | None = None, tokens: Any = (1, 2, 3)) -> Any:
    return SimpleNamespace(request_id=name, data_parallel_rank=rank, prompt_token_ids=tokens, pooling_params=None)


def test_vllms_client_chooses_so_and_keeps_its_own_books(client: Any) -> None:
    asked = [request(str(number)) for number in range(4)]
    assert Counter(client.get_core_engine_for_request(one) for one in asked) == {b"a": 2, b"b": 2}
    assert [one.data_parallel_rank for one in asked] == [None] * 4
    assert client.get_core_engine_for_request(request("named", rank=1)) == b"b"
    assert client.get_core_engine_for_request(request("no tokens", tokens=None)) == b"b"
    outputs = SimpleNamespace(outputs=[SimpleNamespace(request_id="0")], finished_requests={"0", "1"})
    asyncio.run(type(client).process_engine_outputs(client, outputs))
    assert set(client.reqs_in_flight) == {"2", "3", "named", "no tokens"}
    board = client.paceline_router.board
    assert sum(board.totals(rank)[0] for rank in range(2)) == 2


def test_what_a_server_counts_is_not_how_many_servers_there_are() -> None:
    boards = [Board("z", 3, server, 2) for server in range(2)]
    boards[0].add(0, 5, 50)
    assert boards[1].path.exists(), "one is still to come"
    third = Board("z", 3, 2, 2)
    assert (third.totals(0), third.totals(1)) == ((5, 50), (0, 0))
    assert not third.path.exists()
