"""`/v1/embeddings` by the real model over two ranks, as the official client asks; and who does not embed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving import Deployment, command, deployment

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
TEXTS = ["The cat sits on the mat.", "A kitten rests on a rug.", "Stock markets fell sharply today."]


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    few = ("--max-num-seqs", "4", "--max-waiting", "16")
    with deployment("--task", "embed", "--max-model-len", "512", *few) as running:
        yield running


def embed(server: Deployment, **asked: Any) -> Any:
    return server.openai.embeddings.create(**{"model": MODEL, "input": TEXTS} | asked)


def product(one: Any, other: Any) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))


def test_texts_are_vectors_in_order_in_either_encoding(server: Deployment) -> None:
    whole = embed(server)
    cat, kitten, markets = (one.embedding for one in whole.data)
    assert [one.index for one in whole.data] == [0, 1, 2]
    assert product(cat, cat) == pytest.approx(1.0)
    assert product(cat, kitten) > product(cat, markets)
    assert whole.model == MODEL
    ids = [server.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    assert whole.usage.prompt_tokens == whole.usage.total_tokens == sum(map(len, ids))
    for asked in ({"encoding_format": "float"}, {"input": ids}):
        assert [one.embedding for one in embed(server, **asked).data] == [cat, kitten, markets]
    assert embed(server, input=ids[0]).data[0].embedding == cat
    assert embed(server, input=TEXTS[1]).data[0].embedding == kitten


def test_fewer_dimensions_are_the_first_of_them(server: Deployment) -> None:
    whole, short = embed(server).data[0].embedding, embed(server, dimensions=64).data[0].embedding
    length = math.sqrt(sum(value * value for value in whole[:64]))
    assert short == pytest.approx([value / length for value in whole[:64]], abs=1e-6)


def test_more_inputs_than_ranks_take_at_once_are_all_answered(server: Deployment) -> None:
    many = embed(server, input=[f"number {number}" for number in range(60)])
    assert [one.index for one in many.data] == list(range(60))
    assert many.data[7].embedding == embed(server, input="number 7").data[0].embedding


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", [1]]}, "input[1]"),
        ({"input": [10**9]}, "input"),
        ({"input": "word " * 600}, "input"),
        ({"input": "a", "dimensions": 577}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "nonsense": 1}, "nonsense"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(server: Deployment, asked: Any, param: str) -> None:
    response = server.http.post("/v1/embeddings", content=json.dumps(asked))
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_prompt_that_is_cut_fits(server: Deployment) -> None:
    cut = embed(server, input="word " * 600, extra_body={"truncate_prompt_tokens": -1})
    assert cut.usage.prompt_tokens == 512


def test_what_embeds_does_not_generate_and_the_other_way_round(server: Deployment, timed_server: Deployment) -> None:
    with pytest.raises(openai.BadRequestError, match="--task generate"):
        server.openai.completions.create(model=MODEL, prompt="a")
    with pytest.raises(openai.BadRequestError, match="--task embed"):
        timed_server.openai.embeddings.create(model="timed", input="a")
    assert server.http.get("/server_info").json()["task"] == "embed"


def test_an_engine_that_does_not_embed_says_so() -> None:
    with command("serve", "--engine", "timed", "--task", "embed", "--port", "0") as refused:
        assert refused.wait_end() != 0
        assert "--task embed: is not supported by the timed engine" in refused.output
        assert "Traceback" not in refused.output
