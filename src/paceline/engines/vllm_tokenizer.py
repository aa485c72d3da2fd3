"""The tokenizer of a model without `tokenizer.json`: one process a node, in vLLM's environment, asked by front-ends.

Such a model has a tokenizer that needs its library, and that needs vLLM or transformers, which no front-end is to
import. So the node starts a process with it (`tokenizer_process`), which answers on a socket file of its user's alone,
and front-ends ask it for each text (`RemoteTokenizer`). Where it ends it is started again, and who asks meanwhile
waits; it ends with the node's supervisor, whose pipe it reads.

    python -m paceline.engines.vllm_tokenizer SOCKET NAME OPTIONS    # as vLLM's get_tokenizer has them, as JSON
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engines.base import EngineError
from paceline.engines.chat import ChatPrompts, Control, Conversation, Fragments

LENGTH_BYTES = 4
MOST_BYTES = 64 << 20
PATIENCE_S = 120.0
"""How long a front-end waits for it to come, or to come back."""
AGAIN_S = 0.1
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Asked(Struct, frozen=True, omit_defaults=True):
    """Tokens of a text, the text of tokens, or (with neither) `Described`."""

    text: str | None = None
    add_special: bool = True
    parse_special: bool = False
    token_ids: list[int] | None = None


class Described(Struct, frozen=True):
    """What a front-end has to know once. `controls`: by text; `special`: what a template knows as `bos_token`, …"""

    controls: dict[str, Control]
    special: dict[str, str]
    chat_template: str | None
    longest_piece: int


# In a front-end -----------------------------------------------------------------------------------


class RemoteTokenizer:
    """As `HfTokenizer`. Raises EngineError where nobody answers."""

    def __init__(
        self, path: str, max_model_len: int, vocabulary_size: int, model_name: str, chat_template: str | None,
        sampling_defaults: Mapping[str, float],
    ) -> None:  # fmt: skip
        self.max_model_len = max_model_len
        self.vocabulary_size = vocabulary_size
        self.model_name = model_name
        self.sampling_defaults = sampling_defaults
        self._path = path
        self._link: socket.socket | None = None
        # Long prompts are done in a thread.
        self._asking = threading.Lock()
        described = self._ask(Asked(), Described)
        self.longest_piece = described.longest_piece
        self.chat_template = chat_template or described.chat_template
        self._prompts = ChatPrompts(self.chat_template, described.controls, described.special)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        tokens: list[int] = self._ask(Asked(text, add_special, parse_special), list[int])
        return tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._ask(Asked(token_ids=list(token_ids)), str))

    def chat(self, conversation: Conversation) -> Fragments:
        return self._prompts.fragments(conversation)

    def _ask(self, asked: Asked, kind: Any) -> Any:
        frame, end = msgspec.json.encode(asked), time.monotonic() + PATIENCE_S
        with self._asking:
            while True:
                try:
                    if self._link is None:
                        self._link = socket.socket(socket.AF_UNIX)
                        self._link.connect(self._path)
                    _write(self._link, frame)
                    return msgspec.json.decode(_read(self._link), type=kind)
                except OSError as error:
                    if self._link is not None:
                        self._link.close()
                    self._link = None
                    if time.monotonic() > end:
                        raise EngineError(f"the model's tokenizer does not answer: {error}") from None
                    time.sleep(AGAIN_S)


def _write(link: socket.socket, frame: bytes) -> None:
    link.sendall(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)


def _read(link: socket.socket) -> bytes:
    """One frame. Raises OSError where it ends before, or is longer than any."""
    length = int.from_bytes(_exactly(link, LENGTH_BYTES), "little")
    if length > MOST_BYTES:
        raise OSError("a frame that is too long")
    return _exactly(link, length)


def _exactly(link: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = link.recv(count - len(parts))
        if not part:
            raise ConnectionError("it has ended")
        parts += part
    return bytes(parts)


# In the node's process ----------------------------------------------------------------------------


def tokenizer_process(name: str, options: Mapping[str, Any]) -> str:
    """Start it, and again where it ends; returns the path of its socket. `options`: of vLLM's `get_tokenizer`."""
    path = str(Path(tempfile.mkdtemp(prefix="paceline-tokenizer-"), "socket"))
    command = [sys.executable, "-m", "paceline.engines.vllm_tokenizer", path, name, json.dumps(options)]

    def watch() -> None:
        while True:
            # The pipe ends with this process, however that ends.
            subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True).wait()
            time.sleep(AGAIN_S)

    threading.Thread(target=watch, name="tokenizer", daemon=True).start()
    return path


# In vLLM's environment ----------------------------------------------------------------------------


def answer_to(tokenizer: Any, asked: Asked) -> Any:
    """What is sent back."""
    if asked.text is not None:
        split = {"split_special_tokens": not asked.parse_special}
        return list(tokenizer.encode(asked.text, add_special_tokens=asked.add_special, **split))
    if asked.token_ids is not None:
        return str(tokenizer.decode(asked.token_ids, skip_special_tokens=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    controls = {
        token.content: Control(number, token.lstrip, token.rstrip) for number, token in added.items() if token.special
    }
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL if getattr(tokenizer, name, None)}
    template = getattr(tokenizer, "chat_template", None)
    longest = max(len(piece.encode()) for piece in tokenizer.get_vocab())
    return Described(controls, special, template if isinstance(template, str) else None, longest)


def serve(path: str, answer: Callable[[Asked], Any]) -> None:
    """Answer on the socket until the process ends."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen(64)
    deciding = threading.Lock()

    def client(link: socket.socket) -> None:
        with link, contextlib.suppress(OSError, msgspec.DecodeError):
            while True:
                asked = msgspec.json.decode(_read(link), type=Asked)
                with deciding:
                    said = answer(asked)
                _write(link, msgspec.json.encode(said))

    while True:
        threading.Thread(target=client, args=door.accept()[:1], daemon=True).start()


def main(path: str, name: str, options: str) -> None:
    def end_with_the_node() -> None:
        sys.stdin.read()
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
        os._exit(0)

    threading.Thread(target=end_with_the_node, daemon=True).start()
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(name, **json.loads(options))
    serve(path, lambda asked: answer_to(tokenizer, asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
