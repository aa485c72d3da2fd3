"""New weights for vLLM's engine in the ranks, dense: from a folder, over a socket, refused, and for a rank that was
killed.

It runs in `test_engine.py`'s deployment, which gets its own weights back: a start of vLLM takes half a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paceline.control import Control, ControlError, WeightServer
from tests.serving import Deployment, wait_until

BACK_S = 240.0


def other_model(served: str, folder: Path) -> Path:
    """The dense model with one tensor changed, so that it says something else."""
    shutil.copytree(served, folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])["lm_head.weight"]["data_offsets"]
    row = (end - begin) // 512
    place = 8 + length + begin
    # Each token's row goes to the next one.
    data[place : place + end - begin] = data[place + row : place + end - begin] + data[place : place + row]
    file.write_bytes(data)
    return folder


def ask(running: Deployment, tokens: int = 16, rank: int | None = None) -> dict[str, Any]:
    body = {
        "model": "dense", "prompt": "def make(folder)", "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_weight_versions": True, "return_token_ids": True,
    }  # fmt: skip
    headers = {} if rank is None else {"x-data-parallel-rank": str(rank)}
    answer = running.http.post("/v1/completions", json=body, headers=headers, timeout=BACK_S)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def new_weights(server: Deployment, model: str, tmp_path: Path) -> None:
    """The test itself."""
    control, served, other = Control(server.url), Path(model), other_model(model, tmp_path / "other")
    before = ask(server)
    assert before["weight_version"] == "default"
    # An answer under way goes on with the new ones, and says where it begins to.
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(ask, server, 200)
        wait_until(lambda: any(rank["running"] for rank in control.loads()["ranks"]), "it runs")  # type: ignore[attr-defined]
        control.update_weights({"path": str(other)}, "one")
        spans = kept.result()["weight_versions"]
    assert [(span["weight_version"], span["end"]) for span in spans][-1] == ("one", 200)
    cut = spans[-1]["start"]
    after = [ask(server, rank=rank) for rank in range(2)]
    assert after[0]["token_ids"] == after[1]["token_ids"] != before["token_ids"]
    assert [one["weight_version"] for one in after] == ["one"] * 2
    prompt = server.http.post("/tokenize", json={"model": "dense", "prompt": "def make(folder)"}).json()["tokens"]
    body = {
        "model": "dense", "prompt": prompt + kept.result()["token_ids"][:cut], "max_tokens": 10, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    again = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert again["token_ids"] == kept.result()["token_ids"][cut : cut + 10]
    # Over a socket, back to the first ones.
    with WeightServer((served / "model.safetensors").read_bytes()) as sender:
        control.update_weights({"address": sender.address}, "two")
    assert ask(server)["token_ids"] == before["token_ids"]
    # What does not fit, nobody gets.
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes((served / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ControlError, match=r"all ranks keep the weights that they had: rank \d"):
        control.update_weights({"path": str(tmp_path / "cut")}, "three")
    assert (ask(server)["token_ids"], control.weight_version()) == (before["token_ids"], "two")
    # A rank that has been killed comes back with what is in force.
    control.update_weights({"path": str(other)}, "four")
    os.kill(server.pid_of("rank 1"), signal.SIGKILL)
    wait_until(lambda: server.health()["missing"] == [1], "it is missed")
    wait_until(lambda: not server.health()["missing"], "it is back", BACK_S)
    back = ask(server, rank=1)
    assert (back["token_ids"], back["weight_version"]) == (after[0]["token_ids"], "four")
    control.update_weights({"path": str(served)}, "five")
    assert ask(server)["token_ids"] == before["token_ids"]
