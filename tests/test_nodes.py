"""Several nodes in network namespaces: a head that dies, a node that claims another's ranks."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.namespaces import Host, hosts
from tests.serving import Command, command, wait_until

pytestmark = pytest.mark.slow

PORT = 8000
RANKS = 4


def _arguments(head: Host, *more: str, engine: str = "timed") -> list[str]:
    return [
        "serve",
        "--engine",
        engine,
        "-dp",
        str(RANKS),
        "-dpl",
        "2",
        "-dpa",
        head.address,
        *(() if "--secret-file" in more else ("--insecure",)),
        *more,
    ]


@contextlib.contextmanager
def _leading(head: Host, *more: str, **how: Any) -> Iterator[Command]:
    arguments = _arguments(head, "--host", "0.0.0.0", "--port", str(PORT), *more, **how)
    with command(*arguments, prefix=head.prefix) as running:
        yield running


def _follows(head: Host, worker: Host, *more: str, first: int = 2, **how: Any) -> Any:
    ranks = ["--headless", "--data-parallel-start-rank", str(first)]
    return command(*_arguments(head, *ranks, *more, **how), prefix=worker.prefix)


def _ready(head: Host) -> list[int]:
    with contextlib.suppress(httpx2.TransportError):
        return list(httpx2.get(f"http://{head.address}:{PORT}/health", timeout=5).json()["ready"])
    return []


def _complete(head: Host, rank: int) -> int:
    body, named = {"prompt": "a", "max_tokens": 3}, {"X-data-parallel-rank": str(rank)}
    url = f"http://{head.address}:{PORT}/v1/completions"
    return int(httpx2.post(url, json=body, headers=named, timeout=30).status_code)


def _serve_all(head: Host) -> None:
    wait_until(lambda: _ready(head) == list(range(RANKS)), "all ranks", 60)
    assert [_complete(head, rank) for rank in range(RANKS)] == [200] * RANKS


@pytest.mark.parametrize("engine", ["timed", "timed-lockstep"])
def test_a_head_that_dies_and_comes_back_finds_its_worker(engine: str) -> None:
    with hosts(2) as (head, worker), _follows(head, worker, engine=engine) as following:
        following.wait_line("waiting for the node with rank 0")
        with _leading(head, engine=engine) as leading:
            _serve_all(head)
            lives = following.children()
            leading.signal(signal.SIGKILL)
            leading.wait_end()
        with _leading(head, engine=engine) as leading:
            leading.wait_line("serves on http")
            wait_until(lambda: _ready(head) == list(range(RANKS)), "the worker's ranks", 10)
            _serve_all(head)
            assert following.children() == lives, "nothing of the worker was started again"


def test_a_head_that_comes_back_elsewhere_is_found_by_its_name() -> None:
    """As a pod, which has another address in each life."""
    with hosts(2) as (head, worker):
        worker.knows("the-head", head.address)
        named: Any = SimpleNamespace(address="the-head")
        with _follows(named, worker) as following:
            with _leading(head) as leading:
                _serve_all(head)
                lives = following.children()
                leading.signal(signal.SIGKILL)
                leading.wait_end()
            head.move()
            worker.knows("the-head", head.address)
            with _leading(head) as leading:
                leading.wait_line("serves on http")
                _serve_all(head)
                assert following.children() == lives


def test_a_head_serves_with_the_ranks_it_has() -> None:
    with hosts(2) as (head, worker), _leading(head) as leading:
        leading.wait_line("serves on http")
        assert _ready(head) == [0, 1]
        with _follows(head, worker):
            _serve_all(head)


def test_a_second_claimant_is_refused_at_both_ends_and_takes_over_from_the_lost() -> None:
    with hosts(3) as (head, worker, second), _leading(head) as leading, _follows(head, worker) as first:
        _serve_all(head)
        with _follows(head, second) as claimant:
            line = f"rank 2 is held by tcp://{worker.address}:"
            assert f"tcp://{second.address}:" in leading.wait_line(line)
            claimant.wait_line(f"rank 2 is refused: it is held by tcp://{worker.address}:")
            _serve_all(head)
            assert "refused" not in first.output
            first.signal(signal.SIGKILL)
            claimant.wait_line("ranks 2, 3 of 4 are ready", 40)
            _serve_all(head)


def test_a_start_rank_that_was_forgotten_is_said() -> None:
    with hosts(2) as (head, worker), _leading(head) as leading:
        leading.wait_line("serves on http")
        with _follows(head, worker, first=0) as claimant:
            claimant.wait_line(f"rank 0 is refused: it is held by tcp://{head.address}:")
            leading.wait_line(f"rank 0 is held by tcp://{head.address}:")
            assert [_complete(head, rank) for rank in (0, 1)] == [200, 200]


def test_a_node_with_another_model_is_refused() -> None:
    with hosts(2) as (head, worker), _leading(head) as leading:
        leading.wait_line("serves on http")
        with _follows(head, worker, "--max-model-len", "512", "--engine-option", "step_ms=1") as claimant:
            assert claimant.wait_end() == 1
            differs = (
                "--max-model-len is the model's there and 512 here; the engine's options is  there and step_ms=1 here"
            )
            assert differs in claimant.output
            leading.wait_line("refused a node that asked to join: --max-model-len is the model's there and 512 here")


def test_a_cut_link_costs_nothing_that_is_not_back_when_it_is_mended() -> None:
    with hosts(2) as (head, worker), _leading(head, "--rank-timeout", "2"), _follows(head, worker) as following:
        _serve_all(head)
        lives = following.children()
        worker.cut()
        wait_until(lambda: _ready(head) == [0, 1], "the loss of the others", 30)
        worker.cut(False)
        _serve_all(head)
        assert following.children() == lives


def test_nodes_with_a_secret_serve_and_one_without_it_is_not_answered_and_says_why(tmp_path: Path) -> None:
    for name in ("secret", "other"):
        with command("secret", "new", str(tmp_path / name)) as made:
            assert made.wait_end() == 0
    locked, other = ("--secret-file", str(tmp_path / "secret")), ("--secret-file", str(tmp_path / "other"))
    with hosts(2) as (head, worker), _leading(head, *locked) as leading, _follows(head, worker, *locked):
        leading.wait_line("serves on http")
        _serve_all(head)
        with _follows(head, worker) as stranger, _follows(head, worker, *other) as mistaken:
            for refused in (stranger, mistaken):
                refused.wait_line("waiting for the node with rank 0")
                refused.wait_line("the connection is refused: one of the two nodes has another --secret-file, or none")
            _serve_all(head)


def test_a_head_that_was_started_without_its_secret_for_a_while_is_found_again(tmp_path: Path) -> None:
    """ZeroMQ itself gives up whom it finds without keys where it has some, and never asks again."""
    with command("secret", "new", str(tmp_path / "secret")) as made:
        assert made.wait_end() == 0
    locked = ("--secret-file", str(tmp_path / "secret"))
    with hosts(2) as (head, worker), _follows(head, worker, *locked) as following:
        with _leading(head, *locked) as leading:
            _serve_all(head)
            lives = following.children()
            leading.signal(signal.SIGKILL)
            leading.wait_end()
        with _leading(head) as mistaken:
            mistaken.wait_line("serves on http")
            assert _ready(head) == [0, 1]
        with _leading(head, *locked):
            _serve_all(head)
            assert following.children() == lives


def test_without_a_secret_several_nodes_do_not_start() -> None:
    with command("serve", "--engine", "timed", "-dp", "4", "-dpl", "2", "-dpa", "10.1.2.3") as running:
        assert running.wait_end() == 1
        assert "--secret-file: several nodes need one (`paceline secret new`), or --insecure" in running.output
