"""The `moe` engine's transformer: decoder-only, rotary positions, experts in place of the feed-forward part.

    x = embedding[token]
    in every layer:  x += attention(norm(x));  x += experts(norm(x))
    logits = norm(x) head + bias

KV is an array a request, handed in by the engine. A forward pass writes it behind what is computed already, and
nothing else: one that is broken off leaves numbers that the next one overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paceline.engines.group import RankGroup
from paceline.engines.moe_arithmetic import Floats, attend, normalise, rows_times
from paceline.engines.moe_experts import Experts, Indices
from paceline.engines.moe_options import MoeConfig, MoeOptions
from paceline.engines.moe_weights import Weights, load_weights

ROTARY_BASE = 10000.0


Piece = tuple[Sequence[int], int, Floats]
"""Neighbouring tokens of one request, the first one's position, and the request's KV from `make_kv`."""


class MoeModel:
    """The model over given weights, for requests of up to `max_model_len` tokens. Logits and KV are float32."""

    def __init__(self, config: MoeConfig, weights: Weights, max_model_len: int) -> None:
        self._config = config
        self._weights = weights
        self._size = config.d_model // config.heads
        self._experts = [
            Experts(
                weights[f"{layer}.router"], weights[f"{layer}.up"], weights[f"{layer}.down"], config.experts_per_token
            )
            for layer in range(config.layers)
        ]
        half = self._size // 2
        angles = np.outer(np.arange(max_model_len), ROTARY_BASE ** (-np.arange(half) / half))
        self._cosines = np.cos(angles).astype(np.float32)
        self._sines = np.sin(angles).astype(np.float32)

    @classmethod
    def load(cls, options: MoeOptions, max_model_len: int) -> MoeModel:
        """The model that the options ask for. Raises EngineError."""
        return cls(options.config, load_weights(options), max_model_len)

    def make_kv(self, tokens: int) -> Floats:
        """Memory for the keys and values of so many tokens."""
        config = self._config
        return np.empty((config.layers, 2, config.heads, tokens, self._size), np.float32)

    def forward(self, pieces: Sequence[Piece], group: RankGroup) -> Floats:
        """Compute a batch together with the other members' batches; it may be empty.

        Returns the logits behind each piece's last token, (pieces, vocabulary). Raises GenerationEnded.
        """
        token_ids = [token for tokens, _, _ in pieces for token in tokens]
        places = [np.arange(begin, begin + len(tokens)) for tokens, begin, _ in pieces]
        positions = np.concatenate([np.empty(0, np.intp), *places])
        rows: Floats = self._weights["embedding"][np.array(token_ids, np.intp)]
        for layer, experts in enumerate(self._experts):
            rows = rows + self._attention(layer, normalise(rows), positions, pieces)
            rows = rows + experts.compute(normalise(rows), group)
        lasts = np.cumsum([len(tokens) for tokens, _, _ in pieces], dtype=np.intp) - 1
        logits: Floats = rows_times(normalise(rows[lasts]), self._weights["head"]) + self._weights["bias"]
        return logits

    def _attention(self, layer: int, rows: Floats, positions: Indices, pieces: Sequence[Piece]) -> Floats:
        query, key, value = (self._heads(rows, f"{layer}.{name}") for name in ("query", "key", "value"))
        cosines, sines = self._cosines[positions, None], self._sines[positions, None]
        query = _rotate(query, cosines, sines) / np.float32(self._size**0.5)
        key = _rotate(key, cosines, sines)
        seen = np.empty_like(query)
        row = 0
        for tokens, begin, kv in pieces:
            keys, values = kv[layer]
            count = len(tokens)
            keys[:, begin : begin + count] = key[row : row + count].swapaxes(0, 1)
            values[:, begin : begin + count] = value[row : row + count].swapaxes(0, 1)
            for end in range(begin + 1, begin + count + 1):
                seen[row] = attend(query[row], keys[:, :end], values[:, :end])
                row += 1
        return rows_times(seen.reshape(rows.shape), self._weights[f"{layer}.output"])

    def _heads(self, rows: Floats, name: str) -> Floats:
        """`rows` (n, d) times a matrix, as (n, heads, d / heads)."""
        return rows_times(rows, self._weights[name]).reshape(len(rows), self._config.heads, self._size)


def _rotate(vectors: Floats, cosines: Floats, sines: Floats) -> Floats:
    """Rotary positions: `vectors` (n, heads, size), each half of the size turned against the other."""
    half = vectors.shape[2] // 2
    left, right = vectors[:, :, :half], vectors[:, :, half:]
    rotated: Floats = np.concatenate([left * cosines - right * sines, right * cosines + left * sines], axis=2)
    return rotated
