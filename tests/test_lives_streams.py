"""Ranks that die, or stop, under streams: no client sees an error, a gap or a repeated token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.pace import stretched
from tests.serving import Deployment, deployment, wait_until
from tests.streams import MOE, TIMED, streams, whole

pytestmark = pytest.mark.slow


def test_what_a_killed_frontend_has_sent_is_aborted_wherever_it_waits() -> None:
    """Of one rank's slots all are taken: most of its requests have nothing to be told that could fail."""
    few_slots = ("--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--bind", "arrival")
    with deployment(*TIMED, "-dp", "2", "-asc", "2", *few_slots) as running:
        gone: list[Future[Any]] = []
        with ThreadPoolExecutor(12) as pool:
            ask = {"model": "timed", "prompt": "a", "max_tokens": 30000}
            gone += [pool.submit(running.openai.completions.create, **ask) for _ in range(12)]
            busy = lambda: sum(loads(running, "running")) + sum(loads(running, "waiting")) >= 12  # noqa: E731
            wait_until(busy, "the ranks have them all")
            for index in range(2):
                kill(running, f"front-end {index}")
            running.http.close()
            for request in gone:
                with pytest.raises(openai.APIConnectionError):
                    request.result(stretched(30))
            running.wait_line("front-end 0 is back")
            running.wait_line("front-end 1 is back")
            running.connect()
            wait_until(
                lambda: loads(running, "running") == loads(running, "kv_used") == [0, 0], "the ranks are free", 2.0
            )


def kill(running: Deployment, name: str) -> None:
    os.kill(running.pid_of(name), signal.SIGKILL)


def loads(running: Deployment, name: str) -> list[int]:
    return [load[name] for load in running.http.get("/loads").json()["ranks"]]


def moved(running: Deployment) -> int:
    return int(running.health()["moved"])


def test_streams_of_killed_ranks_go_on_elsewhere() -> None:
    expected = "".join(f" {index}" for index in range(300))
    with deployment(*TIMED, "-dp", "3") as running:
        asks = [{"prompt": "a" * 20, "max_tokens": 300, "extra_headers": {"X-data-parallel-rank": str(index % 3)}}
                for index in range(9)]  # fmt: skip
        with streams(running, asks) as read:
            kill(running, "rank 1")
            running.wait_line("rank 1 is back")
            # Rank 2 lives: a request that loses a third rank is taken to be what kills them.
            kill(running, "rank 0")
            assert read.wait() == [expected] * 9
        assert moved(running) >= 6
        wait_until(lambda: running.health()["missing"] == [], "all ranks are back")
        wait_until(lambda: loads(running, "running") == [0, 0, 0], "nobody works for nobody")
        assert "Traceback" not in running.output


def test_the_only_rank_is_waited_for() -> None:
    with deployment(*TIMED, "-dp", "1") as running:
        ask = {"prompt": "a", "max_tokens": 100}
        with streams(running, [ask] * 3) as read:
            kill(running, "rank 0")
            assert read.wait() == ["".join(f" {index}" for index in range(100))] * 3


def test_a_stopped_rank_loses_its_requests_and_is_back_when_it_goes_on() -> None:
    expected = "".join(f" {index}" for index in range(400))
    with deployment(*TIMED, "-dp", "2", "--rank-timeout", "1") as running:
        asks = [{"prompt": "a", "max_tokens": 400, "extra_headers": {"X-data-parallel-rank": str(index % 2)}}
                for index in range(6)]  # fmt: skip
        with streams(running, asks) as read:
            stopped = running.pid_of("rank 1")
            os.kill(stopped, signal.SIGSTOP)
            wait_until(lambda: moved(running) == 3, "its requests have gone elsewhere", 5.0)
            os.kill(stopped, signal.SIGCONT)
            assert read.wait() == [expected] * 6
        wait_until(lambda: running.health()["missing"] == [], "it is back")
        assert running.pid_of("rank 1") == stopped
        again = {"prompt": "a", "max_tokens": 3, "extra_headers": {"X-data-parallel-rank": "1"}}
        assert whole(running, again) == " 0 1 2"


def test_real_text_goes_on_as_if_nothing_had_happened() -> None:
    """Greedy, and drawn with a seed: bit for bit, at a rank that computes the same in another batch."""
    prompts = ["The capital of France is", "In Japanese: 東京は"]
    asks: list[dict[str, Any]] = [
        # Long enough that the rank has not finished its part when it is killed.
        {"prompt": prompt, "max_tokens": 120, "extra_body": {"ignore_eos": True}, **how}
        for prompt in prompts
        for how in ({"temperature": 0}, {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.3})
    ]  # fmt: skip
    with deployment("-dp", "2", "--max-num-seqs", "8", "--max-model-len", "512") as running:
        with streams(running, asks) as read:
            expected = list(read.wait())
        with streams(running, asks) as read:
            kill(running, "rank 0")
            assert read.wait() == expected
        assert moved(running) >= 1
        wait_until(lambda: running.health()["missing"] == [], "all ranks are back")


# In lockstep --------------------------------------------------------------------------------------

ASKS: list[dict[str, Any]] = [
    {"prompt": f"Hello {index}", "max_tokens": 100, "seed": index, "temperature": index % 2,
     "extra_body": {"ignore_eos": True}, "extra_headers": {"X-data-parallel-rank": str(index % 4)}}
    for index in range(8)
]  # fmt: skip


@pytest.fixture(scope="module")
def lockstep() -> Iterator[tuple[Deployment, list[str]]]:
    """Four ranks, and what they answer to `ASKS` when nothing happens."""
    with deployment(*MOE, "-dp", "4", "--rank-timeout", "1") as running:
        with streams(running, ASKS) as read:
            expected = list(read.wait())
        yield running, expected
        wait_until(lambda: running.health()["missing"] == [], "all ranks are back")
        assert "Traceback" not in running.output


def test_lockstep_ranks_go_on_without_a_stopped_one(lockstep: tuple[Deployment, list[str]]) -> None:
    running, expected = lockstep
    with streams(running, ASKS) as read:
        stopped = running.pid_of("rank 1")
        os.kill(stopped, signal.SIGSTOP)
        assert read.wait() == expected
    os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: running.health()["missing"] == [], "it is back")
    with streams(running, ASKS) as read:
        assert read.wait() == expected
    assert running.pid_of("rank 1") == stopped


def test_lockstep_ranks_go_on_without_a_killed_one_and_with_its_next_life(
    lockstep: tuple[Deployment, list[str]],
) -> None:
    """Rank 0, of all."""
    running, expected = lockstep
    with streams(running, ASKS) as read:
        kill(running, "rank 0")
        # On a busy machine some are over before others have begun.
        before, over = list(read.texts), [finish is not None for finish in read.finishes]
        grown = lambda: all(  # noqa: E731
            ended or len(text) > len(old) for text, old, ended in zip(read.texts, before, over, strict=True)
        )
        wait_until(grown, "every stream goes on")
        assert read.wait() == expected
    wait_until(lambda: running.health()["missing"] == [], "all ranks are back")
    assert [whole(running, ask) for ask in ASKS[:4]] == expected[:4]
