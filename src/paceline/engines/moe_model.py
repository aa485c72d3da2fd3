"""The `moe` engine's transformer: decoder-only, rotary positions, experts in place of the feed-forward part.

    x = embedding[token]
    in every layer:  x += attention(norm(x));  x += experts(norm(x))
    logits = norm(x) head + bias

KV is an array a request, handed in by the engine. A forward pass writes it behind what is computed already, and
nothing else: one that is broken off leaves numbers that the next one overwrites.

Arithmetic whose result for one token does not depend on what else is in the batch.

A matrix product of several rows goes through kernels that BLAS picks by the number of rows, and these add up in
different orders: the same token next to three others gets other last bits than alone, some argmax then falls the
other way, and answers depend on who else is served. Here every row is a product of its own (`matmul` of a stack of
one-row matrices calls BLAS once a row), always of the same shape, so its bits are always the same. Measured for
64 rows by 64 x 128: 32 us, against 12 us for the product at once, 90 us for `einsum`, which is without BLAS, and
20 us for blocks of rows filled up to 16. The blocks are not taken because a row's place in its block would have to be
without influence too, which nobody promises, and because a single row then takes 7 us in place of 2.5.

BLAS also divides what is large among threads, one a core. Ranks share cores, so that its threads wait for each other
through the scheduler: 24 ms at worst on two busy cores for a product that never takes 0.3 ms on one thread. And the
number of cores would enter into the bits. OpenBLAS divides a matrix-vector product above 9,216 elements, so larger
matrices are cut into columns, and attention into blocks of positions. An environment variable against its threads
would come too late, as NumPy reads it when it is imported.

The `moe` engine's weights: made from a seed, or mapped from a file that may change under the running engine.

Every rank has all the weights within reach and computes with its own experts only: after a change of the group any
rank can be any expert's owner at once, and nothing is moved.

A file is mapped read-only and shared. Whoever rewrites it in place, `write_weights` or a trainer, changes the
weights of all ranks of the machine at once, without a word to them; between steps, or the step under way computes
with a mixture.

A layer's experts, sharded over the group: expert e lives at the member in place e modulo their number.

Two all-to-alls in every layer of every step. The first carries each token to the members that own its experts, the
second carries the results back. A member without tokens of its own takes part with empty arrays, and computes its
experts for the others all the same; without it nobody gets further. What a member sends to another depends on its own
tokens alone, and results are put together in the order of experts, so that neither the number of members nor who
computes what shows in a token's bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.engines.base import EngineError
from paceline.engines.group import Array, EpochEnded, RankGroup, Reduction
from paceline.engines.moe import EOS, FLOAT_BYTES, VOCABULARY, MoeConfig, MoeOptions, check_weights

Floats = NDArray[np.float32]

MOST_ELEMENTS = 8192
EPSILON = np.float32(1e-6)


def rows_times(rows: Floats, matrix: Floats) -> Floats:
    """`rows` (n, k) times `matrix` (k, m): (n, m), each row by itself."""
    inputs, outputs = matrix.shape
    stack = rows[:, None, :]
    if matrix.size <= MOST_ELEMENTS:
        product: Floats = np.matmul(stack, matrix)[:, 0]
        return product
    product = np.empty((len(rows), outputs), np.float32)
    width = max(1, MOST_ELEMENTS // inputs)
    for begin in range(0, outputs, width):
        product[:, begin : begin + width] = np.matmul(stack, matrix[:, begin : begin + width])[:, 0]
    return product


def normalise(rows: Floats) -> Floats:
    """Each row (n, d) divided by the root of its mean square (RMSNorm without a gain)."""
    squares = (rows * rows).sum(axis=1, dtype=np.float32) / np.float32(rows.shape[1])
    normalised: Floats = rows / np.sqrt(squares + EPSILON)[:, None]
    return normalised


def softmax(scores: Floats) -> Floats:
    """Softmax over the last axis, of a new array."""
    shifted: Floats = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def attend(query: Floats, keys: Floats, values: Floats) -> Floats:
    """One token's attention. `query` (heads, d), `keys` and `values` (heads, positions, d): (heads, d).

    All positions given are seen, so the caller cuts them off at the token's own: then the shape is the same however
    the prompt was cut into chunks.
    """
    heads, positions, size = keys.shape
    block = MOST_ELEMENTS // size
    stack = query[:, None, :]
    if positions <= block:
        seen: Floats = np.matmul(softmax(np.matmul(stack, keys.transpose(0, 2, 1))), values)[:, 0]
        return seen
    scores = np.empty((heads, 1, positions), np.float32)
    for begin in range(0, positions, block):
        part = keys[:, begin : begin + block].transpose(0, 2, 1)
        scores[:, :, begin : begin + block] = np.matmul(stack, part)
    weights = softmax(scores)
    seen = np.zeros_like(query)
    for begin in range(0, positions, block):
        seen += np.matmul(weights[:, :, begin : begin + block], values[:, begin : begin + block])[:, 0]
    return seen


Weights = dict[str, Floats]

SHARPNESS = {"embedding": 0.5, "query": 2.0, "key": 2.0, "output": 2.0, "head": 2.0}
"""What is larger or smaller than that: attention counts for more, so that all of the context shows in the text, and
a temperature of 1 prefers what greedy sampling takes."""
UNREADABLE_BIAS = -30.0
END_BIAS = -1.0
READABLE = b"abcdefghijklmnopqrstuvwxyz ,."


def load_weights(options: MoeOptions) -> Weights:
    """The tensors by name, as `MoeConfig.shapes` has them. Raises EngineError where the file cannot be used."""
    if options.weights is None:
        return _by_name(options.config, make_weights(options.config, options.weights_seed))
    check_weights(options.weights, options.config)
    mapped = np.memmap(options.weights, np.float32, "r")
    # A plain array over the same memory: every slice of a memmap costs a call into Python.
    return _by_name(options.config, np.asarray(mapped))


def make_weights(config: MoeConfig, seed: int) -> Floats:
    """All weights as one array, in the order of a weights file. The same on every machine.

    Uniform and scaled so that every sum over inputs has variance 1: exact operations only, where a normal
    distribution would bring in logarithms that differ between machines in the last bit.
    """
    flat = np.random.Generator(np.random.PCG64(seed)).random(config.parameters, np.float32)
    flat -= np.float32(0.5)
    flat *= np.float32(2.0)
    for name, tensor in _by_name(config, flat).items():
        inputs = 1 if tensor.ndim == 1 or name == "embedding" else tensor.shape[-2]
        tensor *= np.float32(SHARPNESS.get(name.rpartition(".")[2], 1.0) * math.sqrt(3.0 / inputs))
        if name == "bias":
            # Answers that people can read: letters and spaces, and the end now and then.
            tensor[:] = UNREADABLE_BIAS
            tensor[list(READABLE)] = 0.0
            tensor[EOS] = END_BIAS
    return flat


def write_weights(path: str | os.PathLike[str], config: MoeConfig, seed: int) -> None:
    """Write the weights of a seed into a file, in place: whoever has it mapped has the new weights from now on.

    The file is made where there is none; one that exists keeps its inode, and is never emptied in between.
    """
    weights = make_weights(config, seed)
    descriptor = os.open(Path(path), os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b") as file:
        os.ftruncate(descriptor, config.parameters * FLOAT_BYTES)
        file.write(weights.data)


def _by_name(config: MoeConfig, flat: Floats) -> Weights:
    tensors: Weights = {}
    begin = 0
    for name, shape in config.shapes:
        end = begin + math.prod(shape)
        tensors[name] = flat[begin:end].reshape(shape)
        begin = end
    assert tensors["bias"].size == VOCABULARY
    return tensors


Indices = NDArray[np.intp]


class Alone(RankGroup):
    """A group of one: its collectives return at once."""

    def __init__(self) -> None:
        super().__init__(0, 0, [0])
        self._ended = False

    def all_reduce(self, values: Sequence[int], reduction: Reduction | Sequence[Reduction]) -> list[int]:
        self._check()
        return list(values)

    def all_to_all(self, arrays: Sequence[Array]) -> list[Array]:
        self._check()
        return list(arrays)

    def leave(self) -> None:
        self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise EpochEnded("epoch 0 has ended")


class Experts:
    """The experts of one layer. `router` (d, experts), `up` (experts, d, hidden), `down` (experts, hidden, d)."""

    def __init__(self, router: Floats, up: Floats, down: Floats, per_token: int) -> None:
        self._router = router
        self._up = up
        self._down = down
        self._per_token = per_token

    def compute(self, rows: Floats, group: RankGroup) -> Floats:
        """What this layer's experts make of `rows` (n, d), n may be 0. Raises GenerationEnded."""
        chosen, shares = self._choose(rows)
        size, width = len(group.members), rows.shape[1]
        pairs = chosen.ravel()
        places = [np.flatnonzero(pairs % size == place) for place in range(size)]
        received = group.all_to_all([_message(rows, pairs, place, self._per_token) for place in places])
        back = group.all_to_all(self._own(received, group, width))
        results = np.empty((len(pairs), width), np.float32)
        for place, result in zip(places, back, strict=True):
            results[place] = result
        parts = results.reshape(len(rows), self._per_token, width)
        mixed = np.zeros_like(rows)
        for nth in range(self._per_token):
            mixed += parts[:, nth] * shares[:, nth, None]
        return mixed

    def _choose(self, rows: Floats) -> tuple[Indices, Floats]:
        """Each row's experts (n, per token), in the order of their numbers, and their shares, which add up to 1."""
        scores = rows_times(rows, self._router)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._per_token]
        chosen = np.sort(best, axis=1)
        return chosen, softmax(np.take_along_axis(scores, chosen, axis=1))

    def _own(self, received: Sequence[Array], group: RankGroup, width: int) -> list[Array]:
        """The results for each member, of the tokens it sent."""
        for member, message in zip(group.members, received, strict=True):
            if message.ndim != 2 or message.shape[1] != width + 1 or message.dtype != np.float32:
                raise EngineError(f"rank {member} runs another model: its tokens are {message.dtype}{message.shape}")
        tokens = np.concatenate(received).astype(np.float32, copy=False)
        numbers = tokens[:, width].astype(np.intp)
        results = np.empty((len(tokens), width), np.float32)
        place = group.members.index(group.rank)
        for number in np.unique(numbers):
            if number % len(group.members) != place or not 0 <= number < len(self._up):
                raise EngineError(f"rank {group.rank} is sent tokens for expert {number}, which it does not have")
            mine = np.flatnonzero(numbers == number)
            results[mine] = self._expert(int(number), tokens[mine, :width])
        ends = np.cumsum([len(message) for message in received])
        return list(np.split(results, ends[:-1]))

    def _expert(self, number: int, rows: Floats) -> Floats:
        hidden = np.maximum(rows_times(rows, self._up[number]), np.float32(0))
        # Squared ReLU: its gates are as sharp as a SwiGLU's, without exponentials.
        return rows_times(hidden * hidden, self._down[number])


def _message(rows: Floats, pairs: Indices, place: Indices, per_token: int) -> Floats:
    """The tokens for one member, (m, d + 1): behind each its expert's number, which float32 holds exactly."""
    width = rows.shape[1]
    message = np.empty((len(place), width + 1), np.float32)
    message[:, :width] = rows[place // per_token]
    message[:, width] = pairs[place]
    return message


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
