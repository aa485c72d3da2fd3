"""Slow is not dead: who works is not evicted, and who does not read costs a set amount of memory."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jumping_clock import JumpingClock
from tests.pace import stretched
from tests.raw_stream import RawStream, expected
from tests.serving import Command, command, deployment, memory_mb, wait_until

pytestmark = pytest.mark.slow

HEARTBEAT_S = stretched(1.0, most=4.0)
STALL_S = 2 * HEARTBEAT_S
LONG_S = 4 * HEARTBEAT_S
"""Longer than every time-out that the tests leave in force; the longest is a rank's heartbeat."""


def lives(running: Command) -> dict[int, str]:
    """The processes of a deployment: another life is another number."""
    return {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in running.children()}


def ranks(running: Command) -> list[dict[str, int]]:
    return list(running.http.get("/loads").json()["ranks"])


@contextmanager
def nobody_evicted(running: Command, killed: str = "nobody") -> Iterator[None]:
    """The processes are the same ones after it, but for one that the test kills, and no request has gone elsewhere."""
    before = {pid: name for pid, name in lives(running).items() if killed not in name}
    yield
    wait_until(lambda: running.health()["missing"] == [], "all ranks are there")
    assert before.items() <= lives(running).items()
    assert running.health()["moved"] == 0
    assert "Traceback" not in running.output


class Memory(threading.Thread):
    """The most memory that some processes have had since it was started, above what they had then, in MiB."""

    def __init__(self, running: Command, *names: str) -> None:
        super().__init__(daemon=True)
        self._pids = {name: running.pid_of(name) for name in names}
        self._before = {name: memory_mb(pid) for name, pid in self._pids.items()}
        self._over = threading.Event()
        self.grown = dict.fromkeys(names, 0.0)
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.2):
            for name, pid in self._pids.items():
                try:
                    self.grown[name] = max(self.grown[name], memory_mb(pid) - self._before[name])
                except (OSError, ValueError):
                    return  # It has ended: its test has failed, and says so itself.

    def most(self) -> float:
        """Of the one that grew most; prints all."""
        self._over.set()
        self.join()
        print("memory grew by, MiB:", {name: round(grown, 1) for name, grown in self.grown.items()})
        return max(self.grown.values())


# A rank in a long step ----------------------------------------------------------------------------

LONG_STEP = (
    "--engine-option", "step_ms=10", "--engine-option", f"prefill_ms={LONG_S}", "--max-num-batched-tokens", "2048",
    "--rank-timeout", str(HEARTBEAT_S), "--stall-timeout", str(4 * LONG_S), "--prefill-quota", "off", "-dp", "3",
)  # fmt: skip


@pytest.mark.parametrize("engine", ["timed", "timed-lockstep"])
def test_a_rank_in_a_long_step(engine: str) -> None:
    """And a coordinator that comes back in the middle of it. In lockstep the others wait for it, and are not dead."""
    with deployment("--engine", engine, *LONG_STEP) as running:
        others = [RawStream(running.url, 300, rank=rank) for rank in (0, 0, 2)]
        with nobody_evicted(running, "coordinator"):
            slow = RawStream(running.url, 20, rank=1, prompt="a" * 1000)
            wait_until(lambda: ranks(running)[1]["prefill_tokens"] == 1000, "the step has begun")
            begin = time.monotonic()
            old = running.health()["coordinator"]
            os.kill(running.pid_of("coordinator"), signal.SIGKILL)
            wait_until(lambda: running.health()["coordinator"] != old, "another coordinator")
            wait_until(lambda: running.health()["missing"] == [], "it knows the rank that is in its step")
            assert time.monotonic() - begin < LONG_S - HEARTBEAT_S
            assert slow.text() == expected(20)
            assert [other.text() for other in others] == [expected(300)] * 3
        gap_s = max(other.longest_gap_s for other in others)
        print(f"{engine}: longest gap of the other ranks' streams {gap_s:.2f} s, in a step of {LONG_S:g} s")
        assert engine == "timed-lockstep" or gap_s < LONG_S / 2


# Who does not read --------------------------------------------------------------------------------


def test_a_frontend_that_stopped_reading() -> None:
    """What it missed is kept for it, put together; the streams of the other one go on."""
    tokens, quick = 6000, ("--engine-option", "step_ms=2", "--engine-option", "decode_ms=0")
    with deployment(
        "--engine", "timed", *quick, "-dp", "2", "-asc", "2", "--rank-timeout", str(HEARTBEAT_S)
    ) as running:
        streams = [RawStream(running.url, tokens) for _ in range(8)]
        wait_until(lambda: all(stream.bytes > 1000 for stream in streams), "all have begun")
        memory = Memory(running, "coordinator", "rank 0", "rank 1")
        stopped = running.pid_of("front-end 0")
        os.kill(stopped, signal.SIGSTOP)
        running.wait_line("does not read: what it gets is kept for it", 60.0)
        silent = {stream for stream in streams if time.monotonic() - stream.last > 1.0}
        assert 0 < len(silent) < len(streams)
        # Its share of the work goes on meanwhile.
        wait_until(lambda: all(not stream.is_alive() for stream in streams if stream not in silent), "the others end")
        os.kill(stopped, signal.SIGCONT)
        assert [stream.text() for stream in streams] == [expected(tokens)] * len(streams)
        assert memory.most() < 32
        others = [stream.longest_gap_s for stream in streams if stream not in silent]
        print(f"longest gap of the other front-end's streams {max(others):.2f} s")
        assert max(others) < stretched(1.0)
        wait_until(lambda: sum(rank["running"] for rank in ranks(running)) == 0, "nobody works for nobody")
        assert running.pid_of("front-end 0") == stopped


def test_a_coordinator_that_hangs() -> None:
    """Streams go on, and requests are bound without it; when it goes on, so does everything else."""
    with deployment("--engine", "timed", "--engine-option", "step_ms=10", "-dp", "2", "-asc", "2") as running:
        with nobody_evicted(running):
            streams = [RawStream(running.url, 800) for _ in range(6)]
            wait_until(lambda: all(stream.bytes > 1000 for stream in streams), "all have begun")
            memory = Memory(running, "front-end 0", "front-end 1", "rank 0", "rank 1")
            stopped = running.pid_of("coordinator")
            os.kill(stopped, signal.SIGSTOP)
            begin, waits = time.monotonic(), []
            while time.monotonic() < begin + LONG_S:
                asked = time.monotonic()
                assert RawStream(running.url, 20).text() == expected(20)
                waits.append(time.monotonic() - asked - 0.2)
            os.kill(stopped, signal.SIGCONT)
            assert [stream.text() for stream in streams] == [expected(800)] * 6
        assert memory.most() < 16
        print(f"longest gap {max(stream.longest_gap_s for stream in streams):.2f} s; requests meanwhile: {len(waits)}, "
              f"of which the slowest took {max(waits):.2f} s longer")  # fmt: skip
        assert max(waits) < stretched(3.0)


def test_clients_that_do_not_read() -> None:
    """Each costs the bound of what is kept for it, and is given up; a stream that is read goes on meanwhile."""
    unread, kept_mib = 4, 4
    quick = ("--engine-option", "step_ms=0.2", "--engine-option", "decode_ms=0", "--max-model-len", "200000")
    with deployment("--engine", "timed", *quick, "-dp", "2") as running:
        memory = Memory(running, "front-end 0", "rank 0", "rank 1")
        # All are computed at once, in as few steps. On a busy machine an event brings several tokens, so that a
        # token is a few bytes: there are enough of them to be more than is kept and what the kernel takes, even so.
        sleepers = [RawStream(running.url, 100_000, reads=False, rank=1, choices=4) for _ in range(unread)]
        reader = RawStream(running.url, 2000, rank=0)
        assert reader.text() == expected(2000)
        given_up = "does not read its answer: given up"
        wait_until(lambda: running.output.count(given_up) == unread, "all are given up", 90.0)
        wait_until(lambda: sum(rank["running"] for rank in ranks(running)) == 0, "their requests are aborted")
        assert memory.most() < unread * kept_mib * 3 + 16
        for sleeper in sleepers:
            sleeper.close()


# A full disk --------------------------------------------------------------------------------------


def test_a_full_disk_for_logs() -> None:
    """`paceline serve >/dev/full 2>&1`: it serves, starts a killed rank again, drains and ends in good order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full, command("serve", "--engine", "timed", "--port", str(port), to=full) as running:
        running.open(f"http://127.0.0.1:{port}")
        wait_until(lambda: answers(running), "it serves", 60.0)
        victim = running.pid_of("rank 1")
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: running.health()["missing"] == [1], "it is missed")
        wait_until(lambda: running.health()["missing"] == [], "it is back")
        assert RawStream(running.url, 20, rank=1).text() == expected(20)
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0


def answers(running: Command) -> bool:
    try:
        return bool(running.http.get("/health").status_code == 200)
    except Exception:
        return False


# A clock that jumps -------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [False, True], ids=["in-Python", "in-the-C-library"])
def test_a_clock_that_jumps_an_hour(below: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forth and back under streams, with every time-out short."""
    clock = JumpingClock(tmp_path, monkeypatch, below=below)
    flags = ("--engine-option", "step_ms=10", "--rank-timeout", str(HEARTBEAT_S), "--stall-timeout", str(STALL_S))
    with deployment("--engine", "timed-lockstep", *flags, "-dp", "3", "-asc", "2") as running:
        with nobody_evicted(running):
            streams = [RawStream(running.url, 600) for _ in range(6)]
            wait_until(lambda: all(stream.bytes > 1000 for stream in streams), "all have begun")
            for jump_s in (3600, -3600, 0):
                clock.jump(jump_s)
                ask = {"prompt": "a", "max_tokens": 1}
                shown = running.http.post("/v1/completions", json=ask).json()["created"]
                assert abs(shown - time.time() - jump_s) < 60, "the clock has jumped"
            assert [stream.text() for stream in streams] == [expected(600)] * 6
        print(f"longest gap {max(stream.longest_gap_s for stream in streams):.2f} s")
        assert max(stream.longest_gap_s for stream in streams) < stretched(1.0)
        # Who dies after a jump is back as soon as ever.
        clock.jump(-3600)
        begin = time.monotonic()
        os.kill(running.pid_of("rank 1"), signal.SIGKILL)
        running.wait_line("rank 1 is back", 30.0)
        wait_until(lambda: running.health()["missing"] == [], "all ranks are there")
        print(f"a killed rank is back after {time.monotonic() - begin:.2f} s")
