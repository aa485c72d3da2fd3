"""What a model has written, read as it comes: text, reasoning, and calls of tools.

Every family of models marks its calls in its own way. What they have in common is markers, and between two of them a
text of one kind; so a language is a table: each mode says what its text is, and which markers lead to which mode. A
reader goes through the text once, holds back no more than may become a marker, and says what is new with each piece:
the name of a call as soon as it is known, and its arguments as they are written.

| kind of text | what it is |
|---|---|
| content, reasoning | shown as such; blanks between content and a call are nobody's |
| calls | JSON objects, in a list or not, with a name and arguments; what stands before one may be a name |
| head, args | a name; the arguments of the call that it names, as one JSON object |
| gemma | `call:name{key:<escape>text<escape>,other:1}` |
| tagged | Qwen 3 Coder's `name><parameter=key>1</parameter>`, GLM's `name<arg_key>key</arg_key><arg_value>1…` |
| channel | gpt-oss: which channel comes, and to whom it speaks |
| guess | Llama 3: a call where it begins as one, else content |
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""Mistral's templates take no other ids than of nine letters and digits."""

Mode = tuple[str, Mapping[str, str]]
"""The kind of its text, and the mode behind each marker."""
Language = Mapping[str, Mode]

_JSON: Mode = ("calls", {})
TOOL_LANGUAGES: dict[str, Language] = {
    "hermes": {
        "content": ("content", {"<tool_call>": "calls"}), "calls": ("calls", {"</tool_call>": "content"}),
    },
    "llama3_json": {
        "content": ("guess", {"<|python_tag|>": "calls"}), "text": ("content", {"<|python_tag|>": "calls"}),
        "calls": ("calls", {"<|python_tag|>": "calls"}),
    },
    "mistral": {
        "content": ("content", {"[TOOL_CALLS]": "calls"}),
        "calls": ("calls", {"[ARGS]": "args", "[CALL_ID]": "id", "[TOOL_CALLS]": "calls"}),
        "id": ("drop", {"[ARGS]": "args"}),
        "args": ("args", {"[TOOL_CALLS]": "calls"}),
    },
    "functiongemma": {
        "content": ("content", {"<start_function_call>": "call"}),
        "call": ("gemma", {"<end_function_call>": "content"}),
    },
    "qwen3_coder": {
        "content": ("content", {"<tool_call>": "between", "<function=": "call"}),
        "between": ("drop", {"<function=": "call", "</tool_call>": "content"}),
        "call": ("tagged", {"</function>": "between"}),
    },
    "glm45": {
        "content": ("content", {"<tool_call>": "call"}), "call": ("tagged", {"</tool_call>": "content"}),
    },
    "deepseek_v3": {
        "content": ("content", {"<｜tool▁calls▁begin｜>": "between"}),
        "between": ("drop", {"<｜tool▁call▁begin｜>": "head", "<｜tool▁calls▁end｜>": "content"}),
        "head": ("head", {"<｜tool▁sep｜>": "args"}),
        "args": ("args", {"<｜tool▁call▁end｜>": "between"}),
    },
    "granite": {"content": ("content", {"<|tool_call|>": "calls", "<tool_call>": "calls"}), "calls": _JSON},
    "phi4_mini_json": {"content": ("content", {"functools": "calls"}), "calls": _JSON},
    "openai": {
        "content": ("channel", {"<|message|>": "channel"}),
        "analysis": ("reasoning", {"<|end|>": "content", "<|start|>": "content", "<|channel|>": "content"}),
        "final": ("content", {"<|end|>": "content", "<|start|>": "content", "<|return|>": "content"}),
        "args": ("args", {"<|call|>": "content", "<|end|>": "content", "<|start|>": "content"}),
    },
}  # fmt: skip
FORCED: Language = {"content": _JSON}
"""Of an answer that a grammar makes a list of calls."""
PLAIN: Language = {"content": ("content", {})}
THINK = ("<think>", "</think>")
THINKING: dict[str, tuple[str, str]] = {"think": THINK, "mistral": ("[THINK]", "[/THINK]")}

TOOL_NAMES = {
    "qwen": "hermes", "llama4_json": "llama3_json", "gemma": "functiongemma", "deepseek_v31": "deepseek_v3",
    "gpt-oss": "openai", "gpt_oss": "openai", "qwen3_xml": "qwen3_coder", "seed_oss": "qwen3_coder", "glm47": "glm45",
}  # fmt: skip
"""Other names of a language, many of them vLLM's."""
THINKING_NAMES = {
    "deepseek_r1": "think", "deepseek_v3": "think", "qwen3": "think", "openai": "openai_gptoss",
    "gpt_oss": "openai_gptoss",
}  # fmt: skip
TOOL_PARSERS = sorted({"auto", *TOOL_LANGUAGES, *TOOL_NAMES})
REASONING_PARSERS = sorted({"auto", "none", *THINKING, *THINKING_NAMES, "openai_gptoss"})

OF_TEMPLATES = {
    "<|channel|>": "openai", "<start_function_call>": "functiongemma", "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "[TOOL_CALLS]": "mistral", "<|tool_call|>": "granite", "<function=": "qwen3_coder", "<arg_key>": "glm45",
    "<tool_call>": "hermes", "functools": "phi4_mini_json",
    "<|python_tag|>": "llama3_json", '"parameters":': "llama3_json",
}  # fmt: skip
"""What a template holds whose model speaks a language, the surest first."""


def tool_language(template: str, named: str = "auto") -> str:
    """The language of a model's calls, by its template where nobody names it. Hermes' is what we teach (`chat.py`)."""
    if named != "auto":
        return TOOL_NAMES.get(named, named)
    taught = "tools" in template
    return next((name for marker, name in OF_TEMPLATES.items() if taught and marker in template), "hermes")


def reasoning_language(template: str, named: str = "auto") -> str:
    """How a model marks its reasoning; "none" where it does not."""
    if named != "auto":
        return THINKING_NAMES.get(named, named)
    if "<|channel|>" in template and "analysis" in template:
        return "openai_gptoss"
    return next((name for name, (_, end) in THINKING.items() if end in template), "none")


def language(tools: str | None, reasoning: str) -> Language | None:
    """One table for both; None where there is nothing to find. `tools` None: no calls are looked for."""
    if "openai" in (tools, reasoning.removesuffix("_gptoss")):
        return TOOL_LANGUAGES["openai"]
    modes = dict(TOOL_LANGUAGES[tools] if tools else PLAIN)
    if reasoning in THINKING:
        begin, end = THINKING[reasoning]
        # What a guess may have become has the same ways out.
        for name in ("content", "text", "calls") if "text" in modes else ("content",):
            modes[name] = (modes[name][0], {**modes[name][1], begin: "think"})
        modes["think"] = ("reasoning", {end: "content"})
    return modes if len(modes) > 1 else None


def needs_markers(modes: Language) -> bool:
    """Whether a marker of the language may be a control token, which is text only where it is not left out."""
    return any(marker not in ("<tool_call>", "</tool_call>", *THINK) for _, ways in modes.values() for marker in ways)


def begins_in(modes: Language, tail: str) -> str:
    """The mode that an answer begins in, behind a prompt that ends so: templates open the reasoning themselves."""
    begin = next((marker for marker, mode in modes["content"][1].items() if mode == "think"), None)
    return "think" if begin is not None and tail.rstrip().endswith(begin) else "content"


# What is said -------------------------------------------------------------------------------------


class Call(Struct):
    """News of the call at `index`. `identity` and `name` come with its first."""

    index: int
    identity: str = ""
    name: str = ""
    arguments: str = ""


class Said(Struct):
    """What is new."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = []

    def add(self, other: Said) -> None:
        """Put what came later behind it: of each call what is known of it together."""
        self.content += other.content
        self.reasoning += other.reasoning
        for call in other.calls:
            if self.calls and self.calls[-1].index == call.index:
                self.calls[-1].arguments += call.arguments
            else:
                self.calls.append(Call(call.index, call.identity, call.name, call.arguments))


class Reader:
    """Reads one answer of a language, beginning in a mode."""

    def __init__(self, modes: Language, mode: str = "content") -> None:
        self._modes = modes
        self._mode = mode
        self._held = ""
        self._head = ""
        self._blanks = ""
        self._begun = mode == "content"
        """Whether blanks belong to what is shown: not behind reasoning or a call."""
        self._object: CallObject | None = None
        self._span: Span | None = None
        self._said = Said()
        self.calls = 0

    def push(self, text: str) -> Said:
        """What a piece of text says."""
        self._said, text = Said(), self._held + text
        while True:
            ways = self._modes[self._mode][1]
            found = min(((place, -len(marker), marker) for marker in ways if (place := text.find(marker)) >= 0),
                        default=None)  # fmt: skip
            if found is None:
                break
            self._take(text[: found[0]])
            text = text[found[0] + len(found[2]) :]
            self._enter(ways[found[2]])
        held = held_back(text, list(ways))
        self._held = text[len(text) - held :]
        self._take(text[: len(text) - held])
        return self._said

    def finish(self) -> Said:
        """The answer has ended: what was held back."""
        self._said, held, self._held = Said(), self._held, ""
        self._take(held)
        kind = self._modes[self._mode][0]
        if kind == "guess":
            self._show(self._head, "content")
        elif kind in ("gemma", "tagged"):
            self._whole(kind)
        elif kind == "content" and not self.calls:
            self._said.content += self._blanks
        return self._said

    # Modes --------------------------------------------------------------------------------------

    def _enter(self, mode: str) -> None:
        kind = self._modes[self._mode][0]
        if kind in ("gemma", "tagged"):
            self._whole(kind)
        if mode == "channel":
            mode = self._channel()
        self._mode, entered = mode, self._modes[mode][0]
        if entered == "args":
            # A line of its own: what came before may be a name, or only the kind of the call.
            self._head, self._span = self._head + "\n", None
        elif entered != "drop" and not (entered == kind == "channel"):
            self._head = ""
        self._blanks, self._begun, self._object = "", False, None

    def _take(self, text: str) -> None:
        kind = self._modes[self._mode][0]
        if not text or kind == "drop":
            return
        if kind in ("content", "reasoning"):
            self._show(text, kind)
        elif kind == "calls":
            self._calls(text)
        elif kind == "args":
            self._args(text)
        else:
            self._head += text
            if kind == "guess":
                self._guess()

    def _show(self, text: str, kind: str) -> None:
        text = self._blanks + (text if self._begun else text.lstrip())
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._begun = True
            setattr(self._said, kind, getattr(self._said, kind) + shown)

    def _calls(self, text: str) -> None:
        for character in text:
            if self._object is None and character == "{":
                self._object = CallObject(self._begin, self._more)
            if self._object is None:
                self._head += character
            elif self._object.take(character):
                self._object = None

    def _args(self, text: str) -> None:
        for character in text:
            if self._span is None:
                if character != "{":
                    self._head += character
                    continue
                self._begin(name_in(self._head))
                self._span = Span()
            if self._span.open:
                self._more(character)
                self._span.take(character)

    def _guess(self) -> None:
        """A call where it begins as one; a text that cannot become one is content."""
        text = self._head.lstrip()
        if re.match(r'\{\s*"(name|type|function|parameters)"', text):
            self._enter("calls")
            self._calls(text)
        elif text and not re.fullmatch(r'\{\s*("\w{0,10})?', text):
            held, self._head = self._head, ""
            self._mode = "text"
            self._show(held, "content")

    def _channel(self) -> str:
        """The mode that a header of gpt-oss announces."""
        header = self._head
        if found := re.search(r"to=(?:functions\.)?([\w.-]+)", header):
            self._head = found[1]
            return "args"
        return "analysis" if "analysis" in header else "final"

    def _whole(self, kind: str) -> None:
        """A call that is no JSON is said when it has ended."""
        head, self._head = self._head, ""
        if found := re.match(
            r"\s*call:([\w.-]+)\s*(\{.*)" if kind == "gemma" else r"\s*([\w.-]+)(.*)", head, re.DOTALL
        ):
            made = gemma_value(found[2])[0] if kind == "gemma" else tagged_values(found[2])
            self._begin(found[1])
            self._more(json.dumps(made, ensure_ascii=False))

    # Calls --------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        identity = "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH))
        self._said.calls.append(Call(self.calls, identity, name))
        self.calls += 1
        self._head = ""

    def _more(self, text: str) -> None:
        self._said.add(Said(calls=[Call(self.calls - 1, arguments=text)]))


def held_back(text: str, markers: list[str]) -> int:
    """Length of the longest end of `text` that some marker begins with."""
    longest = min(len(text), max(map(len, markers), default=1) - 1)
    return next((length for length in range(longest, 0, -1)
                 if any(marker.startswith(text[len(text) - length :]) for marker in markers)), 0)  # fmt: skip


def name_in(head: str) -> str:
    """The name in what stands before a call's arguments: its last line that is not only words around it."""
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("```") and line != "function"), "")


# JSON as it comes ---------------------------------------------------------------------------------


class Span:
    """Where an object of JSON ends that is read character by character."""

    __slots__ = ("depth", "escaped", "open", "text")

    def __init__(self) -> None:
        self.depth = 0
        self.text = self.escaped = False
        self.open = True

    def take(self, character: str) -> None:
        if self.text:
            self.text = self.escaped or character != '"'
            self.escaped = not self.escaped and character == "\\"
        elif character == '"':
            self.text = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
            self.open = self.depth > 0


class CallObject:
    """`{"name": "…", "arguments": {…}}` as it comes. Arguments that come before the name wait for it."""

    def __init__(self, begin: Any, more: Any) -> None:
        self._begin = begin
        self._more = more
        self._span = Span()
        self._key = ""
        self._part = ""
        self._value = False
        self._named = False
        self._arguments = ""
        """What was not said yet; whether anything was: `_said`."""
        self._said = False

    def take(self, character: str) -> bool:
        """Whether the object is complete with this character."""
        span, depth, in_text = self._span, self._span.depth, self._span.text
        span.take(character)
        if depth == 1 and not in_text and character in ",}":
            self._end_part()
        elif depth == 1 and not in_text and character == ":" and not self._value:
            self._key, self._part, self._value = _read(self._part), "", True
        elif depth:
            if self._value and self._key in ("arguments", "parameters") and (depth > 1 or span.depth > 1):
                self._argue(character)
            else:
                self._part += character
        if not span.open and self._named and not self._said:
            self._argue("{}")
        return not span.open

    def _end_part(self) -> None:
        value = _read(self._part)
        if self._value and self._key == "name" and isinstance(value, str) and not self._named:
            self._named = True
            self._begin(value)
            self._argue("")
        elif self._value and self._key in ("arguments", "parameters") and isinstance(value, str) and value:
            # Some models write the arguments as a text that holds JSON.
            self._argue(value)
        self._part, self._value = "", False

    def _argue(self, text: str) -> None:
        self._arguments += text
        if self._named and self._arguments:
            self._more(self._arguments)
            self._arguments, self._said = "", True


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def gemma_value(text: str) -> tuple[Any, str]:
    """The value that a text of FunctionGemma begins with, and what follows it."""
    text = text.lstrip()
    if text.startswith("<escape>"):
        value, _, rest = text[8:].partition("<escape>")
        return value, rest
    if text[:1] in ("{", "["):
        made: dict[str, Any] = {}
        inner, closing = text[1:], {"{": "}", "[": "]"}[text[0]]
        while inner and not inner.lstrip(", \n").startswith(closing):
            key = str(len(made))
            if closing == "}":
                key, _, inner = inner.lstrip(", \n").partition(":")
            made[key.strip().replace("<escape>", "")], inner = gemma_value(inner.lstrip(", \n"))
        return (made if closing == "}" else list(made.values())), inner.lstrip(", \n")[1:]
    found = re.match(r"[^,}\]]*", text)
    word = found[0] if found else ""
    value = _read(word.strip())
    return (word.strip() if value is None and word.strip() != "null" else value), text[len(word) :]


TAGGED = re.compile(
    r"<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)"
    r"|<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL,
)  # fmt: skip


def tagged_values(text: str) -> dict[str, Any]:
    """The arguments between tags: JSON where a value is some, else text."""
    found = [(one[1] or one[3], one[2] if one[1] else one[4]) for one in TAGGED.finditer(text)]
    read = {key.strip(): (value, _read(value.strip())) for key, value in found}
    return {key: value if made is None and value.strip() != "null" else made for key, (value, made) in read.items()}
