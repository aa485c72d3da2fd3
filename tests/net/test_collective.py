"""Collectives among real processes and threads: their results, and their end within a second of a member's."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from paceline.engines.group import EpochEnded
from paceline.errors import StartupError
from paceline.net.collective import ARRAY, array_parts, read_array
from paceline.net.group import GREETING, MAGIC, GroupListener, form_group
from paceline.process.spawn import spawn
from tests.net.groups import Threads, group_path
from tests.pace import examples, stretched
from tests.serving import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(params=["ipc", "tcp"])
def four(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Threads]:
    tcp = request.param == "tcp"
    addresses = ["tcp://127.0.0.1:0" if tcp else group_path(tmp_path, rank) for rank in range(4)]
    members = Threads(addresses)
    yield members
    members.close()


def test_all_reduce(four: Threads) -> None:
    groups = four.groups
    assert four.each(lambda rank: groups[rank].all_reduce([rank, 10 - rank], "max")) == [[3, 10]] * 4
    assert four.each(lambda rank: groups[rank].all_reduce([rank, -1], "sum")) == [[6, -4]] * 4
    assert four.each(lambda rank: groups[rank].all_reduce([1, rank], "and")) == [[1, 0]] * 4
    each = ["max", "sum", "and"]
    assert four.each(lambda rank: groups[rank].all_reduce([rank, rank, rank], each)) == [[3, 6, 0]] * 4


def test_integers_that_are_too_large_to_be_summed_end_the_generation(tmp_path: Path) -> None:
    pair = Threads([group_path(tmp_path, rank) for rank in range(2)])
    try:
        for future in pair.start(lambda rank: pair.groups[rank].all_reduce([2**63 - 1], "sum")):
            assert isinstance(future.exception(10), EpochEnded)
    finally:
        pair.close()


def test_barrier_waits_for_the_last(four: Threads) -> None:
    release = threading.Event()
    passed: list[int] = []

    def run(rank: int) -> None:
        if rank == 2:
            release.wait(stretched(30))
        four.groups[rank].barrier()
        passed.append(rank)

    futures = four.start(run)
    assert not passed
    release.set()
    for future in futures:
        future.result(stretched(30))
    assert sorted(passed) == [0, 1, 2, 3]


def test_all_to_all_of_unequal_shapes_and_types(four: Threads) -> None:
    kinds = [np.float32, np.int64, np.uint8, np.float64]

    def arrays(rank: int) -> list[Any]:
        return [np.full((rank, to + 1), rank * 10 + to, kinds[rank]) for to in range(4)]

    received = four.each(lambda rank: four.groups[rank].all_to_all(arrays(rank)))
    for to, blocks in enumerate(received):
        for rank, block in enumerate(blocks):
            expected = arrays(rank)[to]
            assert block.dtype == expected.dtype
            assert np.array_equal(block, expected)
            assert block.flags.aligned


def test_all_to_all_of_more_than_the_sockets_hold(four: Threads) -> None:
    block = np.arange(4_000_000, dtype=np.uint8)
    received = four.each(lambda rank: four.groups[rank].all_to_all([block] * 4))
    assert all(np.array_equal(got, block) for blocks in received for got in blocks)


def test_one_member_alone(tmp_path: Path) -> None:
    alone = Threads([group_path(tmp_path, 0)])
    assert alone.groups[0].all_reduce([7], "sum") == [7]
    alone.groups[0].barrier()
    (block,) = alone.groups[0].all_to_all([np.ones(3)])
    assert block.sum() == 3
    alone.close()


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["max", "sum", "and", "all_to_all", "barrier"]), max_size=20), st.integers(0, 1000))
def test_any_sequence_of_collectives(four: Threads, calls: list[str], seed: int) -> None:
    def run(rank: int) -> list[Any]:
        results: list[Any] = []
        for number, call in enumerate(calls):
            group = four.groups[rank]
            if call == "barrier":
                group.barrier()
            elif call == "all_to_all":
                sent = [np.array([seed, number, rank, to]) for to in range(4)]
                results.append([block.tolist() for block in group.all_to_all(sent)])
            else:
                results.append(group.all_reduce([rank + seed, number], call))
        return results

    for rank, results in enumerate(four.each(run)):
        found = iter(results)
        for number, call in enumerate(calls):
            values = [other + seed for other in range(4)]
            if call == "all_to_all":
                assert next(found) == [[seed, number, other, rank] for other in range(4)]
            elif call != "barrier":
                reduce = {"max": max, "sum": sum, "and": lambda column: int(all(column))}[call]
                assert next(found) == [reduce(values), reduce([number] * 4)]


def test_leave_ends_it_for_all_wherever_they_wait(four: Threads) -> None:
    waiting = four.start(lambda rank: four.groups[rank].barrier() if rank != 1 else None)
    waiting[1].result(stretched(10))
    begin = time.monotonic()
    four.groups[1].leave()
    for rank in (0, 2, 3):
        with pytest.raises(EpochEnded):
            waiting[rank].result(stretched(10))
    assert time.monotonic() - begin < stretched(1.0)


def test_own_blocked_call_is_ended_by_leave_from_another_thread(four: Threads) -> None:
    blocked = four.pool.submit(four.groups[0].all_reduce, [1], "sum")
    four.groups[0].leave()
    four.groups[0].leave()
    with pytest.raises(EpochEnded, match="epoch 1"):
        blocked.result(stretched(10))
    with pytest.raises(EpochEnded):
        four.groups[0].barrier()


def test_next_epoch_of_the_same_ranks(four: Threads) -> None:
    for epoch in (2, 3, 4):
        for group in four.groups:
            group.close()
        four.form(epoch)
        assert four.each(lambda rank: four.groups[rank].all_reduce([rank], "sum")) == [[6]] * 4


def test_members_that_disagree_on_the_collective_are_told(four: Threads) -> None:
    def run(rank: int) -> None:
        if rank == 0:
            four.groups[rank].all_to_all([np.zeros(1)] * 4)
        else:
            four.groups[rank].barrier()

    for future in four.start(run):
        with pytest.raises(EpochEnded):
            future.result(stretched(10))


def test_member_that_does_not_come_is_named(tmp_path: Path) -> None:
    listener = GroupListener(group_path(tmp_path, 0))
    addresses = {rank: group_path(tmp_path, rank) for rank in range(3)}
    with pytest.raises(StartupError, match=r"epoch 9: rank 1, 2 did not come within 0\.3 s"):
        form_group(listener, 9, 0, addresses, 0.3)
    listener.close()


def test_strangers_who_say_nothing_hold_nobody_up(tmp_path: Path) -> None:
    addresses = [group_path(tmp_path, rank) for rank in range(3)]
    members = Threads(addresses)
    strangers = []
    try:
        for address in addresses * 20:
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(address.removeprefix("ipc://"))
            stranger.send(MAGIC)
            strangers.append(stranger)
        for group in members.groups:
            group.close()
        members.timeout_s = 10.0
        members.form(2)
        assert members.each(lambda rank: members.groups[rank].all_reduce([rank], "max")) == [[2]] * 3
    finally:
        for stranger in strangers:
            stranger.close()
        members.close()


def test_strangers_and_other_generations_do_not_become_members(tmp_path: Path) -> None:
    first, second = (GroupListener(group_path(tmp_path, rank)) for rank in range(2))
    addresses = {0: first.address, 1: second.address}
    strangers = []
    for payload in (b"GET / HTTP/1.1\r\n\r\n", GREETING.pack(MAGIC, 4, 1, 0), GREETING.pack(MAGIC, 5, 7, 0), b""):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.connect(first.address.removeprefix("ipc://"))
        stranger.sendall(payload)
        stranger.shutdown(socket.SHUT_WR)
        strangers.append(stranger)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(form_group, listener, 5, rank, addresses, 20.0)
                   for rank, listener in enumerate((first, second))]  # fmt: skip
        groups = [future.result(stretched(30)) for future in futures]
        assert pool.submit(groups[0].all_reduce, [1], "sum").result is not None
        assert groups[1].all_reduce([2], "sum") == [3]
    for closing in (*groups, *strangers, first, second):
        closing.close()


# Real processes ---------------------------------------------------------------------------------
def member(rank: int, addresses: dict[int, str], held: int | None, status: Connection) -> None:
    """A member's process: collectives without end, and the time at which they end. One may be held up for good."""
    group = form_group(GroupListener(addresses[rank]), 1, rank, addresses, 60.0)
    group.barrier()
    status.send("running")
    if rank == held:
        threading.Event().wait(100)
    try:
        while True:
            group.all_reduce([1, 2], "max")
            group.all_to_all([np.ones(1000)] * len(addresses))
    except EpochEnded as error:
        status.send((time.monotonic(), str(error)))


# Where one member is held up, the others wait for it and not for the one that dies.
@pytest.mark.parametrize(("victim", "held"), [(0, None), (3, None), (3, 1), (0, 2)])
def test_kill_of_a_member_is_known_to_all_within_a_second(tmp_path: Path, victim: int, held: int | None) -> None:
    addresses = {rank: group_path(tmp_path, rank) for rank in range(4)}
    pipes, processes = [], []
    for rank in addresses:
        reader, writer = get_context("spawn").Pipe(duplex=False)
        kwargs = {
            "rank": rank, "addresses": addresses, "held": held, "status": writer,
        }  # fmt: skip
        processes.append(spawn(f"member {rank}", member, kwargs))
        writer.close()
        pipes.append(reader)
    try:
        for pipe in pipes:
            assert pipe.poll(stretched(60))
            assert pipe.recv() == "running"
        killed_at = time.monotonic()
        os.kill(processes[victim].pid or 0, signal.SIGKILL)
        survivors = [rank for rank in addresses if rank not in (victim, held)]
        for rank in survivors:
            assert pipes[rank].poll(stretched(10))
            ended_at, text = pipes[rank].recv()
            assert "epoch 1 has ended" in text
            assert ended_at - killed_at < stretched(1.0)
        # They can end, also with an operation of theirs under way.
        wait_until(lambda: not any(processes[rank].is_alive() for rank in survivors), "the others have ended")
        assert [processes[rank].exitcode for rank in survivors] == [0] * len(survivors)
    finally:
        for process in processes:
            process.kill()
            process.join(stretched(10))
        for pipe in pipes:
            pipe.close()


@pytest.mark.parametrize("kind", ["<f4", ">i8", "|u1", "|b1", "<c8", "<U3", "|S5", "<M8[s]"])
def test_a_type_comes_back(kind: str) -> None:
    array = np.zeros((2, 3), np.dtype(kind))
    read = read_array(b"".join(bytes(part) for part in array_parts(array)))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)


# NumPy evaluates repeats and commas, and raises a SyntaxError where they are none.
@pytest.mark.parametrize("name", [b"(1,f4,f4", b"((f4,f4", b"f4,f4", b"O", b"|O8", b"\xff", b"<f4junk"])
def test_a_name_that_is_no_type_is_refused(name: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        read_array(ARRAY.pack(name, 0) + bytes(64))
