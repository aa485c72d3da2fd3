"""What only the group of torch.distributed does: leaves operations behind, and frees them later."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.engines.group import GenerationEnded
from paceline.errors import StartupError
from paceline.runtime.group_link import GroupListener, group_path
from tests.runtime.groups import Threads
from tests.serving import wait_until

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
pytestmark = pytest.mark.slow


def test_generations_that_end_blocked_leave_nothing_behind(tmp_path: Path) -> None:
    from paceline.runtime.torch_group import sweep

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    members = Threads("torch", [group_path(tmp_path, rank) for rank in range(3)])
    members.each(lambda rank: members.groups[rank].barrier())
    begin = held()
    for generation in range(2, 6):
        # Two are blocked, the third leaves: their operation ends when it closes its process group.
        futures = [members.pool.submit(members.groups[rank].barrier) for rank in (0, 1)]
        wait_until(lambda: members.groups[0].waiting() and members.groups[1].waiting(), "both are blocked")
        members.groups[2].leave()
        for future in futures:
            with pytest.raises(GenerationEnded):
                future.result(10)
        for group in members.groups:
            group.close()
        members.form(generation)
        assert members.each(lambda rank: members.groups[rank].all_reduce([rank], "sum")) == [[3]] * 3

    del futures, future

    def freed() -> bool:
        gc.collect()
        sweep()
        return all(now <= then for now, then in zip(held(), begin, strict=True))

    wait_until(freed, "what was left behind is freed")
    members.close()


def test_slow_member_is_waited_for_longer_than_the_forming_may_take(tmp_path: Path) -> None:
    members = Threads("torch", [group_path(tmp_path, rank) for rank in range(2)], timeout_s=4.0)
    blocked = members.pool.submit(members.groups[0].all_reduce, [1], "sum")
    wait_until(lambda: (said := members.groups[0].waiting()) and said.seconds > 4.5, "it waits for more than 4 s")
    assert members.groups[1].all_reduce([2], "sum") == [3]
    assert blocked.result(10) == [3]
    members.close()


def test_backend_is_checked_before_anybody_waits(tmp_path: Path) -> None:
    from paceline.runtime.torch_link import form_torch_group

    listener = GroupListener(group_path(tmp_path, 0))
    addresses = {0: listener.address, 1: group_path(tmp_path, 1)}
    with pytest.raises(StartupError, match="no group backend mpi"):
        form_torch_group(listener, 1, 0, addresses, 60.0, "mpi")
    if not torch.cuda.is_available():
        with pytest.raises(StartupError, match="nccl needs a GPU"):
            form_torch_group(listener, 1, 0, addresses, 60.0, "nccl")
    listener.close()


def test_torch_is_loaded_for_nothing_else() -> None:
    program = "import sys, paceline.runtime.group_link, paceline.runtime.rank_main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"
