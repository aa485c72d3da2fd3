"""Long bodies are read in another process, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from paceline.core.requests import SamplingParams
from paceline.server.errors import ApiError, bad
from paceline.server.reading import TOKENS_AT_ONCE, ReadingProcess, packed
from paceline.server.requests import FAR_BYTES, Part
from paceline.settings import DeploymentConfig, EngineConfig
from tests.pace import Deadline, stretched
from tests.serving import Deployment, deployment, is_alive, process_name, wait_until


def parts(*prompts: list[int], copies: int = 1) -> list[Part]:
    return [Part(prompt, SamplingParams(max_tokens=1), "") for prompt in prompts for _ in range(copies)]


def test_what_was_read_comes_back_as_it_was() -> None:
    given = parts([1, 2], [], [2**31 - 1], copies=3)
    made = [part for some in pickle.loads(pickle.dumps(list(packed(given)))) for part in some]
    assert [list(part.prompt_token_ids) for part in made] == [part.prompt_token_ids for part in given]
    assert made[0].prompt_token_ids is made[2].prompt_token_ids, "choices of one prompt share it"


def test_no_more_comes_at_once_than_is_copied_in_a_moment() -> None:
    many = parts(*([7] * 20_000 for _ in range(30)))
    sizes = [sum(len(part.prompt_token_ids) for part in some) for some in packed(many)]
    assert sum(sizes) == 600_000
    assert max(sizes) <= TOKENS_AT_ONCE + 20_000
    assert len(list(packed(parts([7] * 20_000, copies=1024)))) == 1, "shared ids count once"


def test_an_error_crosses_processes_whole() -> None:
    for error in (bad("prompt", "is wrong"), ApiError(503, "no", kind="server_error", code="c", retry_after_s=4)):
        made = pickle.loads(pickle.dumps(error))
        assert (str(made), made.status, made.body, made.param, made.retry_after_s) == (
            str(error), error.status, error.body, error.param, error.retry_after_s,
        )  # fmt: skip


# Processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_that_nobody_needs_ends_and_comes_back(tmp_path: Path) -> None:
    config = DeploymentConfig(engine=EngineConfig(engine="timed"))
    arguments = {"config": config, "engine": config.engine_settings(), "folder": str(tmp_path)}

    def running() -> list[Any]:
        return [child for child in multiprocessing.active_children() if child.name == "reader 7"]

    async def gone() -> None:
        deadline = Deadline(30)
        while running() and not deadline.over():
            await asyncio.sleep(0)
        assert not running()

    async def main() -> None:
        reader = ReadingProcess(arguments, 7, "warning", idle_s=0.05)
        try:
            for text in ("ab", "c"):
                said = json.loads(await reader.ask("/tokenize", json.dumps({"prompt": text}).encode()))
                assert bytes(said["tokens"]).decode() == text
                await gone()
            with pytest.raises(ApiError, match="prompt"):
                await reader.ask("/tokenize", b"{}")
        finally:
            reader.close()
        await gone()

    asyncio.run(main())


# A deployment -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    """One front-end of a model with a template; steps of some milliseconds."""
    flags = ("--engine", "bench.gaps_bodies:Engine", "--engine-option", "step_ms=5", "--max-model-len", "4096")
    with deployment("-dp", "1", "-asc", "1", "--model", "gemma-3-270m", *flags) as running:
        yield running


def readers(server: Deployment) -> list[int]:
    return [pid for pid in server.children() if process_name(pid) == "pl:reader 0" and is_alive(pid)]


@contextmanager
def longest_wait(server: Deployment) -> Iterator[Callable[[], float]]:
    """Asks `/health` all the time; yields what tells the longest wait for it since it was asked last."""
    over, waits = threading.Event(), [0.0]

    def ask() -> None:
        with httpx2.Client(base_url=server.url, timeout=stretched(60)) as client:
            while not over.is_set():
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                waits.append(time.monotonic() - begun)

    def told() -> float:
        longest, waits[:] = max(waits), [0.0]
        return longest

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            wait_until(lambda: len(waits) > 50, "health is asked")
            yield told
        finally:
            over.set()
            asking.result()


def large(before: str, part: str, after: str) -> bytes:
    return (before + ",".join([part] * (8_000_000 // len(part))) + after).encode()


@pytest.mark.slow
def test_nobody_waits_for_a_body_of_any_kind(server: Deployment) -> None:
    said = '{"role":"user","content":"a"}'
    schema = json.dumps({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(20)}})
    bodies = {
        "/v1/completions": large('{"prompt":[', '"a"', "]}"),
        "/v1/chat/completions": large(f'{{"max_tokens":1,"messages":[{said}],"documents":[', '{"a":[{"b":1}]}', "]}"),
        "/v1/responses": large(
            '{"input":"a","tool_choice":"none","max_output_tokens":1,"tools":[{"name":"f","parameters":{"anyOf":[',
            schema, "]}}]}",
        ),
        "/v1/messages": large(
            '{"max_tokens":1,"messages":[' + said + ',{"role":"assistant","content":[{"type":"tool_use","id":"a",'
            '"name":"f","input":{"a":[', schema, "]}}]}]}",
        ),
        "/v1/messages/count_tokens": large(
            f'{{"messages":[{said}],"tools":[', f'{{"name":"f","input_schema":{schema}}}', "]}"
        ),
    }  # fmt: skip
    with longest_wait(server) as waited:
        idle = waited()
        for path, body in bodies.items():
            answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400), answer.text[:200]
            # It was a second for some of them.
            assert waited() < 10 * idle + stretched(0.3), path


@pytest.mark.slow
def test_a_reader_that_dies_is_followed_by_another_which_reads_what_it_had(server: Deployment) -> None:
    ask = {"prompt": "x" * 2 * FAR_BYTES}

    def code() -> Any:
        return server.http.post("/v1/completions", json=ask).json()["error"]["code"]

    assert code() == "context_length_exceeded"
    (reader,) = readers(server)
    os.kill(reader, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(code)
        # It is left before it is answered; that is forgotten.
        with pytest.raises(httpx2.TimeoutException):
            server.http.post("/v1/completions", json=ask, timeout=0.2)
        late = server.http.post("/v1/completions", json=ask, headers={"X-Request-Deadline-Ms": "300"})
        assert (late.status_code, late.json()["error"]["code"]) == (429, "deadline")
        assert not waiting.done()
        os.kill(reader, signal.SIGKILL)
        assert waiting.result(stretched(30)) == "context_length_exceeded"
    wait_until(lambda: not is_alive(reader), "the reader has ended")
    assert readers(server) != [reader]


@pytest.mark.slow
def test_a_body_that_ends_two_readers_fails_and_the_next_is_read(server: Deployment) -> None:
    ask = {"prompt": "x" * 2 * FAR_BYTES}

    def code() -> Any:
        return server.http.post("/v1/completions", json=ask).json()["error"]["code"]

    assert code() == "context_length_exceeded"
    (first,) = readers(server)
    os.kill(first, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(code)
        os.kill(first, signal.SIGKILL)
        (second,) = wait_until(lambda: [pid for pid in readers(server) if pid != first], "another is there")
        with contextlib.suppress(ProcessLookupError):
            os.kill(second, signal.SIGKILL)
        assert waiting.result(stretched(30)) in ("internal_error", "context_length_exceeded")
    assert code() == "context_length_exceeded"


@pytest.mark.slow
def test_a_reader_ends_with_its_front_end_though_it_is_stopped(server: Deployment) -> None:
    body = {"prompt": "x" * 2 * FAR_BYTES}
    assert server.http.post("/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
    (reader,) = readers(server)
    os.kill(reader, signal.SIGSTOP)
    os.kill(server.pid_of("front-end 0"), signal.SIGKILL)
    wait_until(lambda: not is_alive(reader), "the reader has ended")
    wait_until(lambda: answers(server), "the front-end is back")


def answers(server: Deployment) -> bool:
    try:
        return bool(server.http.get("/health").status_code == 200)
    except httpx2.HTTPError:
        return False


@pytest.mark.slow
def test_a_front_end_ends_with_its_reader() -> None:
    with deployment("--engine", "timed") as server:
        body = {"prompt": "x" * 2 * FAR_BYTES}
        assert server.http.post("/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
        (reader,) = readers(server)
        server.http.close()
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0
        assert not is_alive(reader)
