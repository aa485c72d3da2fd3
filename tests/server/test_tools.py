"""What models write: calls and reasoning of every language, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from paceline.server.tools import (
    FORCED,
    TOOL_LANGUAGES,
    TOOL_PARSERS,
    Reader,
    Said,
    begins_in,
    language,
    reasoning_language,
    tool_language,
)

CALL = {"city": 'Paris "}</b> é', "days": 2, "deep": {"a": [1, {"b": None}]}}
FLAT = {"city": "Paris, {x}", "days": 2, "deep": {"a": [1, True]}}
ARGUMENTS = json.dumps(CALL, ensure_ascii=False)
ONE = [("get_weather", CALL)]
TWO = [("get_weather", CALL), ("now", {})]
OBJECT = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
SECOND = '{"name": "now", "arguments": {}}'

# Language, what was written, content, reasoning, calls.
WRITTEN: dict[str, tuple[str, str, str, str, list[tuple[str, Any]]]] = {
    "hermes": ("hermes", f"Let me see.\n<tool_call>\n{OBJECT}\n</tool_call>", "Let me see.", "", ONE),
    "hermes twice": (
        "hermes", f"<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{SECOND}\n</tool_call>", "", "", TWO),
    "hermes without arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", "", [("now", {})]),
    "hermes, arguments first": (
        "hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "get_weather"}}</tool_call>', "", "", ONE),
    "hermes, arguments as text": (
        "hermes", f'<tool_call>{{"name": "get_weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>', "", "",
        ONE),
    "hermes and none": ("hermes", "2 < 3, <tool is no call ", "2 < 3, <tool is no call ", "", []),
    "hermes, thinking": (
        "hermes", f"<think>\nWhere?\n</think>\n\nSo:\n<tool_call>{OBJECT}</tool_call>", "So:", "Where?", ONE),
    "llama 3": ("llama3_json", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', "", "", ONE),
    "llama 3, two": (
        "llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}; {SECOND}', "", "", TWO),
    "llama 3, text": ("llama3_json", "It rains {now}.", "It rains {now}.", "", []),
    "llama 3, JSON": ("llama3_json", '{"answer": 3}', '{"answer": 3}', "", []),
    "mistral": ("mistral", f"[TOOL_CALLS] [{OBJECT}, {SECOND}]", "", "", TWO),
    "mistral, new": (
        "mistral", f"Yes.[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}", "Yes.", "", TWO),
    "mistral, ids": ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}", "", "", ONE),
    "gemma": (
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris, {x}<escape>,days:2,deep:{a:[1,true]}}"
        "<end_function_call><start_function_call>call:now{}<end_function_call>", "", "",
        [("get_weather", FLAT), ("now", {})]),
    "deepseek 3": (
        "deepseek_v3",
        "See:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "See:", "", TWO),
    "deepseek 3.1": (
        "deepseek_v3",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>", "", "", ONE),
    "qwen 3 coder": (
        "qwen3_coder",
        "See:\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis, {x}\n</parameter>\n<parameter=days>\n2\n"
        '</parameter>\n<parameter=deep>\n{"a": [1, true]}\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n'
        "<function=now>\n</function>\n</tool_call>", "See:", "", [("get_weather", FLAT), ("now", {})]),
    "glm 4.5": (
        "glm45",
        "<think>Where?</think>See:\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris, {x}</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n<arg_key>deep</arg_key>\n"
        '<arg_value>{"a": [1, true]}</arg_value>\n</tool_call>\n<tool_call>now</tool_call>', "See:", "Where?",
        [("get_weather", FLAT), ("now", {})]),
    "granite": ("granite", f"<|tool_call|>[{OBJECT}, {SECOND}]", "", "", TWO),
    "phi 4": ("phi4_mini_json", f"functools[{OBJECT}]", "", "", ONE),
    "gpt-oss": (
        "openai",
        "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{ARGUMENTS}<|call|>", "", "Where?", ONE),
    "gpt-oss, the other way": (
        "openai", f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}", "",
        "", ONE),
    "gpt-oss, text": (
        "openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It rains.",
        "It rains.", "Hm.", []),
}  # fmt: skip


def read(reader: Reader, *pieces: str) -> Said:
    whole = Said()
    for piece in pieces:
        whole.add(reader.push(piece))
    whole.add(reader.finish())
    return whole


def check(name: str, *pieces: str) -> None:
    spoken, _, content, reasoning, calls = WRITTEN[name]
    modes = language(spoken, "think")
    assert modes is not None
    said = read(Reader(modes), *pieces)
    assert (said.content, said.reasoning) == (content, reasoning)
    assert [(call.name, json.loads(call.arguments)) for call in said.calls] == calls
    identities = [call.identity for call in said.calls]
    assert all(len(one) == 9 and one.isalnum() for one in identities)
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_written_is_what_is_said_whole_and_letter_by_letter(name: str) -> None:
    check(name, WRITTEN[name][1])
    check(name, *WRITTEN[name][1])


@given(st.sampled_from(sorted(WRITTEN)), st.data())
def test_the_cuts_make_no_difference(name: str, data: st.DataObject) -> None:
    text = WRITTEN[name][1]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    check(name, *(text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)))


@given(st.sampled_from(sorted(TOOL_LANGUAGES)), st.lists(st.text(max_size=8) | st.sampled_from(
    [marker for modes in TOOL_LANGUAGES.values() for _, ways in modes.values() for marker in ways]
    + ["{", "}", '"', ":", "name", "[", "]", "<think>", "</think>", "call:x{", "<escape>"]), max_size=12))  # fmt: skip
def test_whatever_a_model_writes_is_read(spoken: str, pieces: list[str]) -> None:
    modes = language(spoken, "think")
    assert modes is not None
    once, cut = read(Reader(modes), "".join(pieces)), read(Reader(modes), *"".join(pieces))
    assert (once.content, once.reasoning) == (cut.content, cut.reasoning)
    assert [(call.name, call.arguments) for call in once.calls] == [(one.name, one.arguments) for one in cut.calls]


def test_a_call_is_said_as_it_comes() -> None:
    reader = Reader(FORCED)
    assert reader.push('[{"name": "get_').calls == []
    (begun,) = reader.push('weather", "arg').calls
    assert (begun.index, begun.name, begun.arguments) == (0, "get_weather", "")
    (more,) = reader.push('uments": {"city": "Pa').calls
    assert (more.index, more.name, more.arguments) == (0, "", '{"city": "Pa')
    (rest,) = reader.push('ris"}}').calls
    assert rest.arguments == 'ris"}'
    (second,) = reader.push(', {"name": "now", "arguments": {}}]').calls
    assert (second.index, second.name, second.arguments) == (1, "now", "{}")


def test_reasoning_that_the_template_has_opened() -> None:
    modes = language(None, "think")
    assert modes is not None
    assert begins_in(modes, "<|assistant|><think>\n") == "think"
    assert begins_in(modes, "<|assistant|><think>\n\n</think>\n\n") == "content"
    said = read(Reader(modes, "think"), "Where", "?\n</thi", "nk>\n\nThere.")
    assert (said.reasoning, said.content) == ("Where?", "There.")
    assert language(None, "none") is None


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ tools }} <tool_call> <think> </think>", "hermes", "think"),
        ("{{ tools }} [TOOL_CALLS]", "mistral", "none"),
        ("{{ tools }} <｜tool▁calls▁begin｜> </think>", "deepseek_v3", "think"),
        ("{{ tools }} <|channel|>analysis", "openai", "openai_gptoss"),
        ("{{ tools }} <start_function_call>", "functiongemma", "none"),
        ('{{ tools }} {"name": x, "parameters": y}', "llama3_json", "none"),
        ("<|im_start|>", "hermes", "none"),
    ],
)
def test_a_template_tells_the_language(template: str, tools: str, reasoning: str) -> None:
    assert tool_language(template) == tools
    assert reasoning_language(template) == reasoning
    assert tool_language(template, "deepseek_v31") == "deepseek_v3"
    assert reasoning_language(template, "qwen3") == "think"
    assert tool_language(template, "hermes") in TOOL_PARSERS
