"""The front-ends of one node ask each other what only one of them knows.

Each listens on a socket in the folder that they share, which nobody else of the machine can enter. A question is one
line of JSON over a connection of its own, and so is the answer. One that has died, or hangs, is left out: what it knew
is nobody's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from paceline.log import defect

logger = logging.getLogger("paceline.front-end")

PATIENCE_S = 1.0
MOST_BYTES = 64 * 1024 * 1024
"""Of an answer; a question has a line of a stream reader's default, 64 kB."""

Answer = Callable[..., Any]


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """The folder by a name that is short enough for a socket's path, whatever TMPDIR is."""
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


class Peers:
    """One front-end's door, and its way to the others'. `folder`: theirs; `index`: which of them this is.

    `answers`: by the question, what makes its answer from the question's fields; in the loop, so it must be quick.
    """

    def __init__(self, folder: Path, index: int, answers: Mapping[str, Answer]) -> None:
        self._folder = folder
        self._index = index
        self._answers = answers
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen, in place of an earlier life of this front-end. Where it cannot it serves all the same."""
        name = str(self._index)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.unlink(missing_ok=True)
            with _short(self._folder) as folder:
                self._server = await asyncio.start_unix_server(self._serve, f"{folder}/{name}")
        except OSError as error:
            logger.warning("the other front-ends cannot ask this one: %s", error)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._folder / str(self._index)

    async def ask(self, what: str, **fields: Any) -> list[Any]:
        """The answers of all front-ends of the node, this one's first."""
        found: list[Any] = []
        # A cleaner may have removed the folder, and then there is no way to the others.
        with contextlib.suppress(OSError), _short(self._folder) as folder:
            others = [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name != str(self._index)]
            found = await asyncio.gather(*(self._ask(path, {"what": what} | fields) for path in others))
        return [self._answers[what](**fields), *(answer for answer in found if answer is not None)]

    async def _ask(self, path: str, question: dict[str, Any]) -> Any:
        with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_unix_connection(path)
                try:
                    writer.write(msgspec.json.encode(question) + b"\n")
                    parts = []
                    while part := await reader.read(1 << 16):
                        parts.append(part)
                        if len(parts) << 16 > MOST_BYTES:
                            return None
                    return msgspec.json.decode(b"".join(parts))
                finally:
                    writer.close()
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, TimeoutError, ValueError, asyncio.LimitOverrunError):
                async with asyncio.timeout(PATIENCE_S):
                    question = msgspec.json.decode(await reader.readline(), type=dict[str, Any])
                    answer = self._answers[question.pop("what")]
                    writer.write(msgspec.json.encode(answer(**question)))
                    await writer.drain()
        except Exception as error:
            defect(logger, "internal error in an answer to another front-end", error)
        finally:
            writer.close()
