"""Ranks and front-ends written from docs/PROTOCOL.md alone work with ours, as real processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import zmq

from paceline.core import codec
from paceline.core.messages import Members
from paceline.net.rank import RankSettings, run_rank
from paceline.process.spawn import spawn, stop
from paceline.process.supervisor import Ready
from paceline.settings import DeploymentConfig, EngineConfig, ParallelConfig
from tests.pace import stretched

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DEADLINE_S = 60.0

Start = Callable[..., "subprocess.Popen[str]"]


class Addresses:
    """Where the processes of one test meet."""

    def __init__(self, folder: Path) -> None:
        self.front_publish = f"ipc://{folder}/f"
        self.back_output = f"ipc://{folder}/o"
        self.back_publish = f"ipc://{folder}/b"
        self.rank = f"ipc://{folder}/r"


@pytest.fixture
def addresses(tmp_path: Path) -> Addresses:
    return Addresses(tmp_path)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes of this interpreter; what still runs at the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def start_coordinator(start: Start, addresses: Addresses, *arguments: str) -> subprocess.Popen[str]:
    process = start(
        "-m", "paceline", "coordinator", "-dp", "1", *arguments,
        "--front-publish-address", addresses.front_publish,
        "--back-output-address", addresses.back_output,
        "--back-publish-address", addresses.back_publish,
    )  # fmt: skip
    assert process.stdout is not None
    printed = [process.stdout.readline().split() for _ in range(3)]
    assert printed == [
        ["front-publish", addresses.front_publish],
        ["back-output", addresses.back_output],
        ["back-publish", addresses.back_publish],
    ]
    return process


def start_rank(start: Start, addresses: Addresses, *arguments: str) -> subprocess.Popen[str]:
    """The foreign rank. Front-ends wait for it by themselves."""
    return start(
        str(EXAMPLES / "foreign_rank.py"), "--back-output", addresses.back_output,
        "--back-publish", addresses.back_publish, "--bind", addresses.rank, *arguments,
    )  # fmt: skip


def run_frontend(start: Start, addresses: Addresses, *arguments: str) -> tuple[int, str]:
    """The foreign front-end, to its end: exit status and what it printed."""
    process = start(
        str(EXAMPLES / "foreign_frontend.py"), "--front-publish", addresses.front_publish, *arguments
    )  # fmt: skip
    printed, _ = process.communicate(timeout=stretched(DEADLINE_S))
    return process.returncode, printed


def wait_members(addresses: Addresses, wanted: list[int]) -> Members:
    """Subscribe as a front-end does, until the coordinator names just these ranks as members."""
    with zmq.Context() as context, context.socket(zmq.XSUB) as socket:
        socket.connect(addresses.front_publish)
        socket.send(b"\x01")
        socket.send(b"\x01" + codec.frontend_topic(1))
        while socket.poll(stretched(DEADLINE_S) * 1000):
            message = codec.to_frontend().decode(socket.recv())
            if isinstance(message, Members) and [member.rank for member in message.members] == wanted:
                return message
    raise AssertionError(f"the coordinator never named {wanted} as members")


def test_foreign_rank_and_foreign_frontend(start: Start, addresses: Addresses) -> None:
    start_coordinator(start, addresses, "--no-wave-coordination")
    rank = start_rank(start, addresses)
    status, printed = run_frontend(start, addresses, "--prompt", "3,1,4,1,5")
    assert printed.splitlines() == [
        "rank 0 answered: 3 1 4 1 5 (stop)",
        "aborted the second request; rank 0 took in 2 and has none left",
    ]
    assert status == 0
    status, printed = run_frontend(start, addresses, "--prompt", "3,1,4,1,5", "--max-tokens", "2")
    assert "rank 0 answered: 3 1 (length)" in printed.splitlines()
    rank.terminate()
    assert rank.wait(stretched(DEADLINE_S)) == 0
    [(number, _)] = wait_members(addresses, []).ended
    assert number == 0


def test_foreign_rank_outlives_its_coordinator(start: Start, addresses: Addresses) -> None:
    coordinator = start_coordinator(start, addresses, "--no-wave-coordination")
    start_rank(start, addresses)
    before = wait_members(addresses, [0])
    coordinator.kill()
    coordinator.wait(stretched(DEADLINE_S))
    start_coordinator(start, addresses, "--no-wave-coordination")
    status, printed = run_frontend(start, addresses, "--timeout", "30")
    assert (status, printed.count("\n")) == (0, 2), printed
    after = wait_members(addresses, [0])
    assert after.members == before.members
    assert after.coordinator != before.coordinator


def test_restarted_foreign_rank_is_a_new_incarnation(start: Start, addresses: Addresses) -> None:
    start_coordinator(start, addresses, "--no-wave-coordination")
    incarnations = []
    for _ in range(2):
        rank = start_rank(start, addresses)
        incarnations.append(wait_members(addresses, [0]).members[0].incarnation)
        rank.terminate()
        rank.wait(stretched(DEADLINE_S))
        wait_members(addresses, [])
    assert incarnations[0] != incarnations[1]


def test_foreign_frontend_with_our_rank(start: Start, addresses: Addresses) -> None:
    start_coordinator(start, addresses, "--no-wave-coordination")
    engine = EngineConfig(engine="timed", options={"step_ms": "2", "prefill_ms": "0"})
    about = (0, addresses.rank, addresses.back_publish, addresses.back_output)
    settings = RankSettings(DeploymentConfig(ParallelConfig(data_parallel_size=1), engine), *about)
    reader, writer = get_context("spawn").Pipe(duplex=False)
    process = spawn("rank 0", run_rank, {"settings": settings, "status": writer})
    writer.close()
    try:
        while reader.poll(stretched(DEADLINE_S)) and not isinstance(reader.recv(), Ready):
            pass
        status, printed = run_frontend(start, addresses, "--max-tokens", "4", "--timeout", "30")
    finally:
        stop([process])
        reader.close()
    assert printed.splitlines() == [
        "rank 0 answered: 0 1 2 3 (length)",
        "aborted the second request; rank 0 took in 2 and has none left",
    ]
    assert status == 0


def test_deadlines_say_what_is_missing(start: Start, addresses: Addresses) -> None:
    rank = start_rank(start, addresses, "--timeout", "0.3")
    status, printed = run_frontend(start, addresses, "--timeout", "0.3")
    assert (status, printed) == (1, "foreign front-end: a ready rank has not come within 0.3 s\n")
    printed, _ = rank.communicate(timeout=stretched(DEADLINE_S))
    assert (rank.returncode, printed) == (1, "foreign rank 0: no coordinator has admitted it within 0.3 s\n")


@pytest.mark.parametrize("name", ["foreign_rank.py", "foreign_frontend.py"])
def test_foreign_examples_are_foreign_and_short(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert "import paceline" not in text
    assert "from paceline" not in text
    assert len(text.splitlines()) <= 150
