"""The transformer: the same logits, bit for bit, however tokens are cut into chunks and put into batches."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engines.moe_arithmetic import Floats
from paceline.engines.moe_experts import Alone
from paceline.engines.moe_model import MoeModel, Piece
from paceline.engines.moe_options import MoeConfig, MoeOptions

MODEL = MoeModel.load(MoeOptions(MoeConfig()), 64)
PROMPTS = [[random.Random(seed).randrange(256) for _ in range(5 + 7 * seed)] for seed in range(5)]


def logits_of(prompt: list[int]) -> Floats:
    """The logits behind a prompt, computed at once and alone."""
    return MODEL.forward([(prompt, 0, MODEL.make_kv(len(prompt)))], Alone())[0]


EXPECTED = [logits_of(prompt) for prompt in PROMPTS]


@given(seed=st.integers(0, 2**32), largest=st.sampled_from([1, 3, 20]))
@settings(max_examples=15, deadline=None)
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


def test_every_token_shows_in_the_logits() -> None:
    for place in range(len(PROMPTS[1])):
        changed = list(PROMPTS[1])
        changed[place] ^= 1
        assert not np.array_equal(logits_of(changed), EXPECTED[1])


def test_places_show_in_the_logits() -> None:
    assert not np.array_equal(logits_of([1, 2, 3]), logits_of([2, 1, 3]))


def test_empty_batch() -> None:
    assert MODEL.forward([], Alone()).shape == (0, 258)
