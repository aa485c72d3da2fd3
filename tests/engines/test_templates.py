"""Templates of the published forms, and the default model's own, say what they say in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.engines import chat
from paceline.engines.gguf import read_header
from paceline.engines.models import model_path
from paceline.server.tools import reasoning_language, tool_language
from tests.engines.published import differences

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("templates/*.jinja")}
LANGUAGES = {
    "deepseek-r1": ("deepseek_v3", "think"), "deepseek-v3": ("deepseek_v3", "none"),
    "gpt-oss-short": ("openai", "openai_gptoss"), "granite": ("granite", "none"),
    "llama3.1-short": ("llama3_json", "none"), "mistral-v3": ("mistral", "none"),
    "qwen2.5": ("hermes", "none"), "qwen3-short": ("hermes", "think"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_published_template_says_what_it_says_in_transformers(name: str) -> None:
    assert differences(TEMPLATES[name]) == []


@pytest.mark.slow
def test_the_default_model_s_own_template_says_what_it_says_in_transformers() -> None:
    template = read_header(model_path(None, lambda what, share: None)).text("tokenizer.chat_template")
    assert template
    assert differences(template) == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_template_tells_how_its_model_writes(name: str) -> None:
    assert (tool_language(TEMPLATES[name]), reasoning_language(TEMPLATES[name])) == LANGUAGES[name]


def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(chat, "_to_json", lambda value, *given, **named: "{}")
        assert differences(TEMPLATES["qwen2.5"]) != []
    monkeypatch.setattr(chat.ChatPrompts, "_guarded", lambda self, conversation: ("", conversation))
    assert "markers in 1 messages become control tokens" in differences(TEMPLATES["qwen2.5"])
