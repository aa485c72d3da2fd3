"""How long answers come to be: their limit is known, and how often they end before it is counted."""

from __future__ import annotations

from paceline.protocol.sampling import SamplingParams

HALF_LIFE_TOKENS = 20_000


class AnswerLengths:
    """Expects each token of an answer to be its last as often as tokens lately were.

    Answers that went to their limit count for their tokens alone: they would have gone on.
    """

    __slots__ = ("_ends", "_tokens")

    def __init__(self) -> None:
        self._ends = 0.0
        self._tokens = 0.0

    def ended(self, params: SamplingParams, made: int, limit: int) -> None:
        """An answer ended at `made` of `limit` tokens, by itself or because nobody wants more of it."""
        if _goes_to_its_limit(params):
            return
        keep = 0.5 ** (made / HALF_LIFE_TOKENS)
        self._tokens = self._tokens * keep + made
        self._ends = self._ends * keep + (made < limit)

    def left(self, params: SamplingParams, limit: int) -> float:
        """How many more tokens an answer is expected to get that may get `limit` more."""
        if _goes_to_its_limit(params) or self._ends <= 0.0 or self._tokens <= 0.0:
            return limit
        rate = min(1.0, self._ends / self._tokens)
        return (1.0 - (1.0 - rate) ** limit) / rate


def _goes_to_its_limit(params: SamplingParams) -> bool:
    return params.ignore_eos and not params.stop and not params.stop_token_ids
