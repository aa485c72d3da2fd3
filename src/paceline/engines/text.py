"""Incremental text: the bytes of tokens in, text that may be shown now out.

Two things forbid showing a token's bytes at once. A token may end inside a UTF-8 character (byte
tokens, emoji, CJK), and what looks like plain text may be the beginning of a stop string, whose end
comes with a later token or never. So text is held back twice: bytes until their character is whole,
and the longest end of the text that a stop string begins with. Nothing else is ever held back, and
nothing that was shown is ever taken back.

The result depends on the text alone, never on how it was cut into tokens. Where several stop strings
occur, the one counts whose last character comes first; of those that end at the same character, the
longest. That is what one sees when characters come one at a time, so it is the only rule that does not
depend on the cuts.

How long answers come to be: their limit is known, and how often they end before it is counted.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from paceline.core.requests import SamplingParams


class IncrementalText:
    """The text of one answer. After `stopped_by` is set, or after `finish`, push nothing more."""

    def __init__(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, piece: bytes) -> str:
        """Add one token's bytes; returns the text that may be shown now, often with a delay of a token."""
        return self._show(self._decoder.decode(piece))

    def finish(self) -> str:
        """No more comes: the rest of the text. Bytes of an unfinished character become U+FFFD."""
        shown = self._show(self._decoder.decode(b"", True))
        if self.stopped_by is None:
            shown += self._held
            self._held = ""
        return shown

    def _show(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        match = self._find(text)
        if match is not None:
            start, stop = match
            self.stopped_by = stop
            self._held = ""
            return text[: start + len(stop)] if self._include_stop else text[:start]
        held = self._length_held_back(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _find(self, text: str) -> tuple[int, str] | None:
        """Where the first match begins and which stop string it is, or None."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _length_held_back(self, text: str) -> int:
        """Length of the longest end of `text` that some stop string begins with."""
        longest = min(len(text), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0


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
