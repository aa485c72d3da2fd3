"""Conversations as prompts, by a template or by the markers of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from paceline.engines.chat import ChatTemplate, render_fallback

Messages = Sequence[Mapping[str, object]]
SYSTEM: dict[str, object] = {"role": "system", "content": "Be brief."}
USER: dict[str, object] = {
    "role": "user",
    "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}],
}
ANSWER: dict[str, object] = {"role": "assistant", "content": "hi"}
GEMMA, LLAMA, CHATML = "<start_of_turn>", "<|start_header_id|>", "<|im_start|>"


def render(source: str, messages: Messages, *, add_generation_prompt: bool = True) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, add_generation_prompt=add_generation_prompt)


def fallback(marker: str, messages: Messages, *, add_generation_prompt: bool = True) -> str:
    """The prompt for a vocabulary with one marker."""
    return render_fallback(messages, lambda word: word == marker, "<s>", add_generation_prompt=add_generation_prompt)


def test_templates_have_what_hugging_face_gives_them() -> None:
    source = """{{ bos_token }}{% for message in messages %}
    {% if message.role == "assistant" %}
        {% continue %}
    {% endif %}
{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}{{ {"a": "<é>"} | tojson }}{% endif %}"""
    expected = '<s>system: Be brief.</s>\nuser: Say hi</s>\n{"a": "<é>"}'
    assert render(source, [SYSTEM, ANSWER, USER]) == expected
    year = render("{{ strftime_now('%Y') }}", [USER])
    assert year.isdecimal()
    assert len(year) == 4


def test_developers_speak_as_the_system_does() -> None:
    assert render("{{ messages[0].role }}", [{"role": "developer", "content": ""}]) == "system"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_what_a_template_refuses_is_a_value_error(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        render(source, [USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\].role is 'wizard'; it must be one of system, developer"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([USER, {"role": "user", "content": 5}], r"messages\[1\].content must be a text or a list"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "part of type 'image_url'; this model takes text only",
        ),
        ([{"role": "user", "content": ["x"]}], "part of type 'str'"),
    ],
)
@pytest.mark.parametrize("marker", [GEMMA, ""])
def test_what_is_no_conversation_is_a_value_error(marker: str, messages: Messages, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fallback(marker, messages)
    with pytest.raises(ValueError, match=reason):
        render("x", messages)


def test_gemma_puts_the_system_before_the_user_and_joins_neighbours() -> None:
    messages: Messages = [SYSTEM, USER, ANSWER, {"role": "tool", "content": "42"}, {"role": "user", "content": " so? "}]
    assert fallback(GEMMA, messages) == (
        "<s><start_of_turn>user\nBe brief.\n\nSay hi<end_of_turn>\n"
        "<start_of_turn>model\nhi<end_of_turn>\n"
        "<start_of_turn>user\n42\n\n so?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert fallback(GEMMA, [SYSTEM]) == "<s><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"
    assert fallback(GEMMA, [USER], add_generation_prompt=False).endswith("Say hi<end_of_turn>\n")


def test_llama_and_chatml_have_their_markers() -> None:
    assert fallback(LLAMA, [SYSTEM, USER]) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert fallback(CHATML, [USER, ANSWER], add_generation_prompt=False) == (
        "<s><|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    )


def test_a_vocabulary_without_markers_gets_plain_lines() -> None:
    assert fallback("", [SYSTEM, USER]) == "<s>Be brief.\n\nUser: Say hi\nAssistant:"
    assert fallback("", [USER, ANSWER], add_generation_prompt=False) == "<s>User: Say hi\nAssistant: hi\n"


def test_no_content_is_no_text() -> None:
    assert fallback("", [{"role": "assistant", "content": None, "tool_calls": []}, USER]).startswith("<s>Assistant: \n")
