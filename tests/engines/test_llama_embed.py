"""Embeddings by llama.cpp: of a model made to generate, and of encoders, which are held against NumPy."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest, EngineSettings
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer
from tests.engines.bert_file import CONTEXT, SIZE, WORDS, tokens_of, weights_of, write_bert
from tests.engines.llama_runs import Makes

pytestmark = pytest.mark.slow

TEXTS = ["The cat sits on the mat.", "A kitten rests on a rug.", "Stock markets fell sharply today."]


def embed(engine: LlamaEngine, prompts: list[list[int]]) -> list[Any]:
    """The vectors of prompts that are there at once."""
    for key, prompt in enumerate(prompts):
        engine.add(EngineRequest(key, prompt, SamplingParams(max_tokens=1)))
    found: dict[int, Any] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            assert (output.finish_reason, output.token_ids, output.error) == ("stop", [], None)
            found[output.key] = np.array(array("f", output.embedding))
    return [found[key] for key in range(len(prompts))]


def test_a_prompt_s_vector_is_its_own_whoever_is_computed_beside_it(makes: Makes, tokenizer: LlamaTokenizer) -> None:
    prompts = [tokenizer.encode(text) for text in (*TEXTS, " ".join(TEXTS * 20))]
    together = embed(makes.engine(task="embed"), prompts)
    pieces = makes.engine(task="embed", max_num_batched_tokens=16)
    for prompt, vector in zip([*prompts, *prompts], [*together, *together], strict=True):
        assert np.array_equal(embed(pieces, [prompt])[0], vector), "also where its KV is still there"
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)
    cat, kitten, markets, _ = together
    assert cat @ kitten > max(cat @ markets, kitten @ markets), "what is alike in meaning is near"


def test_a_prompt_may_have_all_the_length_there_is_and_no_more(makes: Makes) -> None:
    engine = makes.engine(task="embed")
    assert len(embed(engine, [[5] * 512])) == 1
    engine.add(EngineRequest(9, [5] * 513, SamplingParams(max_tokens=1)))
    (refused,) = engine.step().outputs
    assert refused.finish_reason == "error"
    engine.add(EngineRequest(10, [5] * 400, SamplingParams(max_tokens=1)))
    engine.abort(10)
    assert not engine.has_work()
    assert engine.load().kv_reserved == 0


@pytest.fixture(scope="module", params=[(1, "mean"), (2, "cls"), (3, "last")], ids=lambda one: str(one[1]))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    number, kind = request.param
    path, weights = tmp_path_factory.mktemp("bert") / "model.gguf", weights_of(7)
    write_bert(path, weights, number)
    settings = EngineSettings(
        model=str(path), threads=1, task="embed", max_num_seqs=4, max_num_batched_tokens=4, max_model_len=CONTEXT
    )
    engine = LlamaEngine.create(settings, lambda what, share: None)
    yield kind, weights, settings, engine
    engine.close()


def test_an_encoder_says_what_numpy_says(encoder: Any) -> None:
    kind, weights, settings, engine = encoder
    tokenizer = LlamaEngine.tokenizer(settings)
    assert tokenizer.embedding_size == SIZE
    prompts = [tokenizer.encode(text) for text in ("the cat sits on the mat", "a dog runs", "a")]
    assert prompts[1] == [2, *(WORDS.index(f"\u2581{word}") for word in ("a", "dog", "runs")), 3]
    prompts += [[2, *[4 + place % 8 for place in range(CONTEXT - 2)], 3]] * 2
    for prompt, vector in zip(prompts * 3, embed(engine, prompts * 3), strict=True):
        rows = tokens_of(weights, prompt)
        expected = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[kind]
        assert vector == pytest.approx(expected / np.linalg.norm(expected), abs=2e-3)
