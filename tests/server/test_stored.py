"""Responses that are kept: the bound, other front-ends and lives, and what a client asks of them."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from paceline.server.stored import ResponseStore, Stored
from tests.serving import Deployment, deployment


def response(number: int) -> Stored:
    identity = f"{number:032x}"
    output = [{"id": f"msg_{identity}0", "type": "message", "role": "assistant", "content": "x" * 100}]
    return Stored([{"role": "user", "content": "hi"}], {"id": f"resp_{identity}", "output": output})


def kept(store: ResponseStore, numbers: range) -> list[int]:
    return [number for number in numbers if store.get(response(number).response["id"]) is not None]


def test_the_oldest_go_where_there_is_no_more_room(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, 0, 1000)
    for number in range(20):
        store.put(response(number))
    found = kept(store, range(20))
    assert found == list(range(found[0], 20))
    assert len(found) >= 3
    assert sum(path.stat().st_size for path in (tmp_path / "0").iterdir()) <= 1000


def test_another_front_end_finds_it_and_another_life_knows_its_bound(tmp_path: Path) -> None:
    store, other = ResponseStore(tmp_path, 0, 1000), ResponseStore(tmp_path, 1, 1000)
    store.put(response(1))
    assert other.get(response(1).response["id"]) == response(1)
    assert other.item(response(1).response["output"][0]["id"]) == response(1).response["output"][0]
    again = ResponseStore(tmp_path, 0, 1000)
    for number in range(2, 20):
        again.put(response(number))
    assert kept(again, range(2)) == []
    assert sum(path.stat().st_size for path in (tmp_path / "0").iterdir()) <= 1000
    assert other.delete(response(19).response["id"])
    assert not other.delete(response(19).response["id"])
    again.put(response(20))
    assert kept(other, range(19, 21)) == [20]


def test_what_is_larger_than_the_bound_is_not_kept_and_no_id_leads_elsewhere(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, 0, 100)
    store.put(response(1))
    assert kept(store, range(2)) == []
    (tmp_path / "secret").write_text("{}")
    for name in ("../secret", "*", "resp_*", "", "resp_" + "0" * 33, "\0"):
        assert store.get(name) is None
        assert not store.delete(name)
        assert store.item(name) is None


def test_a_cleaner_takes_nothing_but_what_was_kept(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "kept", 0, 1000)
    store.put(response(1))
    (tmp_path / "kept" / "0" / response(1).response["id"]).unlink()
    (tmp_path / "kept" / "0").rmdir()
    assert kept(store, range(2)) == []
    store.put(response(2))
    assert kept(store, range(3)) == [2]


def test_what_is_shown_need_not_be_read_and_what_a_body_names_is_weighed(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, 0, 10**6)
    one = response(1)
    done = store.put(one, weight=10**6)
    assert done is not None
    done.result(30)
    shown, size = store.shown(one.response["id"]), (tmp_path / "0" / one.response["id"]).stat().st_size
    assert shown is not None
    assert json.loads(shown) == one.response
    assert store.shown(response(2).response["id"]) is None
    identity = one.response["id"]
    escaped = "".join(f"\\u00{ord(letter):02X}" for letter in identity)
    for name in (identity, escaped, one.response["output"][0]["id"]):
        assert store.named_bytes(f'{{"previous_response_id":"{name}"}}'.encode()) == size
    assert store.named_bytes(b'{"input":"resp_x"}') == 0


# Deployments --------------------------------------------------------------------------------------


def ask(server: Deployment, text: str, **more: Any) -> Any:
    return server.http.post("/v1/responses", json={"input": text, "max_output_tokens": 2, **more})


@pytest.mark.slow
def test_any_front_end_answers_and_also_when_the_one_that_made_it_has_ended() -> None:
    with deployment("--engine", "timed", "--engine-option", "step_ms=0", "--api-server-count", "2") as server:
        said = [ask(server, "hello", stream=number % 2 == 1) for number in range(8)]
        found = [re.search('"id":"(resp_[0-9a-f]{32})"', one.text) for one in said]
        identities = [one[1] for one in found if one]
        assert len(set(identities)) == 8
        os.kill(server.pid_of("front-end 0"), signal.SIGKILL)
        server.wait_line("front-end 0 ended")
        server.http.close()
        server.open(server.url)
        for identity in identities * 3:
            response = server.http.get(f"/v1/responses/{identity}", headers={"connection": "close"})
            assert response.status_code == 200, response.text
            assert response.json()["store"] is True
        usage = ask(server, "you", previous_response_id=identities[0]).json()["usage"]
        assert usage["input_tokens"] > ask(server, "you").json()["usage"]["input_tokens"] + 5
        assert server.http.get(f"/v1/responses/{identities[1]}?stream=true").json()["error"]["param"] == "stream"
        assert server.http.delete(f"/v1/responses/{identities[1]}").json()["deleted"] is True
        assert server.http.get(f"/v1/responses/{identities[1]}").status_code == 404
        not_kept = ask(server, "hello", store=False).json()
        assert not_kept["store"] is False
        assert server.http.get(f"/v1/responses/{not_kept['id']}").status_code == 404
        wrong = ask(server, "you", previous_response_id="resp_1")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "previous_response_id")
        wrong = server.http.post("/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_1"}]})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input[0].id")


@pytest.mark.slow
def test_a_deployment_that_keeps_nothing_says_so() -> None:
    with deployment("--engine", "timed", "--response-store-bytes", "0") as server:
        assert ask(server, "hello").json()["store"] is False
        assert ask(server, "hello", store=True).json()["error"]["param"] == "store"
        assert ask(server, "hello", previous_response_id="resp_1").status_code == 400
