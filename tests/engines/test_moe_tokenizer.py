"""The byte tokenizer: nothing is lost, and special tokens come from templates only."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from paceline.engines.base import EngineSettings
from paceline.engines.chat import Conversation
from paceline.engines.moe import BOS, EOS, MoeEngine, MoeTokenizer

TOKENIZER = MoeTokenizer(99)


@given(text=st.text() | st.from_regex(r"(<bos>|<eos>|[a<])*", fullmatch=True))
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.encode(text)[0] == BOS
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert all(token < BOS for token in TOKENIZER.encode(text, add_special=False))
    parsed = TOKENIZER.encode(text, add_special=False, parse_special=True)
    assert TOKENIZER.decode(parsed) == text.replace("<bos>", "").replace("<eos>", "")


def test_special_tokens() -> None:
    assert TOKENIZER.encode("<bos>é<eos>", add_special=False, parse_special=True) == [BOS, 0xC3, 0xA9, EOS]


def test_chat_template() -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <eos>"}]
    assert TOKENIZER.chat(Conversation(said)) == [BOS, "Be brief.\n\nUser: hi <eos>\nAssistant:"]
    with pytest.raises(ValueError, match="role"):
        TOKENIZER.chat(Conversation([{"role": "nobody", "content": "hi"}]))


def test_limits_are_the_engines() -> None:
    assert MoeEngine.tokenizer(EngineSettings(max_model_len=50)).max_model_len == 50
    assert MoeEngine.tokenizer(EngineSettings(kv_cache_tokens=70)).max_model_len == 70
    assert MoeEngine.tokenizer(EngineSettings()).max_model_len == 4096
