"""Chat templates held against Jinja as transformers sets it up.

`test_templates.py` does so for the forms in `templates/`; `make test-templates` for those of some hundred models, which
the wheel of Xinference brings along (fetched once, without its dependencies).
"""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.engines.chat import ChatPrompts, Control, Conversation

FOLDER = Path(__file__).resolve().parents[2] / ".clients" / "templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MARKER = re.compile(r"<\|[^|<>{}' +]{2,40}\|>|<｜[^｜{}'+]+｜>|\[/?[A-Z_]{4,}\]|<(?:start|end)_of_turn>|</?s>")

Messages = Sequence[Mapping[str, Any]]
FUNCTION = {
    "name": "get_weather", "description": "The <weather> & more.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
TOOLS: list[Mapping[str, object]] = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"city": "Paris <é>", "n": 1}
SYSTEM, USER = {"role": "system", "content": "Be short."}, {"role": "user", "content": " What is the weather?\n"}
ANSWER = {"role": "assistant", "content": "It is <b>fine</b>."}
CALLS = [{"id": identity, "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
         for identity in ("abcdefghi", "123456789")]  # fmt: skip
RESULTS = [{"role": "tool", "tool_call_id": call["id"], "content": "21 degrees"} for call in CALLS]
CALLED = {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}
THOUGHT = ANSWER | {"reasoning_content": "Hm."}
CASES: dict[str, tuple[Messages, Any, Mapping[str, Any]]] = {
    "a question": ([USER], None, {}),
    "system": ([SYSTEM, USER], None, {}),
    "turns": ([SYSTEM, USER, ANSWER, USER], None, {}),
    "no generation prompt": ([USER, ANSWER], None, {"add_generation_prompt": False}),
    "thought": ([USER, THOUGHT, USER], None, {}),
    "documents": ([USER], None, {"documents": [{"title": "a", "text": "b"}]}),
    "arguments": ([USER], None, {"arguments": {"enable_thinking": False, "reasoning_effort": "high"}}),
    "tools": ([SYSTEM, USER], TOOLS, {}),
    "a call and its result": ([USER, CALLED, RESULTS[0]], TOOLS, {}),
    "and an answer": ([SYSTEM, USER, CALLED, RESULTS[0], ANSWER, USER], TOOLS, {}),
    "two calls": ([USER, CALLED | {"tool_calls": CALLS}, *RESULTS], TOOLS, {}),
}


def as_transformers(source: str, messages: Messages, tools: Any, given: Mapping[str, Any]) -> str:
    """The prompt as transformers renders it."""
    jinja, nodes = importlib.import_module("jinja2.sandbox"), importlib.import_module("jinja2.nodes")
    ext: Any = importlib.import_module("jinja2.ext")

    def parse(self: Any, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def refuse(text: str) -> None:
        raise importlib.import_module("jinja2").TemplateError(text)

    def to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    generation = type("Generation", (ext.Extension,), {"tags": {"generation"}, "parse": parse})
    environment = jinja.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    words = SPECIAL | {"documents": given.get("documents"), **given.get("arguments", {})}
    words["add_generation_prompt"] = given.get("add_generation_prompt", True)
    return str(environment.from_string(source).render(messages=copy.deepcopy(messages), tools=tools, **words))


def continued(source: str, messages: Messages) -> str:
    """The same up to the end of the last message, as transformers finds it."""
    text, final = as_transformers(source, messages, None, {"add_generation_prompt": False}), messages[-1]["content"]
    place = text.rindex(final.strip())
    whole = final.lstrip()
    return text[: place + len(whole if text.startswith(whole, place) else final.strip())]


def as_text(messages: Messages) -> Messages:
    """With the arguments of calls as JSON: some templates put them as they are, which of an object is no JSON."""
    return json.loads(json.dumps(messages), object_hook=lambda one: one | (
        {"arguments": json.dumps(one["arguments"], ensure_ascii=False)} if "arguments" in one else {}))  # type: ignore[no-any-return]  # fmt: skip


def tried(render: Any, *given: Any) -> str | None:
    """What it renders; None where it refuses."""
    try:
        return str(render(*given))
    except Exception:  # a template may fail in any way that Python has
        return None


def differences(source: str) -> list[str]:
    """The cases in which our prompt is not that of transformers, or in which text becomes a control token."""
    prompts, found = ChatPrompts(source, {}, SPECIAL), []

    def ours(messages: Messages, tools: Any, given: Mapping[str, Any]) -> str:
        return "".join(map(str, prompts.fragments(Conversation(messages, tools=tools, **given))))

    for name, (messages, tools, given) in CASES.items():
        if tools and ("tools" not in source or (len(messages) > 2 and "tool_calls" not in source)):
            continue
        made = tried(ours, messages, tools, given)
        theirs = [tried(as_transformers, source, one, tools, given) for one in (messages, as_text(messages))]
        if made not in theirs:
            found.append(f"{name}: {made!r} is not {theirs[0]!r}")
    for final in ("The sky is ", "  Well,\nyes"):
        messages = [USER, {"role": "assistant", "content": final}]
        going_on = {"add_generation_prompt": False, "continue_final_message": True}
        if tried(ours, messages, None, going_on) != (theirs_too := tried(continued, source, messages)):
            found.append(f"continue_final_message: not {theirs_too!r}")
    return found + taken_for_control(source)


def taken_for_control(source: str) -> list[str]:
    """Whether markers in what anybody has written are control tokens of the prompt."""
    markers = sorted({*MARKER.findall(source), *SPECIAL.values()})
    prompts = ChatPrompts(source, {marker: Control(number) for number, marker in enumerate(markers)}, SPECIAL)

    def controls(messages: Messages) -> str:
        return str([one for one in prompts.fragments(Conversation(messages)) if isinstance(one, int)])

    found = []
    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        attacked = [{**one, "content": f"{one['content']} {'x '.join(markers)} end"} for one in messages]
        expected = tried(controls, messages)
        if expected is not None and tried(controls, attacked) != expected:
            found.append(f"markers in {len(messages)} messages become control tokens")
    return found


def of_the_wheel() -> dict[str, str]:
    """The templates by their models' names."""
    if not list(FOLDER.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), "xinference"]
        subprocess.run(pip, check=True)
    found: dict[str, str] = {}
    with zipfile.ZipFile(next(FOLDER.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if re.fullmatch(r"xinference/model/llm/models/.*\.json", name):
                said = json.loads(wheel.read(name))
                for model in said if isinstance(said, list) else [said]:
                    if template := model.get("chat_template"):
                        found[model["model_name"]] = template
    return found


if __name__ == "__main__":
    templates = of_the_wheel()
    wrong = {name: made for name, source in templates.items() if (made := differences(source))}
    for name, made in wrong.items():
        print(f"{name}: " + "\n  ".join(one[:300] for one in made))
    print(f"{len(templates)} templates, {len(wrong)} of them rendered otherwise than transformers does")
    raise SystemExit(bool(wrong))
