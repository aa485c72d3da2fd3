"""The tokenizer of a hub's model: its files, its template, text to tokens and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from paceline.engines.base import EngineError
from paceline.engines.chat import Conversation
from paceline.engines.hf import HfTokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([Path(__file__).read_text()], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("model")
    made.save(str(path / "tokenizer.json"))
    return path


def tokenizer(folder: Path, template: str | None = None) -> HfTokenizer:
    return HfTokenizer(folder, 64, 300, "name", template)


def said_by(made: HfTokenizer) -> list[str | int]:
    return made.chat(Conversation([{"role": "user", "content": "hi"}]))


def test_there_and_back(folder: Path) -> None:
    made = tokenizer(folder)
    text = "def make: é, 漢字, \U0001f600\n"
    ids = made.encode(text)
    assert ids[0] == 0
    assert made.decode(ids) == text
    assert made.encode(text, add_special=False) == ids[1:]
    assert made.encode("<|im_end|>", add_special=False, parse_special=True) == [2]
    assert 2 not in made.encode("<|im_end|>", add_special=False), "text is text"
    assert made.longest_piece >= max(len(made.decode([token]).encode()) for token in ids)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})),
    ],
)
def test_its_own_template(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.write_text(content)
    try:
        said = said_by(tokenizer(folder))
    finally:
        path.unlink()
    assert said == ["[user]hi>"]


def test_the_template_of_the_flag_comes_first(folder: Path) -> None:
    made = tokenizer(folder, "{{ bos_token }}{{ messages[0].content }}")
    assert said_by(made) == ["hi"]


def test_a_model_without_one_gets_the_format_of_its_tokens(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    said = said_by(tokenizer(folder))
    (folder / "tokenizer_config.json").unlink()
    assert said == [1, "user\nhi", 2, "\n", 1, "assistant\n"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has no tokenizer\.json"):
        tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        tokenizer(tmp_path)


def test_a_front_end_loads_no_model_library() -> None:
    program = (
        "import sys, paceline.engines.vllm, tokenizers; "
        "print([one for one in ('torch', 'vllm', 'transformers', 'numpy') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
