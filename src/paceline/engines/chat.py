"""A conversation as one prompt: the model's own template, or the format that its vocabulary speaks of.

A model's template is a Jinja program that came with the file, so it runs sandboxed, in an environment
with what Hugging Face's has: trimmed blocks, loop controls, `raise_exception`, `strftime_now`,
`bos_token`, `eos_token`. A file without a template gets a format by its special tokens:

- Gemma, where the vocabulary has `<start_of_turn>`. It has no system role: system text goes before the
  first user message. Turns must alternate, so neighbours of one role are joined.
- Llama 3, where it has `<|start_header_id|>`.
- ChatML, where it has `<|im_start|>`.
- else `User: …` and `Assistant: …` lines, which base models continue well enough.
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.engines.base import EngineError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

Turn = tuple[str, str]
"""Role and text."""


class ChatTemplate:
    """A model's own template. Raises EngineError where it is no Jinja."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self._bos = bos
        self._eos = eos
        self._jinja = _jinja()
        environment = self._jinja.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except self._jinja.TemplateError as error:
            raise EngineError(f"the model's chat template is broken: {error}") from None

    def render(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool) -> str:
        """The prompt. Raises ValueError where the template refuses the conversation."""
        turns = [{**message, "role": role, "content": text} for message, (role, text) in _read(messages)]
        try:
            return str(
                self._template.render(
                    messages=turns,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self._bos,
                    eos_token=self._eos,
                )
            )
        except (self._jinja.TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None

    def _refuse(self, message: str) -> None:
        raise self._jinja.TemplateError(message)


def render_fallback(
    messages: Sequence[Mapping[str, object]], knows: Callable[[str], bool], bos: str, *, add_generation_prompt: bool
) -> str:
    """The prompt for a model without a template. `knows` says whether a marker is a token of the model."""
    turns = [turn for _, turn in _read(messages)]
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
            raise ValueError(f"messages[{index}].role is {role!r}; it must be one of {', '.join(ROLES)}")
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


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes <, > and & for HTML, which a model has never seen in its training.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _jinja() -> Any:
    # Here and not at the top: ranks import this module's neighbours and render nothing.
    try:
        importlib.import_module("jinja2.sandbox")
        return importlib.import_module("jinja2")
    except ImportError:
        raise EngineError("chat templates need jinja2: pip install 'paceline[llama]'") from None
