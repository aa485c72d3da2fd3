"""New weights while requests run: real processes, all engines that need no GPU, and deaths at any moment."""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paceline.control import Control, ControlError, WeightServer
from paceline.engines.models import model_path
from paceline.engines.moe import MoeConfig
from paceline.engines.moe_model import write_weights
from tests.serving import Deployment, deployment, wait_until

pytestmark = pytest.mark.slow

TIMED = ("--engine", "timed", "--engine-option", "step_ms=3", "-dp", "2", "--api-server-count", "2")


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    """Three sets of them for the `moe` engine."""
    found = [tmp_path / f"weights-{seed}" for seed in range(3)]
    for seed, path in enumerate(found):
        write_weights(path, MoeConfig(), seed)
    return found


@pytest.fixture
def moe(weights: list[Path]) -> Iterator[Deployment]:
    with deployment("--engine", "moe", "-dp", "2", "--engine-option", f"weights={weights[0]}") as running:
        yield running


def ask(running: Deployment, tokens: int = 6, rank: int | None = None) -> dict[str, Any]:
    body = {
        "prompt": "the same question", "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_weight_versions": True, "return_token_ids": True,
    }  # fmt: skip
    headers = {} if rank is None else {"x-data-parallel-rank": str(rank)}
    answer = running.http.post("/v1/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_all_ranks_answer_by_the_new_weights_and_say_so(moe: Deployment, weights: list[Path]) -> None:
    before = [ask(moe, rank=rank) for rank in range(2)]
    assert [one["weight_version"] for one in before] == ["default"] * 2
    assert before[0]["text"] == before[1]["text"]
    control = Control(moe.url)
    for version in (1, 2, 1):
        control.update_weights({"path": str(weights[version])}, f"step-{version}")
        assert control.weight_version() == f"step-{version}"
        after = [ask(moe, rank=rank) for rank in range(2)]
        assert [one["weight_versions"] for one in after] == [
            [{"weight_version": f"step-{version}", "start": 0, "end": 6}]
        ] * 2
        assert after[0]["text"] == after[1]["text"] != before[0]["text"]
    assert not control.is_paused()


def test_a_kept_answer_says_which_weights_made_which_tokens(moe: Deployment, weights: list[Path]) -> None:
    control = Control(moe.url)
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(ask, moe, 400)
        wait_until(lambda: any(rank["running"] for rank in control.loads()["ranks"]), "it runs")  # type: ignore[attr-defined]
        control.update_weights({"path": str(weights[1])}, "new")
        (first, second) = kept.result()["weight_versions"]
    assert (first["weight_version"], first["start"], first["end"]) == ("default", 0, second["start"])
    assert (second["weight_version"], second["end"]) == ("new", 400)
    # What follows is what these weights say behind such tokens, whoever computes them.
    tokens = kept.result()["token_ids"]
    prompt = moe.http.post("/tokenize", json={"prompt": "the same question"}).json()["tokens"]
    cut = second["start"]
    body = {
        "prompt": prompt + tokens[:cut], "max_tokens": 20, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    again = moe.http.post("/v1/completions", json=body).json()["choices"][0]
    assert again["token_ids"] == tokens[cut : cut + 20]


def test_weights_over_a_socket_and_in_shared_memory(moe: Deployment, weights: list[Path]) -> None:
    control, data = Control(moe.url), weights[1].read_bytes()
    with WeightServer(data) as server:
        control.update_weights({"address": server.address}, "sent")
        sent = ask(moe)
    shared = Path(f"/dev/shm/paceline-test-{os.getpid()}")
    try:
        shared.write_bytes(data)
        control.update_weights({"shared_memory": shared.name}, "shared")
        assert ask(moe)["text"] == sent["text"]
    finally:
        shared.unlink()
    assert sent["weight_version"] == "sent"


def test_what_one_rank_cannot_have_no_rank_gets(moe: Deployment, tmp_path: Path) -> None:
    control, before = Control(moe.url), ask(moe)
    (tmp_path / "short").write_bytes(b"0" * 100)
    for path, why in ((tmp_path / "short", "has 100 bytes"), (tmp_path / "none", "is not there")):
        with pytest.raises(ControlError, match=f"all ranks keep the weights that they had: rank .*{why}") as raised:
            control.update_weights({"path": str(path)}, "bad")
        assert raised.value.status == 500
    assert [ask(moe, rank=rank)["text"] for rank in range(2)] == [before["text"]] * 2
    assert control.weight_version() == "default"
    for wrong in ({"source": {"path": 1}}, {"source": {}}, {}, {"source": {"path": "x"}, "mode": "no"}):
        assert moe.http.post("/update_weights", json=wrong).status_code == 400


def test_vllms_calls_by_their_names(moe: Deployment, weights: list[Path]) -> None:
    info = {"update_info": {"path": str(weights[1])}}
    assert moe.http.post("/start_weight_update").status_code == 409
    assert moe.http.post("/update_weights", json=info).status_code == 409
    assert moe.http.post("/pause?mode=keep").status_code == 200
    assert moe.http.post("/finish_weight_update", json={}).status_code == 409
    assert moe.http.post("/start_weight_update").status_code == 200
    assert moe.http.post("/update_weights", json=info).status_code == 200
    assert moe.http.get("/weight_info").json() == {"weight_version": "default", "updating": True}
    assert moe.http.post("/finish_weight_update", json={"weight_version": "7"}).status_code == 200
    assert moe.http.post("/resume").status_code == 200
    assert ask(moe)["weight_version"] == "7"
    assert moe.http.post("/update_weight_version", json={"new_version": "8"}).status_code == 200
    assert ask(moe)["weight_version"] == "8"
    assert moe.http.get("/weight_info").json() == {"weight_version": "8", "updating": False}
    assert moe.http.post("/abort_requests", json={}).json() == {"status": "aborted"}


def test_a_rank_that_comes_back_has_the_weights_in_force(moe: Deployment, weights: list[Path]) -> None:
    Control(moe.url).update_weights({"path": str(weights[1])}, "new")
    expected = ask(moe)
    os.kill(moe.pid_of("rank 1"), signal.SIGKILL)
    wait_until(lambda: moe.health()["missing"] == [1], "it is missed")
    wait_until(lambda: not moe.health()["missing"], "it is back", 60.0)
    assert ask(moe, rank=1) == expected


def other_gguf(model: Path, to: Path) -> Path:
    """A copy whose last norm has its numbers in another order: the same sizes, and it says something else."""
    data = bytearray(model.read_bytes())
    name = b"output_norm.weight"
    place = data.index(len(name).to_bytes(8, "little") + name)
    mine = None
    while 0 < (length := int.from_bytes(data[place : place + 8], "little")) < 128:
        dimensions = int.from_bytes(data[place + 8 + length : place + 12 + length], "little")
        sizes = place + 12 + length
        place = sizes + 8 * dimensions + 12
        if mine is None:
            mine = int.from_bytes(data[sizes : sizes + 8], "little"), int.from_bytes(data[place - 8 : place], "little")
    assert mine is not None
    count, offset = mine
    begin = -(-place // 32) * 32 + offset
    values = memoryview(data)[begin : begin + 4 * count].cast("f")
    values[:] = memoryview(struct.pack(f"{count}f", *reversed(values.tolist()))).cast("f")
    to.write_bytes(data)
    return to


def test_a_gguf_beside_the_served_one(tmp_path: Path) -> None:
    model = model_path(None, lambda what, share: None)
    other = other_gguf(model, tmp_path / "other.gguf")
    with deployment("--engine", "llama", "-dp", "2", "--max-num-seqs", "2", "--max-model-len", "256") as running:
        control, before = Control(running.url), ask(running)
        with ThreadPoolExecutor(1) as pool:
            kept = pool.submit(ask, running, 60)
            wait_until(lambda: any(rank["running"] for rank in control.loads()["ranks"]), "it runs")  # type: ignore[attr-defined]
            control.update_weights({"path": str(other)}, "other")
            spans = kept.result()["weight_versions"]
        assert [span["weight_version"] for span in spans] == ["default", "other"]
        assert spans[1]["end"] == 60
        after = [ask(running, rank=rank) for rank in range(2)]
        assert after[0]["token_ids"] == after[1]["token_ids"] != before["token_ids"]
        (tmp_path / "cut.gguf").write_bytes(other.read_bytes()[:100_000])
        with pytest.raises(ControlError, match="all ranks keep"):
            control.update_weights({"path": str(tmp_path / "cut.gguf")}, "cut")
        control.update_weights({"path": str(model)}, "again")
        assert ask(running)["token_ids"] == before["token_ids"]


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_never_a_mix_whoever_dies(engine: str, weights: list[Path], tmp_path: Path) -> None:
    """Ranks and the coordinator are killed at any moment of 9 updates, under streams: each answer's versions go up,
    each token's was in force when it was made, and none is lost.
    """
    arguments = TIMED if engine == "timed" else ("--engine", "moe", "-dp", "2", "--api-server-count", "2")
    with deployment(*arguments) as running:
        control, stopping = Control(running.url), threading.Event()
        spans: list[list[dict[str, Any]]] = []

        def stream() -> None:
            while not stopping.is_set():
                spans.append(ask(running, 60)["weight_versions"])

        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(stream) for _ in range(4)]
            try:
                in_force = updates_amid_kills(running, weights)
            finally:
                stopping.set()
            for one in streams:
                one.result()
        known = {"default", *map(str, in_force)}
        for answer in spans:
            versions = [span["weight_version"] for span in answer]
            assert set(versions) <= known
            order = [0 if version == "default" else int(version) for version in versions]
            assert order == sorted(order)
            assert [span["start"] for span in answer] == [0, *(span["end"] for span in answer[:-1])]
        # On a busy machine an answer lasts as long as all the updates: its versions change, then.
        assert len({span["weight_version"] for answer in spans for span in answer}) > 1
        # The last death may not have been seen yet.
        wait_until(lambda: running.health()["ready"] == [0, 1] and served(running) == 2, "all serve", 60.0)
        last = [ask(running, rank=rank)["weight_version"] for rank in range(2)]
        assert last == [control.weight_version()] * 2


def served(running: Deployment) -> int:
    """How many ranks answer."""
    body = {"prompt": "a", "max_tokens": 1}
    posts = (
        running.http.post("/v1/completions", json=body, headers={"x-data-parallel-rank": str(rank)}, timeout=120)
        for rank in range(2)
    )
    return sum(answer.status_code == 200 for answer in posts)


def updates_amid_kills(running: Deployment, weights: list[Path]) -> list[int]:
    """Nine updates, each with a death at some moment; returns those that are known to have come into force."""
    draw, control, in_force = random.Random(1), Control(running.url), [0]
    for number in range(1, 10):
        victim = draw.choice(["rank 0", "rank 1", "coordinator", ""])
        killer = threading.Timer(draw.random() * 0.15, kill, [running, victim])
        killer.start()
        try:
            control.update_weights({"path": str(weights[number % 3])}, str(number), timeout_s=60.0)
            in_force.append(number)
        except ControlError as error:
            assert error.status, error
        killer.join()
        wait_until(lambda: not running.health()["missing"], "all ranks are back", 60.0)
    return in_force


def kill(running: Deployment, name: str) -> None:
    if name:
        os.kill(running.pid_of(name), signal.SIGKILL)
