"""A layer's experts, sharded over the group: expert e lives at the member in place e modulo their number.

Two all-to-alls in every layer of every step. The first carries each token to the members that own its experts, the
second carries the results back. A member without tokens of its own takes part with empty arrays, and computes its
experts for the others all the same; without it nobody gets further. What a member sends to another depends on its own
tokens alone, and results are put together in the order of experts, so that neither the number of members nor who
computes what shows in a token's bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paceline.engines.base import EngineError
from paceline.engines.group import GenerationEnded, RankGroup, Reduction
from paceline.engines.moe_arithmetic import Floats, rows_times, softmax

if TYPE_CHECKING:
    from paceline.engines.group import Array

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
            raise GenerationEnded("generation 0 has ended")


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
