"""The `moe` engine's tokens: a token a byte, and two special ones, the beginning and the end of a text.

A conversation is lines of `User: …` and `Assistant: …` behind `<bos>`, as for a base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from paceline.engines.chat import render_fallback

BOS, EOS = 256, 257
VOCABULARY = 258
SPECIAL = {"<bos>": BOS, "<eos>": EOS}
SPECIAL_TEXT = {token: text.encode() for text, token in SPECIAL.items()}
MARKER = re.compile("|".join(map(re.escape, SPECIAL)))


class MoeTokenizer:
    """Text to bytes, and back."""

    def __init__(self, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.vocabulary_size = VOCABULARY
        self.model_name = "paceline-moe"

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        tokens = [BOS] if add_special else []
        begin = 0
        for marker in MARKER.finditer(text) if parse_special else ():
            tokens += text[begin : marker.start()].encode()
            tokens.append(SPECIAL[marker.group()])
            begin = marker.end()
        tokens += text[begin:].encode()
        return tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(piece(token, special=False) for token in token_ids).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True
    ) -> str:
        return render_fallback(messages, lambda marker: False, "<bos>", add_generation_prompt=add_generation_prompt)


def piece(token: int, *, special: bool) -> bytes:
    """The bytes of a token; of a special one its name or, without `special`, nothing."""
    if token < BOS:
        return bytes((token,))
    return SPECIAL_TEXT[token] if special else b""
