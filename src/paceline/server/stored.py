"""Responses that are kept: to be asked for again, and to be gone on from (`previous_response_id`).

They lie as files in the node's own folder, one a response, so that whichever of the node's front-ends is asked finds
what any of them has answered, also where that one has ended since; the folder goes with the node. Each front-end holds
its own to its share of the bound, and the oldest go first. With several nodes, a response is known where it was made.

An id is random, so that nobody finds another's response by counting.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

logger = logging.getLogger("paceline.front-end")

RESPONSE_ID = re.compile("resp_[0-9a-f]{32}")
ITEM_ID = re.compile("[a-z]{2,3}_([0-9a-f]{32})[0-9]+")


AT_ONCE_BYTES = 256 * 1024
NAMED = re.compile(b"[a-z]{2,4}_([0-9a-f]{32})")
"""A response, or an item of one."""
ESCAPED = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
"""How JSON may write any letter."""


class Stored(Struct):
    """`items`: the whole conversation before the response, which has what came of it in `output`."""

    items: list[dict[str, Any]]
    response: dict[str, Any]


_items = msgspec.json.Decoder(list[dict[str, Any]])
_response = msgspec.json.Decoder(dict[str, Any])


class ResponseStore:
    """What is kept by one front-end, and found of all. `most_bytes`: of its own. Made again, it knows its own again."""

    def __init__(self, folder: Path, index: int, most_bytes: int) -> None:
        self._all = folder
        self._own = folder / str(index)
        self._own.mkdir(parents=True, exist_ok=True)
        self._most_bytes = most_bytes
        found = sorted((path.stat().st_mtime, path.name, path.stat().st_size) for path in self._own.iterdir())
        self._sizes = {name: size for _, name, size in found}
        self._held = sum(self._sizes.values())
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "keep")

    def put(self, stored: Stored, weight: int = 0) -> Future[None] | None:
        """Keep a response. What is larger than the bound, or finds no room on the disk, is not kept. Where it is of so
        much `weight` that others would wait for it, it is kept in a thread; returns what tells when that is done.
        """
        if weight > AT_ONCE_BYTES:
            return self._thread.submit(self._put, stored)
        self._put(stored)
        return None

    def _put(self, stored: Stored) -> None:
        # What is shown is a line of its own, so that it need not be read to be found.
        name = stored.response["id"]
        data = msgspec.json.encode(stored.response) + b"\n" + msgspec.json.encode(stored.items)
        if len(data) > self._most_bytes:
            return
        with self._lock:
            self._make_room(len(data))
        # Whole under its name or not there: another front-end may read it.
        partial = self._own / f".{name}"
        try:
            self._own.mkdir(parents=True, exist_ok=True)  # a cleaner may have been here
            partial.write_bytes(data)
            partial.rename(self._own / name)
        except OSError as error:
            logger.warning("a response cannot be kept: %s", error.strerror or error)
            return
        with self._lock:
            self._sizes[name] = len(data)
            self._held += len(data)

    def _make_room(self, size: int) -> None:
        while self._held + size > self._most_bytes:
            oldest = next(iter(self._sizes))
            self._held -= self._sizes.pop(oldest)
            (self._own / oldest).unlink(missing_ok=True)

    def get(self, response_id: str) -> Stored | None:
        """A response that is kept; None where there is none of this id."""
        for path in self._paths(response_id):
            try:
                response, _, items = path.read_bytes().partition(b"\n")
                return Stored(_items.decode(items), _response.decode(response))
            except FileNotFoundError:
                continue
        return None

    def shown(self, response_id: str) -> bytes | None:
        """A response as JSON."""
        for path in self._paths(response_id):
            try:
                with path.open("rb") as file:
                    return file.readline().rstrip()
            except FileNotFoundError:
                continue
        return None

    def named_bytes(self, body: bytes) -> int:
        """How much is kept of what a body names."""
        if b"\\u00" in body:
            body = ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), body)
        named = {b"resp_" + number for number in NAMED.findall(body)}
        paths = [path for one in named for path in self._paths(one.decode())]
        total = 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def delete(self, response_id: str) -> bool:
        """Keep it no more. Returns whether it was there."""
        for path in self._paths(response_id):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            with self._lock:
                self._held -= self._sizes.pop(response_id, 0)
            return True
        return False

    def item(self, item_id: str) -> dict[str, Any] | None:
        """An item of a response's output, by its id."""
        found = ITEM_ID.fullmatch(item_id)
        stored = self.get(f"resp_{found[1]}") if found else None
        output = stored.response["output"] if stored is not None else []
        return next((item for item in output if item["id"] == item_id), None)

    def _paths(self, response_id: str) -> list[Path]:
        if not RESPONSE_ID.fullmatch(response_id):
            return []
        return list(self._all.glob(f"*/{response_id}"))
