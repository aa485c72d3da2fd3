"""A model's vocabulary: text to tokens, and tokens to bytes.

Bytes and not text, because a token may hold half a character. cyllama decodes every piece and so turns
such halves into U+FFFD; where one appears, the bytes are taken from the vocabulary entry itself: `<0xE2>`
in SentencePiece vocabularies, GPT-2's printable stand-ins for bytes in BPE ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

BYTE_PAIR = 2
"""llama.cpp's number for BPE vocabularies."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
REPLACEMENT = "\ufffd"


class Vocabulary:
    """The vocabulary of a model; keep the model alive as long as this."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocabulary = model.get_vocab()
        self.size: int = self._vocabulary.n_vocab
        self.adds_bos: bool = self._vocabulary.get_add_bos()
        self.bos: int = self._vocabulary.token_bos()
        self.eos: int = self._vocabulary.token_eos()
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of `text`. A BOS that the text brings along is not doubled."""
        # A lone surrogate (JSON allows "\ud83d") is no character and has no UTF-8 form.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokens: list[int] = self._vocabulary.tokenize(text, add_special, parse_special)
        if add_special and self.bos >= 0 and tokens[:2] == [self.bos, self.bos]:
            del tokens[0]
        return tokens

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes of one token; those of a control token only with `special`."""
        piece = self._pieces.get((token, special))
        if piece is None:
            piece = self._pieces[token, special] = self._read_piece(token, special)
        return piece

    def text(self, tokens: Iterable[int], *, special: bool) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer (EOS, end of turn, …)."""
        return bool(self._vocabulary.is_eog(token))

    def special_text(self, token: int) -> str:
        """How a special token is written, "" where there is none."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def knows(self, marker: str) -> bool:
        """Whether `marker` is one token of this vocabulary."""
        tokens = self._vocabulary.tokenize(marker, False, True)
        return len(tokens) == 1 and self.special_text(tokens[0]) == marker

    def _read_piece(self, token: int, special: bool) -> bytes:
        if not 0 <= token < self.size:
            return b""
        shown: str = self._vocabulary.token_to_piece(token, 0, special)
        if REPLACEMENT not in shown:
            return shown.encode()
        try:
            entry: str = self._vocabulary.get_text(token)
        except UnicodeDecodeError:
            return shown.encode()
        byte = BYTE_TOKEN.match(entry)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if self._vocabulary.vocab_type == BYTE_PAIR:
            stand_ins = _stand_ins()
            if all(character in stand_ins for character in entry):
                return bytes(stand_ins[character] for character in entry)
        return shown.encode()


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
