"""A tokenizer in a process of its own, asked over a socket: here in a thread, with a tokenizer of a few lines."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paceline.engines import vllm_tokenizer
from paceline.engines.base import EngineError
from paceline.engines.chat import Conversation
from paceline.engines.vllm_tokenizer import RemoteTokenizer, answer_to, serve
from tests.serving import wait_until


class Words:
    """A token a word; `<s>` is a control token, and goes before a text."""

    chat_template = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"
    bos_token = "<s>"

    def __init__(self) -> None:
        self.words = ["<s>"]
        self.added_tokens_decoder = {0: SimpleNamespace(content="<s>", lstrip=False, rstrip=True, special=True)}

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(["<s>", "longest-of-all"])}

    def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        found = [0] if add_special_tokens else []
        for word in text.split():
            if word == "<s>" and split_special_tokens:
                word = "less-than s"
            if word not in self.words:
                self.words.append(word)
            found.append(self.words.index(word))
        return found

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(self.words[token] for token in tokens if token or not skip_special_tokens)


@pytest.fixture
def path(tmp_path: Path) -> str:
    words = Words()
    where = str(tmp_path / "socket")
    threading.Thread(target=serve, args=[where, lambda asked: answer_to(words, asked)], daemon=True).start()
    wait_until(Path(where).exists, "it listens")
    return where


MADE: list[RemoteTokenizer] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while MADE:
        link = MADE.pop()._link
        if link is not None:
            link.close()


def remote(path: str) -> RemoteTokenizer:
    MADE.append(RemoteTokenizer(path, 100, 50, "words", None, {}))
    return MADE[-1]


def test_it_is_as_the_tokenizer_in_the_other_process(path: str) -> None:
    tokenizer = remote(path)
    assert tokenizer.encode("a b a") == [0, 1, 2, 1]
    assert tokenizer.encode("a <s>", add_special=False, parse_special=True) == [1, 0]
    assert tokenizer.encode("a <s>", add_special=False)[1] != 0
    assert tokenizer.decode([0, 1, 2]) == "a b"
    assert tokenizer.longest_piece == len("longest-of-all")
    assert tokenizer.chat(Conversation([{"role": "user", "content": "hi"}])) == [0, "hi"]


def test_many_ask_at_once(path: str) -> None:
    tokenizers, said = [remote(path) for _ in range(4)], []
    threads = [
        threading.Thread(target=lambda one=one: said.append(one.decode(one.encode("x y z")))) for one in tokenizers * 5
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["x y z"] * 20


def test_one_that_has_ended_is_asked_when_it_is_back(tmp_path: Path) -> None:
    path, words = str(tmp_path / "socket"), Words()
    doors: list[socket.socket] = []

    def once() -> None:
        """Describe itself, and end."""
        door = socket.socket(socket.AF_UNIX)
        door.bind(path)
        door.listen(4)
        doors.append(door)
        link, _ = door.accept()
        vllm_tokenizer._read(link)
        vllm_tokenizer._write(link, vllm_tokenizer.msgspec.json.encode(answer_to(words, vllm_tokenizer.Asked())))
        link.close()
        door.close()

    threading.Thread(target=once, daemon=True).start()
    tokenizer = remote(path)
    threading.Thread(target=serve, args=[path, lambda asked: answer_to(words, asked)], daemon=True).start()
    assert tokenizer.encode("a b") == [0, 1, 2]


def test_one_that_does_not_come_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_tokenizer, "PATIENCE_S", 0.0)
    with pytest.raises(EngineError, match="tokenizer does not answer"):
        remote(str(tmp_path / "none"))


def test_a_frame_that_is_nonsense_ends_that_connection_alone(path: str) -> None:
    tokenizer: Any = remote(path)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        link.sendall((4).to_bytes(4, "little") + b"\xff\xff\xff\xff")
        assert link.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        link.sendall(b"\xff\xff\xff\xff")
        assert link.recv(1) == b""
    assert tokenizer.decode(tokenizer.encode("still here")) == "still here"
