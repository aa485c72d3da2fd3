"""Clients that read streams of a running deployment, and the deployments that they are read from."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.pace import stretched
from tests.serving import Command, wait_until

TIMED = ("--engine", "timed", "--engine-option", "step_ms=10")
MOE = (
    "--engine",
    "moe",
    "--engine-option",
    "layers=2",
    "--engine-option",
    "step_ms=10",
    "--engine-option",
    "d_model=32",
)


def model(running: Command) -> str:
    """The name of the one that is served."""
    return str(running.openai.models.list().data[0].id)


class Streams:
    """Clients that read one stream each; `texts` is what they have by now."""

    def __init__(self, running: Command, pool: ThreadPoolExecutor, asks: list[dict[str, Any]]) -> None:
        self.texts = [""] * len(asks)
        self.finishes: list[str | None] = [None] * len(asks)
        self._running = running
        self._model = model(running)
        self._futures: list[Future[None]] = [pool.submit(self._read, index, ask) for index, ask in enumerate(asks)]

    def begun(self, characters: int = 10) -> bool:
        """Whether all have got so much. Raises what a client got in place of text."""
        for future in self._futures:
            if future.done():
                future.result()
        return all(len(text) >= characters for text in self.texts)

    def wait(self) -> list[str]:
        """All texts, whole. Raises what a client got in place of one."""
        for future in self._futures:
            future.result(stretched(60))
        assert set(self.finishes) <= {"length", "stop"}
        return self.texts

    def _read(self, index: int, ask: dict[str, Any]) -> None:
        stream = self._running.openai.completions.create(**{"model": self._model, "stream": True, **ask})
        for chunk in stream:
            for choice in chunk.choices:
                self.texts[index] += choice.text
                self.finishes[index] = choice.finish_reason


def whole(running: Command, ask: dict[str, Any]) -> str:
    return str(running.openai.completions.create(**{"model": model(running), **ask}).choices[0].text)


@contextmanager
def streams(running: Command, asks: list[dict[str, Any]]) -> Iterator[Streams]:
    with ThreadPoolExecutor(len(asks)) as pool:
        made = Streams(running, pool, asks)
        wait_until(made.begun, "all streams have begun")
        yield made
