"""The log: its lines, and what it says of real deployments."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.log import LogLines, OomKills
from tests.serving import Command, command, deployment, wait_until


def record(text: str, error: BaseException | None = None, **about: Any) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("paceline.rank", logging.WARNING, "file", 1, text, (), info)
    vars(made).update(about)
    return made


def raised(text: str) -> ZeroDivisionError:
    try:
        raise ZeroDivisionError(text)
    except ZeroDivisionError as error:
        return error


def test_a_line_has_date_zone_level_process_and_text() -> None:
    when, level, rest = LogLines(False, "rank 3").format(record("it is so")).split(maxsplit=2)
    assert datetime.datetime.fromisoformat(when).tzinfo is not None
    assert (level, rest) == ("WARNING", "rank 3: it is so")


def test_an_object_has_the_rank_that_it_is_about_or_comes_from() -> None:
    said = json.loads(LogLines(True, "rank 3").format(record("a\nb")))
    assert said["rank"] == 3
    assert (said["level"], said["process"], said["message"]) == ("warning", "rank 3", "a\nb")
    assert json.loads(LogLines(True, "coordinator").format(record("a", rank=2)))["rank"] == 2
    assert "rank" not in json.loads(LogLines(True, "coordinator").format(record("a", rank=None)))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_comes_once_a_kind(as_json: bool) -> None:
    lines = LogLines(as_json, "rank 3")
    first, second = lines.format(record("a", raised("one"))), lines.format(record("b", raised("two")))
    assert "ZeroDivisionError: one" in first
    assert "Traceback" not in second
    assert "b" in second
    theirs = [lines.format(record("c", trace="Traceback of another process")) for _ in range(2)]
    assert ["of another process" in line for line in theirs] == [True, False]
    other = ValueError("another kind")
    assert "ValueError" in lines.format(record("d", other))


def test_the_kernels_counters_are_added_up(tmp_path: Path) -> None:
    machine, group = tmp_path / "vmstat", tmp_path / "memory.events"
    machine.write_text("pgfault 5\noom_kill 7\n")
    kills = OomKills((str(machine), str(group), str(tmp_path / "none")))
    assert not kills.rose()
    group.write_text("oom 3\noom_kill 1\noom_group_kill 0\n")
    assert kills.rose()
    assert not kills.rose()


# Real deployments -----------------------------------------------------------------------------------


def complete(running: Command, tokens: int = 3, **more: Any) -> int:
    body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    return int(running.http.post("/v1/completions", json=body, **more).status_code)


def faulty(folder: Path, *more: str) -> list[str]:
    engine = ["--engine", "tests.faulty_engines:Faulty", "--engine-option", f"folder={folder}"]
    return [*engine, "-dp", "2", "--bind", "arrival", "--routing", "round-robin", *more]


@pytest.mark.slow
def test_json_has_an_object_for_everything_that_happens() -> None:
    with deployment(
        "--engine", "timed", "--engine-option", "step_ms=20", "--log-format", "json", "-dp", "2"
    ) as running:
        running.http.post("/pause", headers={"User-Agent": "a wrench"})
        running.http.post("/resume")
        with command("scale", "3", "--url", running.url) as scaled:
            assert scaled.wait_end() == 0
        os.kill(running.pid_of("rank 1"), signal.SIGKILL)
        running.wait_line("rank 1 is back")
        os.kill(running.pid_of("coordinator"), signal.SIGKILL)
        running.wait_line("coordinator is back")
        running.wait_line("another coordinator is there")
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0
        said = [json.loads(line) for line in running.lines]
    assert all({"time", "level", "process", "pid", "message"} <= one.keys() for one in said)
    texts = [one["message"] for one in said]
    wanted = ["pause: asked by 127.0.0.1:", "resume: asked", "scale_elastic_ep: asked", "there are 3 ranks",
              "rank 1 is lost", "rank 1 ended (killed by SIGKILL", "rank 1 is back", "coordinator ended",
              "coordinator is back", "draining", "drained"]  # fmt: skip
    assert [text for text in wanted if not any(text in one for one in texts)] == []
    assert any("(a wrench)" in text for text in texts)
    assert any(", process " in text and "paceline/" in text for text in texts if "scale" in text)
    assert {one.get("rank") for one in said if "rank 1" in one["message"]} - {None} == {1}
    assert not [text for text in texts if "refused" in text]


@pytest.mark.slow
def test_requests_that_move_and_overload_are_told_of() -> None:
    arguments = ["--engine", "timed", "--engine-option", "step_ms=20", "--max-num-seqs", "1", "--max-waiting", "1"]
    with deployment(*arguments, "-dp", "2") as running:
        ask: dict[str, Any] = {"model": "timed", "prompt": "a", "max_tokens": 150, "stream": True}
        ask["extra_body"] = {"ignore_eos": True}
        streams = [running.openai.completions.create(**ask) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        os.kill(running.pid_of("rank 0"), signal.SIGKILL)
        running.wait_line("requests that had lost rank 0 go on at others: 1")
        running.wait_line("rank 0 is back")
        for stream in streams:
            list(stream)
        wait_until(lambda: len(running.health()["ready"]) == 2, "both ranks")
        held = [running.openai.completions.create(**ask) for _ in range(2)]
        for stream in held:
            next(iter(stream))
        wait_until(lambda: 429 in _statuses(running, 3), "a refusal")
        running.wait_line("overload: requests are refused (1 requests are waiting already)")
        assert "requests refused: " in running.wait_line("overload: over after")
        assert running.output.count("overload: requests are refused") == 1
        for stream in held:
            stream.close()


def _statuses(running: Command, count: int) -> set[int]:
    """What comes of so many requests at once."""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return set(pool.map(lambda _: complete(running, 5), range(count)))


@pytest.mark.slow
def test_a_defect_of_an_engine_has_its_traceback_once(tmp_path: Path) -> None:
    with deployment(*faulty(tmp_path, "--max-rank-losses", "1")) as running:
        (tmp_path / "fail-1").touch()
        for life in range(3):
            wait_until(lambda: len(running.health()["ready"]) == 2, "both ranks")
            while running.output.count("rank 1 ended (internal error: ZeroDivisionError") == life:
                complete(running)
        assert running.output.count("Traceback") == 1
        assert 'raise ZeroDivisionError("one by nought")' in running.output


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[tuple[str, ...]]:
    """What runs a command in a control group with little memory; skips where we may not make one."""
    parent = Path("/sys/fs/cgroup/memory")
    group = (parent if parent.is_dir() else parent.parent) / f"paceline-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if parent.is_dir() else "memory.max")
        limit.write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory groups here: {error}")
    try:
        yield "sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the end of all in the group")
        group.rmdir()


@pytest.mark.slow
def test_who_was_killed_for_want_of_memory_is_said_to_be(tmp_path: Path) -> None:
    with memory_group(700 << 20) as prefix, deployment(*faulty(tmp_path), prefix=prefix) as running:
        (tmp_path / "eat-1").touch()
        with contextlib.suppress(Exception):
            while "rank 1 ended" not in running.output:
                complete(running, timeout=30)
        line = running.wait_line("rank 1 ended (killed by SIGKILL")
        assert "it may be by the kernel for want of memory" in line
        (tmp_path / "eat-1").unlink()
        running.wait_line("rank 1 is back")
        os.kill(running.pid_of("rank 0"), signal.SIGKILL)
        assert "the kernel" not in running.wait_line("rank 0 ended (killed by SIGKILL")
