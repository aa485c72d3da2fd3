"""What a node's processes need from the system goes away for a while; signals to all of them; two at one port."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.pace import stretched
from tests.serving import Command, Deployment, command, deployment, process_name, wait_until

pytestmark = pytest.mark.slow

TIMED = ["--engine", "timed"]


def _serves(running: Deployment, rank: int | None = None) -> bool:
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    body = {"prompt": "a", "max_tokens": 3}
    try:
        return bool(running.http.post("/v1/completions", json=body, headers=headers).status_code == 200)
    except httpx2.TransportError:
        return False  # its front-end is not back yet


def _kill(running: Deployment, name: str) -> None:
    """Kill a child; returns when its next life runs."""
    before = running.pid_of(name)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: any(process_name(pid) == f"pl:{name}" for pid in running.children() if pid != before), name)


def test_where_the_folder_of_its_start_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with deployment(*TIMED) as running:
        shutil.rmtree(folder)
        for name in ("rank 1", "coordinator", "front-end 0"):
            _kill(running, name)
        wait_until(lambda: _serves(running, 1), "rank 1 again")
        assert running.http.post("/scale_elastic_ep", json={"new_data_parallel_size": 3}).status_code == 200


def test_without_a_descriptor_it_waits_and_goes_on() -> None:
    with deployment(*TIMED) as running:
        pid = running.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        most = max(int(number) for number in os.listdir(f"/proc/{pid}/fd")) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
        victims = [running.pid_of(name) for name in ("rank 1", "coordinator")]
        with ThreadPoolExecutor() as pool:
            scaling = pool.submit(running.http.post, "/scale_elastic_ep", json={"new_data_parallel_size": 3},
                                  timeout=stretched(60))  # fmt: skip
            running.wait_line("rank 2 cannot be started: ")
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            running.wait_line("rank 1 cannot be started: ")
            running.wait_line("oordinator cannot be started: ")
            assert _serves(running, 0)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            assert scaling.result().status_code == 200
        wait_until(lambda: _serves(running, 1) and _serves(running, 2), "all three ranks")


@pytest.mark.parametrize("engine", ["timed", "timed-lockstep"])
def test_socket_folders_that_a_cleaner_removes_are_made_again(tmp_path: Path, engine: str) -> None:
    with deployment("--engine", engine, variables={"TMPDIR": str(tmp_path)}) as running:
        folders = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
        sockets = {path for folder in folders for path in folder.iterdir() if path.is_socket()}
        assert sockets
        for folder in folders:
            shutil.rmtree(folder)
        wait_until(lambda: all(path.exists() for path in sockets if "group" not in path.name), "the sockets")
        assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
        assert _serves(running)
        for name in ("rank 1", "front-end 0", "coordinator"):
            _kill(running, name)
        wait_until(lambda: _serves(running, 0) and _serves(running, 1), "both ranks", 60)


def _events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def _stream(running: Deployment, begun: threading.Event) -> str:
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    with running.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            begun.set()
    return "\n".join(lines)


# SIGTERM to the main process alone: test_lifecycle.py.
@pytest.mark.parametrize(
    ("number", "everywhere", "engine"),
    [
        (signal.SIGTERM, True, "timed-lockstep"),
        (signal.SIGHUP, True, "timed"),
        (signal.SIGHUP, False, "timed-lockstep"),
        (signal.SIGINT, True, "timed-lockstep"),
        (signal.SIGINT, False, "timed"),
    ],
)
def test_a_signal_to_all_drains_as_one_to_the_main_process_does(number: int, everywhere: bool, engine: str) -> None:
    with deployment("--engine", engine, "-asc", "2") as running, ThreadPoolExecutor() as pool:
        begun = [threading.Event() for _ in range(4)]
        answers = [pool.submit(_stream, running, event) for event in begun]
        assert all(event.wait(stretched(30)) for event in begun)
        if everywhere:
            os.killpg(running.process.pid, number)
        else:
            running.signal(number)
        for answer in answers:
            *events, done = _events(answer.result())
            assert done == "[DONE]"
            # A front-end that is behind puts tokens together: the text counts.
            texts = (json.loads(event)["choices"][0]["text"] for event in events)
            assert "".join(texts) == "".join(f" {number}" for number in range(100))
        assert running.wait_end() == 0
        assert "internal error" not in running.output


def _end_of_one(*both: Command) -> None:
    wait_until(lambda: any(one.process.poll() is not None for one in both), "the end of one", 60)


def test_of_two_that_start_at_once_on_one_port_the_second_ends() -> None:
    with deployment(*TIMED) as running:
        port = running.url.rpartition(":")[2]
    for _ in range(2):
        with command("serve", "--port", port, *TIMED) as one, command("serve", "--port", port, *TIMED) as other:
            _end_of_one(one, other)
            ended, serves = (one, other) if one.process.poll() is not None else (other, one)
            assert ended.wait_end() == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ended.output
            serves.wait_line("serves on http")
