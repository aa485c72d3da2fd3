"""vLLM's own engine in the ranks: `paceline serve MODEL --engine vllm -dp 2`, real vLLM on CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Deployment, command, deployment, is_alive, wait_until
from tests.vllm import environment
from tests.vllm.mixed import ASKED, Said, run
from tests.vllm.serving import VERSION
from tests.vllm.weights import new_weights

pytestmark = pytest.mark.slow

PYTHON = str(environment.environment_of(VERSION) / "bin" / "python")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = ("--enforce-eager", "--max-model-len", "256", "--dtype", "bfloat16")


def model(name: str) -> str:
    return str(environment.models_of(VERSION) / name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    before = set(os.listdir("/dev/shm"))
    adapter = tmp_path_factory.mktemp("adapter")
    subprocess.run([PYTHON, "tests/vllm/make_adapter.py", adapter], check=True)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}")
    with deployment(model("dense"), "--engine", "vllm", "-dp", "2", "--api-server-count", "2", *FLAGS, *lora,
                    python=PYTHON, variables=VARIABLES) as running:  # fmt: skip
        yield running
        pids = running.children()
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0
        wait_until(lambda: not any(map(is_alive, pids)), "all processes have ended")
    wait_until(lambda: not {name for name in set(os.listdir("/dev/shm")) - before if "vllm" in name}, "no memory left")


@pytest.fixture(scope="module")
def undisturbed(server: Deployment) -> list[Said]:
    """What the streams say; of two runs the same, or what follows would show nothing."""
    first = run(server.url)
    assert [said.error for said in first] == [None] * len(ASKED)
    assert run(server.url) == first
    return first


def test_a_completion_and_a_chat(server: Deployment) -> None:
    client = server.openai
    said = client.completions.create(model="dense", prompt="def make(folder)", max_tokens=8, temperature=0)
    assert said.usage is not None
    assert (said.usage.completion_tokens, said.choices[0].finish_reason) == (8, "length")
    chat = client.chat.completions.create(
        model="dense", messages=[{"role": "user", "content": "hi"}], max_tokens=8, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [len(one.top_logprobs) for one in content.content] == [2] * len(content.content)


def test_a_stop_string_is_not_shown(server: Deployment, undisturbed: list[Said]) -> None:
    whole = undisturbed[0].text
    stop = whole[40:44]
    (said,) = run(server.url, [ASKED[0] | {"stop": [stop]}])
    assert (said.text, said.finish) == (whole[: whole.index(stop)], "stop")


def test_front_ends_stay_light(server: Deployment) -> None:
    for index in range(2):
        process = Path(f"/proc/{server.pid_of(f'front-end {index}')}")
        maps = process.joinpath("maps").read_text()
        assert "libtorch" not in maps
        assert "site-packages/vllm/" not in maps
        resident = next(line for line in process.joinpath("status").read_text().splitlines() if "VmRSS" in line)
        assert int(resident.split()[1]) < 150 * 1024


def test_an_answer_keeps_to_its_schema(server: Deployment) -> None:
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
        "additionalProperties": False,
    }  # fmt: skip
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 0}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = server.http.post("/v1/chat/completions", json=asked | {"response_format": form}).json()
    assert 0 <= json.loads(said["choices"][0]["message"]["content"])["n"] <= 99
    choice = server.http.post(
        "/v1/chat/completions", json=asked | {"structured_outputs": {"choice": ["red", "green"]}}
    ).json()
    assert choice["choices"][0]["message"]["content"] in ("red", "green")


@pytest.mark.parametrize(
    "wrong",
    [
        {"structured_outputs": {"nonsense": 1}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    ],
)
def test_what_cannot_be_is_said(server: Deployment, wrong: dict[str, Any]) -> None:
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | wrong
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_prompt_logprobs_and_min_tokens(server: Deployment) -> None:
    asked = {"prompt": "a b c", "max_tokens": 4, "min_tokens": 4, "temperature": 0, "prompt_logprobs": 1}
    (choice,) = server.http.post("/v1/completions", json=asked).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert all(choice["prompt_logprobs"][1:])


def test_cut_anywhere_an_answer_goes_on_as_it_would_have() -> None:
    done = subprocess.run(
        [PYTHON, "tests/vllm/cut_answers.py", model("dense")], env=os.environ | VARIABLES | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("differs at []") >= 18


def test_an_adapter_is_asked_for_by_its_name(server: Deployment, undisturbed: list[Said]) -> None:
    assert [one.id for one in server.openai.models.list()] == ["dense", "tuned"]
    # Not beside requests for the model itself: vLLM 0.32's kernels for CPUs take "none" for the last adapter.
    tuned = [one | {"model": "tuned"} for one in ASKED]
    said = run(server.url, tuned)
    assert all(one.error is None and one.text != plain.text for one, plain in zip(said, undisturbed, strict=True))
    assert run(server.url, ASKED[:2]) == undisturbed[:2]
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)
    victim = server.pid_of("rank 0")
    assert run(server.url, tuned, lambda: os.kill(victim, signal.SIGKILL)) == said


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_paused_and_resumed_in_mid_stream(server: Deployment, undisturbed: list[Said], mode: str) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)

    def pause() -> None:
        # Doubled: asking twice is asking once.
        for _ in range(2):
            assert server.http.post(f"/pause?mode={mode}").status_code == 200
        assert server.health()["suspension"]["settled"]
        assert server.http.post("/resume").status_code == 200

    said = run(server.url, midway=pause)
    if mode == "abort":
        assert {one.finish for one in said} <= {"abort", "length"}
        assert all(whole.text.startswith(one.text) for one, whole in zip(said, undisturbed, strict=True))
    else:
        assert said == undisturbed


def test_each_rank_s_engine_is_called_and_says_its_own(server: Deployment) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)
    ranks = [{"rank": 0, "result": True}, {"rank": 1, "result": True}]
    assert server.http.post("/reset_prefix_cache").json() == {"results": ranks}
    asked = {"method": "check_health", "ranks": [1]}
    assert [one["rank"] for one in server.http.post("/collective_rpc", json=asked).json()["results"]] == [1]
    wrong = server.http.post("/collective_rpc", json={"method": "nonsense"})
    assert wrong.status_code == 500
    assert "rank 0" in wrong.json()["error"]["message"]
    assert server.http.post("/collective_rpc", json={"ranks": [0]}).status_code == 400


def test_asleep_in_mid_stream_and_awake_again(server: Deployment, undisturbed: list[Said]) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)

    def sleep() -> None:
        # On a CPU vLLM keeps the weights where they are; what runs is computed anew all the same.
        assert server.http.post("/sleep?level=1").status_code == 200
        assert server.http.post("/wake_up").status_code == 200

    assert run(server.url, midway=sleep) == undisturbed


def test_a_rank_killed_while_paused(server: Deployment, undisturbed: list[Said]) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)

    def pause() -> None:
        assert server.http.post("/pause?mode=keep").status_code == 200
        os.kill(server.pid_of("rank 1"), signal.SIGKILL)
        wait_until(lambda: server.health()["ready"] == [0, 1], "it is back", 120)
        assert server.http.post("/resume").status_code == 200

    assert run(server.url, midway=pause) == undisturbed


def test_a_bad_request_is_refused_and_harms_nobody(server: Deployment, undisturbed: list[Said]) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": [[600]], "max_tokens": 2})
    assert answer.status_code == 400
    assert run(server.url, ASKED[:1]) == undisturbed[:1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(20 if metafunc.config.getoption("--vllm-full") else 3))


def test_killed_in_mid_stream_nothing_is_lost(server: Deployment, undisturbed: list[Said], kill: int) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)
    victim = server.pid_of(f"rank {kill % 2}")
    assert run(server.url, midway=lambda: os.kill(victim, signal.SIGKILL)) == undisturbed


def test_stopped_in_mid_stream_nothing_is_lost(server: Deployment, undisturbed: list[Said]) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)
    victim = server.pid_of("rank 1")
    try:
        assert run(server.url, midway=lambda: os.kill(victim, signal.SIGSTOP)) == undisturbed
    finally:
        os.kill(victim, signal.SIGCONT)
    wait_until(lambda: server.health()["ready"] == [0, 1], "it is back", 120)


def test_an_unknown_flag_is_named() -> None:
    with command("serve", model("dense"), "--engine", "vllm", "--port", "0", "--nonsense", "3",
                 python=PYTHON, variables=VARIABLES) as running:  # fmt: skip
        assert running.wait_end() == 2
        assert "unrecognized arguments: --nonsense" in running.output
        assert "Traceback" not in running.output


def test_its_flags_are_printed() -> None:
    with command("serve", "--engine", "vllm", "--engine-help", python=PYTHON, variables=VARIABLES) as running:
        assert running.wait_end() == 0
        assert {"--tensor-parallel-size", "--gpu-memory-utilization", "--quantization"} <= set(running.output.split())


def test_new_weights(server: Deployment, tmp_path: Path) -> None:
    wait_until(lambda: server.health()["ready"] == [0, 1], "both ranks are there", 120)
    new_weights(server, model("dense"), tmp_path)


def test_a_model_without_tokenizer_json(tmp_path: Path, server: Deployment, request: pytest.FixtureRequest) -> None:
    """One process a node has its tokenizer; killed, it is there again, and ends with the deployment."""
    if not request.config.getoption("--vllm-full"):
        pytest.skip("another start of vLLM: --vllm-full; tests/engines/test_vllm_tokenizer.py has its parts")
    folder = tmp_path / "slow"
    shutil.copytree(model("dense"), folder)
    written = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(written["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in written["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<end>", "eos_token": "<end>", "unk_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    asked = {"prompt": "def make(folder)", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    expected = server.http.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    with deployment(str(folder), "--engine", "vllm", *FLAGS, python=PYTHON, variables=VARIABLES) as running:
        (process,) = tokenizer_processes(running)
        assert running.http.post("/v1/completions", json=asked).json()["choices"][0]["text"] == expected
        os.kill(process, signal.SIGKILL)
        assert running.http.post("/tokenize", json={"prompt": "def make"}, timeout=120).json()["tokens"]
        (again,) = tokenizer_processes(running)
        running.signal(signal.SIGTERM)
        assert running.wait_end() == 0
        wait_until(lambda: not is_alive(again), "it ends with the deployment")


def tokenizer_processes(running: Deployment) -> list[int]:
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in running.children()}
    return [pid for pid, line in lines.items() if "vllm_tokenizer" in line]
