"""The tokenizer of a model as a hub has it, for front-ends: `tokenizer.json` and the model's own chat template.

The library `tokenizers` alone reads it: neither torch nor transformers is imported. The template is in
`chat_template.jinja` or in `tokenizer_config.json`; a model without one gets a format by its special tokens.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from paceline.engines.base import EngineError
from paceline.engines.chat import ChatPrompts, Control, Conversation, Fragments

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class HfTokenizer:
    """Text to tokens and back. `chat_template`: in place of the model's own. Raises EngineError where a file is missing
    or broken.
    """

    def __init__(
        self, folder: Path, max_model_len: int, vocabulary_size: int, model_name: str, chat_template: str | None = None,
        sampling_defaults: Mapping[str, float] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.max_model_len = max_model_len
        self.vocabulary_size = vocabulary_size
        self.model_name = model_name
        self.sampling_defaults = sampling_defaults
        self._tokenizer = _load(folder / "tokenizer.json")
        # In text, the text of a control token is text. One of its own for each: threads share them.
        self._plain = _load(folder / "tokenizer.json")
        self._plain.encode_special_tokens = True
        config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = {name: _text(config[name]) for name in SPECIAL if config.get(name)}
        controls = {
            token.content: Control(number, token.lstrip, token.rstrip)
            for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }  # fmt: skip
        self.chat_template = chat_template or _template(folder, config)
        self._prompts = ChatPrompts(self.chat_template, controls, self.special_tokens)

    @cached_property
    def longest_piece(self) -> int:
        # A byte-level vocabulary writes a byte as a character, and a blank is one in most: so no piece is longer.
        return max(len(name.encode()) for name in self._tokenizer.get_vocab())

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        tokenizer = self._tokenizer if parse_special else self._plain
        return list(tokenizer.encode(text, add_special_tokens=add_special).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def chat(self, conversation: Conversation) -> Fragments:
        return self._prompts.fragments(conversation)


def _load(path: Path) -> Any:
    try:
        library = importlib.import_module("tokenizers")
    except ImportError:
        raise EngineError("the vllm engine needs tokenizers: pip install 'paceline[vllm]'") from None
    if not path.is_file():
        raise EngineError(f"{path.parent}: has no tokenizer.json")
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises Exception itself.
        raise EngineError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: {error}") from None
    return read if isinstance(read, dict) else {}


def _text(token: Any) -> str:
    """A special token, which is a text or a mapping with its content."""
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None
