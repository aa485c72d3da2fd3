"""The transformer: the same logits, bit for bit, however tokens are cut into chunks and put into batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from paceline.engines.moe import MoeConfig, MoeOptions
from paceline.engines.moe_model import Alone, Floats, MoeModel, Piece, load_weights
from tests.pace import examples

Doubles = NDArray[np.float64]


CONFIG = MoeConfig(experts_per_token=3)
MODEL = MoeModel.load(MoeOptions(CONFIG), 64)
PROMPTS = [random.Random(seed).choices(range(256), k=5 + 7 * seed) for seed in range(5)]


def logits_of(prompt: list[int]) -> Floats:
    """The logits behind a prompt, computed at once and alone."""
    return MODEL.forward([(prompt, 0, MODEL.make_kv(len(prompt)))], Alone())[0]


EXPECTED = [logits_of(prompt) for prompt in PROMPTS]


@given(seed=st.integers(0, 2**32), largest=st.sampled_from([1, 3, 20]))
@settings(max_examples=examples(15))
def test_chunks_and_batches_do_not_show(seed: int, largest: int) -> None:
    chance = random.Random(seed)
    kv = [MODEL.make_kv(len(prompt)) for prompt in PROMPTS]
    done = [0] * len(PROMPTS)
    while left := [index for index, prompt in enumerate(PROMPTS) if done[index] < len(prompt)]:
        batch = chance.sample(left, chance.randint(1, len(left)))
        ends = {index: min(len(PROMPTS[index]), done[index] + chance.randint(1, largest)) for index in batch}
        pieces: list[Piece] = [(PROMPTS[index][done[index] : ends[index]], done[index], kv[index]) for index in batch]
        for index, row in zip(batch, MODEL.forward(pieces, Alone()), strict=True):
            done[index] = ends[index]
            if ends[index] == len(PROMPTS[index]):
                assert np.array_equal(row, EXPECTED[index])


def norm(row: Doubles) -> Doubles:
    normalised: Doubles = row / np.sqrt((row**2).mean() + 1e-6)
    return normalised


def shares_of(scores: Doubles) -> Doubles:
    shares: Doubles = np.exp(scores) / np.exp(scores).sum()
    return shares


def turned(head: Doubles, position: int) -> Doubles:
    half = len(head) // 2
    turns = (head[:half] + 1j * head[half:]) * np.exp(1j * position * 10000.0 ** (-np.arange(half) / half))
    return np.concatenate([turns.real, turns.imag])


def plain_logits(prompt: list[int]) -> Doubles:
    """The same model, written down as in a textbook: one token after the other, in double precision."""
    weights = {name: tensor.astype(np.float64) for name, tensor in load_weights(MoeOptions(CONFIG)).items()}
    heads, size = CONFIG.heads, CONFIG.d_model // CONFIG.heads
    rows = [weights["embedding"][token] for token in prompt]
    for layer in range(CONFIG.layers):
        query, key, value, output, router, up, down = (
            weights[f"{layer}.{name}"] for name in ("query", "key", "value", "output", "router", "up", "down")
        )
        inputs = [norm(row) for row in rows]
        keys = [[turned(head, at) for head in (row @ key).reshape(heads, size)] for at, row in enumerate(inputs)]
        values = [(row @ value).reshape(heads, size) for row in inputs]
        for at, row in enumerate(inputs):
            seen = []
            for head, asked in enumerate((row @ query).reshape(heads, size)):
                scores = [turned(asked, at) @ keys[earlier][head] / size**0.5 for earlier in range(at + 1)]
                shares = shares_of(np.array(scores))
                seen.append(sum(share * values[earlier][head] for earlier, share in enumerate(shares)))
            rows[at] = rows[at] + np.concatenate(seen) @ output
        for at, row in enumerate([norm(row) for row in rows]):
            best = np.argsort(-(row @ router))[: CONFIG.experts_per_token]
            for expert, share in zip(best, shares_of((row @ router)[best]), strict=True):
                rows[at] = rows[at] + share * (np.maximum(row @ up[expert], 0) ** 2 @ down[expert])
    logits: Doubles = norm(rows[-1]) @ weights["head"] + weights["bias"]
    return logits


@pytest.mark.parametrize("index", range(3))
def test_logits_are_the_textbooks(index: int) -> None:
    assert np.allclose(EXPECTED[index], plain_logits(PROMPTS[index]), atol=1e-3)


def test_every_token_shows_in_the_logits() -> None:
    for place in range(len(PROMPTS[1])):
        changed = list(PROMPTS[1])
        changed[place] ^= 1
        assert not np.array_equal(logits_of(changed), EXPECTED[1])


def test_places_show_in_the_logits() -> None:
    assert not np.array_equal(logits_of([1, 2, 3]), logits_of([2, 1, 3]))


def test_empty_batch() -> None:
    assert MODEL.forward([], Alone()).shape == (0, 258)
