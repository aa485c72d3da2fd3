"""Tools in a conversation: by templates of the published forms, and told in words where a template knows none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from paceline.engines.chat import ChatPrompts, Conversation

TEMPLATES = Path(__file__).parent / "templates"
TOOLS: list[Mapping[str, object]] = [
    {"type": "function", "function": {"name": "now", "description": "The <time>.", "parameters": {"type": "object"}}}
]
CALL: dict[str, Any] = {
    "id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": {"zone": "é<", "n": 1}},
}  # fmt: skip
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00", "tool_call_id": "abcdefghi"},
]
ARGUMENTS = '{"zone": "é<", "n": 1}'


def render(source: str | None, messages: Sequence[Mapping[str, Any]], tools: Any = TOOLS) -> str:
    prompts = ChatPrompts(source, {}, {"bos_token": "<s>", "eos_token": "</s>"})
    return "".join(map(str, prompts.fragments(Conversation(messages, tools=tools))))


@pytest.mark.parametrize(
    "put", ["{{ a | tojson }}", "{{ 'x' + a }}", "{{ a + 'x' }}", "{{ 'x' ~ a ~ 'x' }}", "{{ a }}"]
)
def test_arguments_are_json_however_a_template_puts_them(put: str) -> None:
    source = f"{{{{ tools }}}}{{% set a = messages[1].tool_calls[0].function.arguments %}}{put}|{{{{ a.zone }}}}"
    assert render(source, HISTORY, None).strip("x").replace("x", "") == f"None{ARGUMENTS}|é<"


def test_a_template_that_knows_no_tools_gets_them_told() -> None:
    source = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    told = render(source, HISTORY)
    assert told.startswith("[system] You may call functions.")
    assert json.dumps(TOOLS[0]) in told
    assert f'[assistant] <tool_call>\n{{"name": "now", "arguments": {ARGUMENTS}}}\n</tool_call>' in told
    assert "[user] <tool_response>\n12:00\n</tool_response>" in told
    own = render(source, [{"role": "system", "content": "Be brief."}, *HISTORY])
    assert own.startswith("[system] Be brief.\n\nYou may call functions.")
    assert own.count("[system]") == 1
    assert "functions" not in render(source, HISTORY[:1], None)


def test_a_template_that_takes_no_system_message_gets_tools_told_by_the_user() -> None:
    told = render((TEMPLATES / "gemma2.jinja").read_text(encoding="utf-8"), HISTORY)
    assert told.startswith("<s><start_of_turn>user\nYou may call functions.")
    assert "</tool_call>\n\nWhat time is it?<end_of_turn>\n<start_of_turn>model\n<tool_call>" in told
    with pytest.raises(ValueError, match="System role not supported"):
        render((TEMPLATES / "gemma2.jinja").read_text(encoding="utf-8"), [{"role": "system", "content": "a"}, *HISTORY])


@pytest.mark.parametrize("identity", ["toolu_abcdefghi", "call_abcdefghi", "chatcmpl-tool-12", "abcdefghi"])
def test_a_template_that_takes_short_ids_gets_them(identity: str) -> None:
    source = (TEMPLATES / "mistral-v3.jinja").read_text(encoding="utf-8")
    told = render(source, [HISTORY[0], HISTORY[1] | {"tool_calls": [CALL | {"id": identity}]},
                           HISTORY[2] | {"tool_call_id": identity}])  # fmt: skip
    (made,) = re.findall(r'"id": "(\w{9})"}', told)
    assert f'"call_id": "{made}"' in told
    assert made == "abcdefghi" or "12" in identity
