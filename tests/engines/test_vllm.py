"""What of the vllm engine needs no vLLM: its ranks' environment, their cores and devices, what it has left behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.registry import find_engine
from paceline.engines.vllm import VllmEngine, byte_alphabet
from paceline.engines.vllm_flags import About
from paceline.engines.vllm_process import cores, environment, meeting_place, remove_when_ended
from tests.net.groups import Threads, group_path
from tests.serving import wait_until

GPU = About(
    model="m", tokenizer="m", max_model_len=128, vocabulary_size=512, max_num_seqs=8, max_num_batched_tokens=64,
    experts=False, device_kind="cuda", device_variable="CUDA_VISIBLE_DEVICES", visible=["0", "1", "5", "7"], devices=2,
)  # fmt: skip


def settings(about: About, place: int = 0, places: int = 1, dp_size: int = 2) -> EngineSettings:
    learned = msgspec.to_builtins(about)
    return EngineSettings(rank=place, place=place, places=places, dp_size=dp_size, learned=learned)


def test_it_has_a_name() -> None:
    assert find_engine("vllm") is VllmEngine


def test_a_rank_gets_the_devices_behind_those_before_it() -> None:
    found = [environment(settings(GPU, place, 2), GPU, False)["CUDA_VISIBLE_DEVICES"] for place in range(2)]
    assert found == ["0,1", "5,7"]


def test_too_few_devices_are_said() -> None:
    with pytest.raises(EngineError, match="rank 2: wants 2 devices, CUDA_VISIBLE_DEVICES has 0 left"):
        environment(settings(GPU, 2, 3), GPU, False)


@pytest.mark.parametrize(
    ("allowed", "places", "workers", "expected"),
    [
        (range(2), 2, 1, [[[0]], [[1]]]),
        (range(8), 2, 1, [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]),
        (range(8), 2, 2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        ([3, 5], 3, 1, [[[3]], [[5]], [[3]]]),
        (range(2), 1, 3, [[[0], [1], [0]]]),
    ],
)
def test_each_rank_has_cores(allowed: list[int], places: int, workers: int, expected: list[list[list[int]]]) -> None:
    assert [cores(allowed, place, places, workers) for place in range(places)] == expected


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    about = msgspec.structs.replace(GPU, device_kind="cpu", visible=[], devices=1)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = environment(settings(about), about, False)
    assert (found["VLLM_CPU_OMP_THREADS_BIND"], found["OMP_NUM_THREADS"]) == ("0-3", "4")


def test_experts_of_several_ranks_step_together() -> None:
    moe = msgspec.structs.replace(GPU, experts=True)
    assert VllmEngine.steps_together(settings(moe))
    assert not VllmEngine.steps_together(settings(moe, dp_size=1))
    assert not VllmEngine.steps_together(settings(GPU))


@pytest.mark.parametrize("host", ["127.0.0.3", "::1"])
def test_a_group_meets_where_its_first_member_runs(tmp_path: Path, host: str) -> None:
    """Which need not be the node that serves."""
    threads = Threads([group_path(tmp_path, rank) for rank in range(3)])
    met = threads.each(lambda rank: meeting_place(threads.groups[rank], host if rank == 0 else "127.0.0.1"))
    threads.close()
    assert len(set(met)) == 1
    assert met[0][0] == host
    assert met[0][1] > 0


def test_the_alphabet_of_bytes() -> None:
    found = byte_alphabet()
    assert sorted(found.values()) == list(range(256))
    assert (found["a"], found["Ġ"], found["Ċ"]) == (97, 32, 10)


@pytest.mark.slow
def test_without_vllm_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-m", "paceline", "serve", "m", "--engine", "vllm", "--port", "0"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'paceline[vllm]'" in done.stderr.splitlines()[-1]


def leaves(paths: list[str], ready: Connection) -> None:
    remove_when_ended(paths)
    ready.send(True)
    ready.recv()


def test_what_a_killed_rank_has_shared_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / "vllm_dist-tp:0-[0-1]-cpushm_0", tmp_path / "with a space"]
    for path in left:
        path.touch()
    (tmp_path / "another's").touch()
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=leaves, args=([str(path) for path in left], there), daemon=True)
    process.start()
    assert here.recv()
    assert all(path.exists() for path in left)
    process.kill()
    wait_until(lambda: not any(path.exists() for path in left), "the files are removed")
    assert os.listdir(tmp_path) == ["another's"]
    process.join()
    process.close()
    here.close()
    there.close()
