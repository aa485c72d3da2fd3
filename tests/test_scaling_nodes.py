"""More ranks and fewer over two nodes, in internal and hybrid mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving import Command, command, wait_until
from tests.streams import MOE
from tests.test_modes import free_port, nodes, ranks_used

pytestmark = pytest.mark.slow


def scale(running: Command, size: int, **fields: Any) -> Any:
    """Ask for so many ranks; returns the HTTP answer."""
    return running.http.post("/scale_elastic_ep", json={"new_data_parallel_size": size, **fields})


def busy_ranks(running: Command) -> set[str]:
    """The ranks that answer where there is something for all of them to do."""
    ask = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: running.http.post("/v1/completions", json=ask), range(24)))
    assert {answer.status_code for answer in answers} == {200}
    return {str(answer.headers["x-data-parallel-rank"]) for answer in answers}


def test_new_ranks_go_where_there_are_fewest() -> None:
    common = ["-dp", "3", "-dpl"]
    second = [*common, "1", "--data-parallel-start-rank", "2", "--headless"]
    with nodes([*common, "2"], second) as (leading, headless):
        headless.wait_line("ranks 2 of 3 are ready")
        assert scale(leading, 5).json()["size"] == 5
        headless.wait_line("starting rank 3")
        leading.wait_line("starting rank 4")
        assert set(ranks_used(leading, 40)) == {"0", "1", "2", "3", "4"}
        assert scale(leading, 2).json()["size"] == 2
        headless.wait_line("ending rank 3")
        assert set(ranks_used(leading)) == {"0", "1"}
        # The other node has no rank now, and is there all the same.
        assert scale(leading, 3).json()["size"] == 3
        headless.wait_line("starting rank 2")
        assert set(ranks_used(leading)) == {"0", "1", "2"}


@pytest.mark.parametrize("engine", [[], list(MOE)], ids=["timed", "moe"])
def test_hybrid_frontends_balance_over_the_new_ranks_of_their_node(engine: list[str]) -> None:
    common = ["-dp", "4", "-dpl", "2", "--data-parallel-hybrid-lb", "-asc", "2", *engine]
    with nodes(common, [*common, "--data-parallel-start-rank", "2"]) as (first, second):
        assert scale(second, 6).json()["size"] == 6
        wait_until(lambda: busy_ranks(first) == {"0", "1", "4"}, "the first node's front-ends use rank 4")
        wait_until(lambda: busy_ranks(second) == {"2", "3", "5"}, "the second node's use rank 5")
        refused = scale(first, 2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "new_data_parallel_size")
        assert "the one with rank 2, 3, 5 would have none" in refused.json()["error"]["message"]
        assert scale(first, 3).json()["size"] == 3
        assert busy_ranks(first) == {"0", "1"}
        assert busy_ranks(second) == {"2"}
        assert first.health()["missing"] == second.health()["missing"] == []


def test_external_mode_says_that_it_cannot() -> None:
    one = ("serve", "--port", "0", "--engine", "timed", "-dpp", free_port(), "-dp", "1", "--data-parallel-rank", "0")
    with command(*one) as running:
        running.connect()
        refused = scale(running, 2)
        assert refused.status_code == 400
        assert "external mode" in refused.json()["error"]["message"]
