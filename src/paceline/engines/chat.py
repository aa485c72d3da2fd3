"""A conversation as one prompt: the model's own template, or the format that its vocabulary speaks of.

A model's template is a Jinja program that came with the file, so it runs sandboxed, in the environment that
transformers sets up for it: trimmed blocks, loop controls, `{% generation %}`, `tojson` with its arguments,
`raise_exception`, `strftime_now`, the special tokens by name, `tools` and `documents` (None where there are none).
A file without a template gets a format by its special tokens:

- Gemma, where the vocabulary has `<start_of_turn>`. It has no system role: system text goes before the
  first user message. Turns must alternate, so neighbours of one role are joined.
- Llama 3, where it has `<|start_header_id|>`.
- ChatML, where it has `<|im_start|>`.
- else `User: …` and `Assistant: …` lines, which base models continue well enough.

Text is text: only the template's own markers become control tokens. A marker inside a message would let its writer
speak as the assistant or as the system. So before a template sees the conversation, a character that no text may hold
(a Unicode noncharacter) is put into every marker that a message brings along; what is still a marker in the rendered
text is the template's, and the character is taken out again.
"""

from __future__ import annotations

import datetime
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines.base import EngineError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
OWN_WORDS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""What a template is given by us; arguments of these names are refused."""
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Turn = tuple[str, str]
"""Role and text."""
Fragments = list[str | int]
"""A prompt in order: text that holds no control token, and control tokens."""


class Conversation(Struct, frozen=True):
    """What a chat's prompt is made from. `continue_final_message`: the answer goes on where the last message ends.

    `template`: in place of the model's own; `arguments`: further variables for it.
    """

    messages: Sequence[Mapping[str, object]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, object]] | None = None
    documents: Sequence[Mapping[str, object]] | None = None
    template: str | None = None
    arguments: Mapping[str, object] = {}


class Control(Struct, frozen=True):
    """A control token. `eats_left`, `eats_right`: whether it takes the blanks beside it, as some of Phi's do."""

    token_id: int
    eats_left: bool = False
    eats_right: bool = False


class ChatPrompts:
    """How one model's conversations become prompts. Raises EngineError where its template is no Jinja.

    `controls`: the control tokens by their text. `special`: what a template knows as `bos_token` and so on. `bos`: what
    the prompt begins with in any case, "" for nothing.
    """

    def __init__(
        self, source: str | None, controls: Mapping[str, Control], special: Mapping[str, str], bos: str = ""
    ) -> None:
        self._controls = controls
        self._pattern = marker_pattern([text for text in controls if len(text) > 1])
        self._special = dict(special)
        self._bos = bos
        self._template = Template(source) if source and source.strip() else None
        self._knows_tools = self._template is not None and "tools" in (source or "")

    def fragments(self, conversation: Conversation) -> Fragments:
        """The prompt. Raises ValueError where the conversation is none, or the template refuses it."""
        template, knows_tools = self._template, self._knows_tools
        if conversation.template is not None and conversation.template.strip():
            try:
                template, knows_tools = Template(conversation.template), "tools" in conversation.template
            except EngineError as error:
                raise ValueError(str(error)) from None
        _read(conversation.messages)
        guard, conversation = self._guarded(conversation)
        if knows_tools:
            return self._split(self._text(template, conversation), guard)
        try:
            return self._split(self._text(template, told_of_tools(conversation)), guard)
        except ValueError:
            if not conversation.tools or _read(conversation.messages)[0][1][0] == "system":
                raise
            # Some templates, Gemma 2's for one, take no system message.
            return self._split(self._text(template, told_of_tools(conversation, "user")), guard)

    def _text(self, template: Template | None, conversation: Conversation) -> str:
        turns = _read(conversation.messages)
        if template is None:
            given = {"add_generation_prompt": conversation.add_generation_prompt}
            text = render_fallback([turn for _, turn in turns], self._controls.__contains__, self._bos, **given)
        else:
            text = template.render(conversation, turns, self._special)
        if conversation.continue_final_message:
            text = _cut_behind(text, turns[-1][1][1])
        return text if text.startswith(self._bos) else self._bos + text

    def _guarded(self, conversation: Conversation) -> tuple[str, Conversation]:
        """The conversation with no marker left in what was written, and the character in them; "" where none was."""
        written = [conversation.messages, conversation.tools, conversation.documents, conversation.arguments]
        if self._pattern is None or not any(map(self._has_marker, written)):
            return "", conversation
        whole = msgspec.json.encode(written).decode()
        guard = next((one for one in NONCHARACTERS if one not in whole), None)
        if guard is None:
            raise ValueError("the conversation holds every noncharacter of Unicode")
        messages, tools, documents, arguments = (self._put(value, guard) for value in written)
        changed = {"messages": messages, "tools": tools, "documents": documents, "arguments": arguments}
        return guard, msgspec.structs.replace(conversation, **changed)

    def _has_marker(self, value: Any) -> bool:
        assert self._pattern is not None
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self._has_marker(key) or self._has_marker(inner) for key, inner in value.items())
        return isinstance(value, Sequence) and any(map(self._has_marker, value))

    def _put(self, value: Any, guard: str) -> Any:
        assert self._pattern is not None
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + guard + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self._put(key, guard): self._put(inner, guard) for key, inner in value.items()}
        return [self._put(inner, guard) for inner in value] if isinstance(value, Sequence) else value

    def _split(self, text: str, guard: str) -> Fragments:
        parts = [text] if self._pattern is None else self._pattern.split(text)
        fragments: Fragments = []
        eaten = False
        for place, part in enumerate(parts):
            if place % 2:
                control = self._controls[part]
                if control.eats_left and fragments and isinstance(fragments[-1], str):
                    fragments[-1] = fragments[-1].rstrip()
                fragments.append(control.token_id)
                eaten = control.eats_right
            elif part:
                written = part.replace(guard, "") if guard else part
                fragments.append(written.lstrip() if eaten else written)
        return [fragment for fragment in fragments if fragment != ""]


def marker_pattern(markers: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of these texts, the longest at each place, in time that does not grow with their number."""
    tree: dict[str, Any] = {}
    for marker in markers:
        node = tree
        for character in marker:
            node = node.setdefault(character, {})
        node[""] = {}

    def expression(node: dict[str, Any]) -> str:
        ways = [re.escape(character) + expression(child) for character, child in node.items() if character]
        if not ways:
            return ""
        return f"(?:{'|'.join(ways)})" + ("?" if "" in node else "")

    return re.compile(f"({expression(tree)})") if tree else None


# Templates ----------------------------------------------------------------------------------------


class Template:
    """A Jinja template as transformers renders it. Raises EngineError where it is none."""

    def __init__(self, source: str) -> None:
        jinja = _jinja()
        environment = jinja.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_block(jinja), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja.TemplateError as error:
            raise EngineError(f"the chat template is broken: {error}") from None
        self._knows_developers = "developer" in source
        self._short_ids = "length 9" in source

    def render(
        self, conversation: Conversation, turns: list[tuple[Mapping[str, object], Turn]], special: Mapping[str, str]
    ) -> str:
        """The prompt as text. Raises ValueError where the template refuses the conversation, or fails."""
        taken = next((name for name in conversation.arguments if name in OWN_WORDS), None)
        if taken is not None:
            raise ValueError(f"chat_template_kwargs.{taken} is given by the request itself")
        messages = []
        for message, (role, text) in turns:
            own = message["role"] if self._knows_developers else role
            messages.append({**message, "role": own, "content": text, **_calls(message, self._short_ids)})
        try:
            return str(
                self._template.render(
                    **{**special, **conversation.arguments},
                    messages=messages,
                    tools=conversation.tools or None,
                    documents=conversation.documents or None,
                    add_generation_prompt=conversation.add_generation_prompt,
                )
            )
        except Exception as error:  # a template may fail in any way that Python has
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the model's chat template refuses this conversation: {first}") from None

    def _refuse(self, message: str) -> None:
        raise _jinja().TemplateError(message)


def _generation_block(jinja: Any) -> Any:
    """`{% generation %}`, which marks the assistant's words for training: here its inside is rendered as it is."""

    def parse(self: Any, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja.nodes.Scope(body, lineno=line)

    return type("GenerationBlock", (jinja.ext.Extension,), {"tags": {"generation"}, "parse": parse})


def _cut_behind(text: str, final: str) -> str:
    """The prompt up to the end of the last message, which templates may have stripped. Raises ValueError."""
    place = text.rfind(final.strip()) if final.strip() else -1
    if place < 0:
        raise ValueError("continue_final_message: the last message is empty, or not in the prompt as it was written")
    whole = final.lstrip()
    return text[: place + len(whole if text.startswith(whole, place) else final.strip())]


class Arguments(dict[str, Any]):
    """A call's arguments for a template: an object, which is JSON where a template puts it behind a text."""

    def __str__(self) -> str:
        return _to_json(self)

    def __radd__(self, before: str) -> str:
        return before + str(self)

    def __add__(self, behind: str) -> str:
        return str(self) + behind


def _calls(message: Mapping[str, Any], short_ids: bool) -> dict[str, Any]:
    """The calls of a message, and which one it answers, where it has any."""
    made: dict[str, Any] = {}
    if message.get("tool_calls"):
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": Arguments(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    if short_ids:
        for part in (*made.get("tool_calls", ()), message):
            name = "tool_call_id" if part is message else "id"
            if name in part:
                (made if part is message else part)[name] = _short_id(str(part[name]))
    return made


def _short_id(identity: str) -> str:
    """An id as Mistral's templates ask for: nine letters and digits, the same for the same."""
    own = identity.rpartition("_")[2]
    right = len(own) == 9 and own.isascii() and own.isalnum()
    return own if right else blake2b(identity.encode()).hexdigest()[:9]


# Tools, where the template says nothing of them ---------------------------------------------------

TOLD = """You may call functions. They are described here as JSON, one a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object within <tool_call> tags:
<tool_call>
{{"name": <its name>, "arguments": <an object>}}
</tool_call>"""


def told_of_tools(conversation: Conversation, role: str = "system") -> Conversation:
    """The conversation with the tools in its first message, which is of this role, and with calls and what came of them
    as text.

    In the words of Hermes, which many models have seen in their training.
    """
    messages: list[Mapping[str, object]] = []
    for index, message in enumerate(conversation.messages):
        own, text = message.get("role"), _text(message.get("content"), index)
        calls: Any = message.get("tool_calls") or ()
        written = [f"<tool_call>\n{_to_json(call['function'])}\n</tool_call>" for call in calls]
        if own == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
        elif written:
            message = {"role": own, "content": "\n".join([*([text] if text else []), *written])}
        messages.append(message)
    if conversation.tools:
        told = TOLD.format(tools="\n".join(_to_json(tool) for tool in conversation.tools))
        first = messages[0]
        if ROLES.get(str(first.get("role"))) == role:
            text = _text(first.get("content"), 0)
            said = f"{text}\n\n{told}" if role == "system" else f"{told}\n\n{text}"
            messages[0] = {**first, "content": said}
        else:
            messages.insert(0, {"role": role, "content": told})
    return msgspec.structs.replace(conversation, messages=messages)


# Without a template -------------------------------------------------------------------------------


def render_fallback(turns: list[Turn], knows: Callable[[str], bool], bos: str, *, add_generation_prompt: bool) -> str:
    """The prompt for a model without a template. `knows` says whether a marker is a token of the model."""
    if knows("<start_of_turn>"):
        return bos + _gemma(turns, add_generation_prompt)
    if knows("<|start_header_id|>"):
        return bos + _marked(turns, "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", add_generation_prompt)
    if knows("<|im_start|>"):
        return bos + _marked(turns, "<|im_start|>", "\n", "<|im_end|>\n", add_generation_prompt)
    return bos + _plain(turns, add_generation_prompt)


def _gemma(turns: list[Turn], add_generation_prompt: bool) -> str:
    system = "\n\n".join(text for role, text in turns if role == "system")
    joined: list[Turn] = []
    for role, text in turns:
        name = "model" if role == "assistant" else "user"
        if role == "system":
            continue
        if joined and joined[-1][0] == name:
            joined[-1] = (name, f"{joined[-1][1]}\n\n{text}")
        else:
            joined.append((name, text))
    if system:
        if not joined or joined[0][0] != "user":
            joined.insert(0, ("user", system))
        else:
            joined[0] = ("user", f"{system}\n\n{joined[0][1]}")
    prompt = "".join(f"<start_of_turn>{name}\n{text.strip()}<end_of_turn>\n" for name, text in joined)
    return prompt + ("<start_of_turn>model\n" if add_generation_prompt else "")


def _marked(turns: list[Turn], begin: str, after_role: str, end: str, add_generation_prompt: bool) -> str:
    prompt = "".join(f"{begin}{role}{after_role}{text.strip()}{end}" for role, text in turns)
    return prompt + (f"{begin}assistant{after_role}" if add_generation_prompt else "")


def _plain(turns: list[Turn], add_generation_prompt: bool) -> str:
    prompt = "".join(f"{text}\n\n" if role == "system" else f"{role.capitalize()}: {text}\n" for role, text in turns)
    return prompt + ("Assistant:" if add_generation_prompt else "")


def _read(messages: Sequence[Mapping[str, object]]) -> list[tuple[Mapping[str, object], Turn]]:
    """Each message with its role and text. Raises ValueError naming the message that is wrong."""
    if not messages:
        raise ValueError("messages is empty")
    read: list[tuple[Mapping[str, object], Turn]] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            said = role[:40] if isinstance(role, str) else role
            raise ValueError(f"messages[{index}].role is {said!r}; it must be one of {', '.join(ROLES)}")
        read.append((message, (ROLES[role], _text(message.get("content"), index))))
    return read


def _text(content: object, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"messages[{index}].content must be a text or a list of parts")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"messages[{index}].content has a part of type {kind!r}; this model takes text only")
        texts.append(text)
    return "".join(texts)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes <, > and & for HTML, which a model has never seen in its training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _jinja() -> Any:
    # Here and not at the top: ranks import this module's neighbours and render nothing.
    try:
        for part in ("jinja2.sandbox", "jinja2.ext"):
            importlib.import_module(part)
        return importlib.import_module("jinja2")
    except ImportError:
        raise EngineError("chat templates need jinja2: pip install 'paceline[llama]'") from None
