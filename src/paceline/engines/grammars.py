"""Answers of a given form: what of a model's vocabulary may come next, by the package llguidance.

A form (`StructuredOutput`) is checked in a front-end, without a vocabulary and within milliseconds, and followed in a
rank, where one `Form` goes with each request: it takes each token that is chosen and says which may come. It is made
from the tokens alone, so another rank that goes on with a half-written answer has it as soon as it has those.

JSON may hold blanks where JSON may have them, up to a line's end and its indentation: without a bound, small models
write blanks until the answer's limit.

What it costs on one core: the tokenizer 0.1 s for 49 thousand tokens and 0.6 s for 262 thousand, once for an engine;
a form about 1 ms; taking a token 2 us; the mask of what may come 10 to 100 us.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from paceline.core.requests import StructuredOutput
from paceline.engines.base import EngineError

BLANKS = r"\n? {0,24}"
"""Between the parts of JSON."""


class Spells(Protocol):
    """A vocabulary, as far as a form must know it."""

    size: int
    bos: int
    eos: int

    @property
    def ends(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...

    def piece(self, token: int, *, special: bool) -> bytes: ...

    def control_ids(self) -> set[int]: ...


def library() -> Any:
    """The module `llguidance`. Raises EngineError where it is missing."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise EngineError("structured outputs need llguidance: pip install 'paceline[llama]'") from None


def check_form(form: StructuredOutput) -> None:
    """Raises ValueError saying what is wrong with a form."""
    error = library().LLMatcher.validate_grammar(_grammar(form))
    if error:
        raise ValueError(error.splitlines()[0][:500])


def _grammar(form: StructuredOutput) -> str:
    """The form in llguidance's own words. Raises ValueError."""
    if form.kind == "json":
        return str(library().LLMatcher.grammar_from_json_schema(form.text, defaults={"whitespace_pattern": BLANKS}))
    return str(library().grammar_from(form.kind, form.text))


class Grammars:
    """Makes the forms of one engine's requests."""

    def __init__(self, vocabulary: Spells) -> None:
        self._vocabulary = vocabulary

    @cached_property
    def _tokenizer(self) -> Any:
        known = self._vocabulary
        ends = sorted(known.ends) or [known.eos]

        class Tokens:
            eos_token_id = known.eos if known.eos >= 0 else ends[0]
            bos_token_id = known.bos if known.bos >= 0 else None
            tokens = [known.piece(token, special=True) for token in range(known.size)]
            special_token_ids = sorted(known.control_ids() | known.ends)

            def __call__(self, text: str) -> list[int]:
                return known.encode(text, add_special=False, parse_special=False)

        found = library()
        return found.LLTokenizer(found.TokenizerWrapper(Tokens()), n_vocab=known.size, eos_token=ends)

    def begin(self, form: StructuredOutput) -> Form:
        """An answer's form at its beginning. Raises ValueError where it is none, or too large."""
        matcher = library().LLMatcher(self._tokenizer, _grammar(form), log_level=0)
        # What is too large shows with the first mask.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(str(matcher.get_error()).splitlines()[0][:500])
        return Form(matcher, self._vocabulary.size)


class Form:
    """Where one answer stands in its form. `ended`: nothing may follow but an end of the answer."""

    __slots__ = ("_matcher", "_size")

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher = matcher
        self._size = size

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> bool:
        """Go on with this token; False, and nothing has changed, where it may not come."""
        return not self._matcher.is_stopped() and self._matcher.try_consume_tokens([token]) == 1

    def allowed(self) -> Sequence[bool]:
        """For each token of the vocabulary, as an array, whether it may come."""
        # Here and not at the top: front-ends check forms, and need no numpy.
        numpy: Any = importlib.import_module("numpy")
        packed = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        mask: Sequence[bool] = numpy.unpackbits(packed, bitorder="little")[: self._size].astype(bool)
        return mask
