"""The tokenizer of the default model: text, special tokens, conversations."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from paceline.engines.base import EngineError, EngineSettings
from paceline.engines.chat import ChatPrompts, Conversation
from paceline.engines.gguf import GGUFHeader, read_header
from paceline.engines.llama import LlamaEngine
from paceline.engines.llama_text import LlamaTokenizer, Vocabulary, _stand_ins, load_vocabulary, slug

pytestmark = pytest.mark.slow
BOS, EOS, TURN, END_OF_TURN = 2, 1, 105, 106


def test_it_knows_the_model(tokenizer: LlamaTokenizer) -> None:
    assert tokenizer.model_name == "gemma-3-270m"
    assert tokenizer.vocabulary_size == 262144
    assert tokenizer.max_model_len == 4096
    assert LlamaEngine.tokenizer(EngineSettings(max_model_len=100)).max_model_len == 100


@given(text=st.text(max_size=60))
def test_text_comes_back_as_it_was(tokenizer: LlamaTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["日本語 🎉 naïve 𒀀", "  leading and trailing  ", "\n\tdef f():\n\t\tpass\n", "a\0b", ""]
)
def test_awkward_text_comes_back_as_it_was(tokenizer: LlamaTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_a_lone_surrogate_is_a_replacement_character(tokenizer: LlamaTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"


def test_special_tokens_are_text_unless_asked_for(tokenizer: LlamaTokenizer) -> None:
    assert tokenizer.encode("<end_of_turn>", add_special=False, parse_special=True) == [END_OF_TURN]
    as_text = tokenizer.encode("<end_of_turn>", add_special=False)
    assert END_OF_TURN not in as_text
    assert tokenizer.decode(as_text) == "<end_of_turn>"
    assert tokenizer.decode([BOS, END_OF_TURN, *as_text, EOS]) == "<end_of_turn>"


def test_bos_is_never_doubled(tokenizer: LlamaTokenizer) -> None:
    assert tokenizer.encode("hi")[0] == BOS
    assert tokenizer.encode("hi", add_special=False)[0] != BOS
    assert tokenizer.encode("<bos>hi", parse_special=True) == tokenizer.encode("hi")
    assert chat(tokenizer, "hi")[:2] == [BOS, TURN]


def test_gemma_has_its_format_without_a_template_of_its_own(tokenizer: LlamaTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    made = tokenizer.chat(Conversation(messages))
    assert made == [BOS, TURN, "user\nBe brief.\n\nHi", END_OF_TURN, "\n", TURN, "model\n"]


@pytest.mark.parametrize("text", ["hi", "  so?\n\n", "日本 <b>x</b>", "<end_of_turn>", "a<bos>"])
def test_a_prompt_in_fragments_has_the_tokens_of_the_whole(tokenizer: LlamaTokenizer, text: str) -> None:
    made = tokenizer.chat(Conversation([{"role": "user", "content": text}]))
    apart = [token for part in made for token in ([part] if isinstance(part, int) else plain(tokenizer, part))]
    whole = f"<bos><start_of_turn>user\n{text.strip()}<end_of_turn>\n<start_of_turn>model\n"
    parsed = tokenizer.encode(whole, add_special=False, parse_special=True)
    assert (apart == parsed) == (text not in ("<end_of_turn>", "a<bos>")), "what a message brings along is text"
    assert tokenizer.decode(apart).count("_of_turn") == ("_of_turn" in text)


def plain(tokenizer: LlamaTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)


def chat(tokenizer: LlamaTokenizer, text: str) -> list[str | int]:
    return tokenizer.chat(Conversation([{"role": "user", "content": text}]))


def test_a_template_in_the_file_is_used(model_file: Path) -> None:
    header = read_header(model_file)
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    own = GGUFHeader({**header.metadata, "tokenizer.chat_template": template}, header.array_lengths)
    vocabulary = Vocabulary(load_vocabulary(model_file))
    tokenizer = LlamaTokenizer(vocabulary, own, model_file, 100)
    assert chat(tokenizer, "Hi") == [BOS, "[user] Hi"]
    named = GGUFHeader({**own.metadata, "tokenizer.chat_template": "{{ bos_token }}x"}, header.array_lengths)
    tokenizer = LlamaTokenizer(vocabulary, named, model_file, 100)
    assert chat(tokenizer, "Hi") == [BOS, "x"]
    nameless = GGUFHeader({"tokenizer.chat_template": "x"}, {})
    assert LlamaTokenizer(vocabulary, nameless, model_file, 100).model_name == model_file.stem


def test_a_vocabulary_knows_its_markers_and_bytes(model_file: Path) -> None:
    vocabulary = Vocabulary(load_vocabulary(model_file))
    controls = vocabulary.controls()
    assert controls["<start_of_turn>"].token_id == TURN
    assert "<|im_start|>" not in controls
    assert vocabulary.longest_piece() == 48
    assert {EOS, END_OF_TURN} <= vocabulary.ends
    assert vocabulary.piece(END_OF_TURN, special=False) == b""
    assert vocabulary.piece(END_OF_TURN, special=True) == b"<end_of_turn>"
    assert vocabulary.piece(10**7, special=True) == b""
    assert vocabulary.is_end(EOS)
    assert vocabulary.is_end(END_OF_TURN)
    assert not vocabulary.is_end(TURN)


def test_the_stand_ins_cover_every_byte() -> None:
    assert sorted(_stand_ins().values()) == list(range(256))
    assert (_stand_ins()["Ġ"], _stand_ins()["Ċ"], _stand_ins()["a"]) == (32, 10, 97)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Gemma 3 270m", "gemma-3-270m"), ("Qwen2.5 0.5B (Instruct)", "qwen2.5-0.5b-instruct"), ("--", "")],
)
def test_names_are_slugs(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_a_broken_template_is_one_line() -> None:
    with pytest.raises(EngineError, match="chat template is broken"):
        ChatPrompts("{% for %}", {}, {})
